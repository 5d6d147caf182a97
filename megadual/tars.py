"""Members of a webdataset tar, with damage told: tarfile alone takes a broken header for the end.

Nothing that a tar says of itself takes more memory than its sample may have.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Self

from webdataset.tariterators import base_plus_ext

SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes on a shard
PIECE = 1 << 20
SAMPLE_BYTES = 1 << 27  # of a sample's members
HEADER_BYTES = 1 << 20  # of a header that holds a long name or the like
HEADERS = (b"x", b"g", b"X", b"L", b"K")  # their types
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Refused:
    """In the place of a member's bytes: why they were not read."""

    reason: str


class _Plain:
    """A tar's stream; tarfile.ReadError where it is compressed: a few KB of it could be GB.

    `error` is the stream's own, which is no damage of the tar.
    """

    def __init__(self, stream: BinaryIO):
        self.stream, self.begun = stream, False
        self.error: Exception | None = None

    def read(self, size: int) -> bytes:
        try:
            piece = self.stream.read(size)
        except Exception as error:
            self.error = error
            raise
        if not self.begun:
            self.begun = True
            for mark, name in COMPRESSED.items():
                if piece.startswith(mark):
                    raise tarfile.ReadError(f"it is compressed ({name}); tars are read uncompressed, unpack it")
        return piece


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

    @classmethod
    def frombuf(cls, *arguments, **named) -> Self:
        info = super().frombuf(*arguments, **named)
        if info.size < 0 or (info.type in HEADERS and info.size > HEADER_BYTES):
            raise tarfile.ReadError(f"a header that says to have {info.size} bytes")
        return info


def tar_members(stream: BinaryIO, url: str, limit: int = SAMPLE_BYTES) -> Iterator[dict]:
    """The files of a tar in order, as webdataset's `group_by_keys` takes them; the data of some is Refused: sparse
    ones, and those with which a sample has more than `limit` bytes.

    tarfile.TarError where the tar is damaged, cut off or compressed. Errors of `stream` are raised as they are.
    """
    plain, sample, total = _Plain(stream), None, 0
    try:
        with tarfile.open(fileobj=plain, mode="r|", tarinfo=_StrictInfo) as tar:  # type: ignore[call-overload]
            for member in tar:
                if member.isreg() and not SKIPPED.match(member.name):
                    key = base_plus_ext(member.name)[0]
                    total = member.size + (total if key == sample else 0)
                    sample = key
                    yield {"fname": member.name, "data": _data(tar, member, total, limit), "__url__": url}
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
    except (ValueError, IndexError, OverflowError) as error:  # tarfile's, of numbers that are none
        if error is plain.error:
            raise
        raise tarfile.ReadError(f"broken header: {error}") from error


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo, total: int, limit: int) -> bytes | Refused:
    if member.issparse():
        return Refused(f"'{member.name}' is sparse: it says to be {member.size} bytes, most of which are not there")
    if not 0 <= member.size <= total <= limit:
        return Refused(f"with '{member.name}' the sample's members have {total} bytes, more than max_bytes={limit}")
    file = tar.extractfile(member)
    assert file is not None  # as it is of a regular file
    return file.read()
