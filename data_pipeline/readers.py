"""Input shards: which there are, and the raw samples in them."""

import glob
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import braceexpand
import fsspec
from webdataset.tariterators import group_by_keys, tar_file_expander

from megadual.errors import UserError


@dataclass(frozen=True)
class InputShard:
    """One input file. `name` is its path below its pattern's fixed folder: the name of its folder in the set."""

    name: str
    url: str
    size: int  # bytes


@dataclass
class RawSample:
    """One sample as stored: its members by suffix, or why it could not be read."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    damage: str = ""


def _matches(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(glob.glob(pattern, recursive=True))
    filesystem, path = fsspec.core.url_to_fs(pattern)
    return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))


def _fixed_folder(pattern: str) -> str:
    """The part of a pattern before its first wildcard or brace, down to a whole folder."""
    first = min((pattern.find(c) for c in "*?[{" if c in pattern), default=len(pattern))
    return pattern[: pattern.rfind("/", 0, first) + 1]


def list_inputs(patterns: list[str]) -> list[InputShard]:
    """The input shards that `patterns` (paths, globs, brace ranges, URLs) match, by name.

    A pattern that matches nothing and two files of one name raise UserError.
    """
    shards: dict[str, InputShard] = {}
    for pattern in patterns:
        fixed = _fixed_folder(pattern)
        try:
            parts = list(braceexpand.braceexpand(pattern))
        except braceexpand.UnbalancedBracesError as error:
            raise UserError(f"inputs: the braces of '{pattern}' do not match") from error
        for part in parts:
            urls = _matches(part)
            if not urls:
                raise UserError(f"inputs: '{part}' matches no file")
            for url in urls:
                if not url.endswith(".tar"):
                    raise UserError(f"inputs: '{url}' is no .tar; inputs are webdataset tars")
                below = PurePosixPath(url[len(fixed) :])
                name = "--".join(below.with_suffix("").parts)
                known = shards.get(name)
                if known is not None and known.url != url:
                    raise UserError(
                        f"inputs: '{known.url}' and '{url}' would both become '{name}'; name the folder that holds "
                        "both in one pattern (FOLDER/*/*.tar), or make two sets"
                    )
                filesystem, path = fsspec.core.url_to_fs(url)
                shards[name] = InputShard(name, url, filesystem.size(path))
    if not shards:
        raise UserError("inputs: the list is empty; give at least one path or glob of .tar files")
    return [shards[name] for name in sorted(shards)]


def read_samples(shard: InputShard) -> Iterator[tuple[RawSample, int]]:
    """The samples of a webdataset tar in order, each with the bytes of the tar read so far.

    Where the tar is damaged the rest of it cannot be read: a last sample says so, and one names each member that
    a sample holds twice. Errors of the file system are raised, since trying again may help.
    """
    damage = []

    def keep_first_of_two(error: Exception) -> bool:
        damage.append(error)
        return True  # goes on

    def stop_if_damaged(error: Exception) -> bool:
        if not isinstance(error, (tarfile.TarError, EOFError, zlib.error)):
            raise error
        damage.append(error)
        return False  # ends the tar

    with fsspec.open(shard.url, "rb") as stream:
        source = [{"url": shard.url, "stream": stream}]
        files = tar_file_expander(source, handler=stop_if_damaged, eof_value=None)
        for sample in group_by_keys(files, handler=keep_first_of_two):
            members = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
            yield RawSample(f"{shard.name}/{sample['__key__']}", members), stream.tell()
    for error in damage:
        yield RawSample(f"{shard.name}/", damage=f"damaged tar: {error.args[0]}"), shard.size
