"""Members of a webdataset tar, with damage told: tarfile alone takes a broken header for the end."""

import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Self

SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes on a shard
PIECE = 1 << 20


class _StrictInfo(tarfile.TarInfo):
    """Headers of a tar that ends with its end marker and nothing but zeros behind it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # of no stub
            while piece := tar.fileobj.read(PIECE):
                if piece.count(0) < len(piece):
                    raise tarfile.ReadError("there is more behind the end marker") from None
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("cut off: there is no end marker") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def tar_members(stream: BinaryIO, url: str) -> Iterator[dict]:
    """The files of a tar (also a compressed one) in order, as webdataset's `group_by_keys` takes them.

    tarfile.TarError where the tar is damaged or cut off. Errors of `stream` other than EOFError are raised as they are.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictInfo) as tar:
            for member in tar:
                if member.isreg() and not SKIPPED.match(member.name):
                    file = tar.extractfile(member)
                    assert file is not None  # as it is of a regular file
                    yield {"fname": member.name, "data": file.read(), "__url__": url}
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
    except (EOFError, zlib.error) as error:  # of the decompression
        raise tarfile.ReadError(f"broken compression: {error}") from error
