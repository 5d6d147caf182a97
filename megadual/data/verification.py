"""Hashing a shard set's files again."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from megadual.data.contents import AGAIN
from megadual.data.mds_reader import ShardSet
from megadual.errors import UserError
from megadual.run.ranks import Ranks

THREADS = 4
_ROUND = 4 * THREADS  # files of a rank between two times that ranks tell each other


def compare(files: Iterable[tuple[str, str]], sha256: Callable[[str], str]) -> Iterator[str | None]:
    """For each (name, SHA-256 that it should have), in order: what does not hold, or None."""

    def one(file: tuple[str, str]) -> str | None:
        name, expected = file
        try:
            found = sha256(name)
        except FileNotFoundError:
            return f"{name}: does not exist"
        except OSError as error:
            return f"{name}: can't be read: {error.strerror or error}"
        return None if found == expected else f"{name}: its SHA-256 is {found[:16]}..., not {expected[:16]}..."

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(one, files)


def verify(sets: Iterable[ShardSet], ranks: Ranks, beat: Callable[[], None]) -> int:
    """Hash every file of the sets on disks, each rank a share of them; returns how many files there are.

    UserError, on all ranks, names those that are not as their set says. Files out of stores were hashed when they came.
    """
    files = []
    for documents in sets:
        if documents.here:
            if unknown := [shard.file.name for shard in documents.shards if shard.file.name not in documents.hashes]:
                raise UserError(f"data.verify: '{documents.root}/index.json' has no SHA-256 of '{unknown[0]}': {AGAIN}")
            files += [(f"{documents.root}/{name}", sha256) for name, sha256 in documents.hashes.items()]
    problems: list[str] = []
    size = _ROUND * ranks.size
    with tqdm(total=len(files), desc="verify", unit="file", mininterval=1, disable=not ranks.main) as bar:
        for start in range(0, len(files), size):
            mine = files[start : start + size][ranks.rank :: ranks.size]
            found = ranks.gather([problem for problem in compare(mine, _sha256) if problem])
            problems += [problem for each in found for problem in each]
            beat()
            bar.update(len(files[start : start + size]))
    if problems:
        more = f", and {len(problems) - 1} more files are damaged" if len(problems) > 1 else ""
        raise UserError(f"data.verify: {problems[0]}{more}: {AGAIN}")
    return len(files)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
