"""The rows of a parquet file, decoded in a process of their own whose memory is bounded.

What a file says of its sizes need not be so, and a few of its bytes become any number of values: a dictionary's entry
that is repeated, nulls of a list, shared prefixes. Arrow takes the memory that they need, or crashes; only the system
can say no. Here that costs the rows and not the worker: `read_rows` is called in that, and `_serve` runs in the other
process, which has a pipe and nothing else. It is started by this file's path, so nothing of the project is imported.
"""

import contextlib
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, BinaryIO

ROWS = 64  # decoded at a time, where they are small
COLUMNS = 4096  # of a file, at most
EXPANSION = 32  # times its bytes in the file are what a column of a row group may honestly be
PIECE = 1 << 20  # bytes read at a time
# Memory for decoding is that many times `limit`: a page, compressed and not, its array, which grows by doubling, its
# values in Python, and pickled. And some for what is always there.
COPIES = 8
ROOM = 1 << 26

Row = tuple[int, dict[str, Any] | str]  # its number, and its columns' values or why it can't be read


class Unreadable(Exception):
    """The rest of the file can't be decoded; the message says why."""


def read_rows(stream: BinaryIO, size: int, limit: int) -> Iterator[tuple[Row, float]]:
    """The rows of the file `stream` of `size` bytes in order, each with the share of them that is read.

    A row group that takes more than COPIES times `limit` bytes to decode gives a row that says so. Unreadable where the
    file is damaged; errors of `stream` are raised as they are.
    """
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, *map(str, (theirs.fileno(), size, limit))],
        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"},
        process_group=0,  # a terminal's Ctrl-C is for the worker; without that one it ends by itself
    )  # fmt: skip
    theirs.close()
    try:
        while (said := _next(ours, process, limit)) is not None:
            what, *values = said
            if what == "row":
                yield values[0], values[1]
            elif what == "damage":
                raise Unreadable(values[0])
            else:
                stream.seek(values[0])
                ours.send_bytes(stream.read(values[1]))
    finally:
        ours.close()
        process.kill()
        process.wait()


def _next(connection: Connection, process: subprocess.Popen, limit: int) -> tuple | None:
    """What the process says next, None at the end."""
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise Unreadable(
            f"its decoder, which may take {_room(limit) >> 20} MiB for read.max_bytes={limit}, died with "
            f"exit code {process.wait()}"
        ) from error


def _room(limit: int) -> int:
    """Bytes that decoding may take."""
    return COPIES * limit + ROOM


class _Asked(io.RawIOBase):
    """The file, whose bytes the other process reads."""

    def __init__(self, connection: Connection, size: int):
        self.connection, self.size, self.position = connection, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def read(self, count: int = -1) -> bytes:
        """As many bytes as are asked for, or as are left."""
        left = max(0, self.size - self.position)
        left = left if count < 0 else min(count, left)
        pieces = []
        while left:
            self.connection.send(("read", self.position, min(left, PIECE)))
            if not (piece := self.connection.recv_bytes()):
                break  # the file is shorter than it was
            pieces.append(piece)
            self.position += len(piece)
            left -= len(piece)
        return b"".join(pieces)


def _serve(connection: Connection, size: int, limit: int) -> None:
    """Send the rows of the file, then its damage or None."""
    from pyarrow.parquet import ParquetFile

    _confine(_room(limit))
    done = 0
    try:
        # Buffered, so that a row group of any size is not read whole.
        file = ParquetFile(_Asked(connection, size), pre_buffer=False, buffer_size=PIECE)
        rows = max(file.metadata.num_rows, 1)
        if file.metadata.num_columns > COLUMNS:
            connection.send(("damage", f"it has {file.metadata.num_columns} columns, more than {COLUMNS}"))
            return
        for number in range(file.num_row_groups):
            group, begun = file.metadata.row_group(number), done
            problem = _refused(group, limit)
            try:
                for row in () if problem else _rows(file, number, limit):
                    done += 1
                    connection.send(("row", (done - 1, row), min(done / rows, 1.0)))
                problem = problem or _contradiction(group, done - begun)
            except MemoryError:
                problem = (
                    f"is refused: it says to be {group.total_byte_size} bytes, and takes more than "
                    f"{_room(limit) >> 20} MiB to decode, {COPIES} times read.max_bytes={limit}"
                )
            if problem:
                damage = f"row group {number} with its {group.num_rows} rows {problem}"
                connection.send(("row", (done, damage), min(done / rows, 1.0)))
                done = begun + group.num_rows
        connection.send(None)
    except Exception as error:  # of Arrow, and of values that no pickle holds
        told = str(error) or f"{type(error).__name__}, of what may take {_room(limit) >> 20} MiB"
        connection.send(("damage", f"damaged parquet after {done} rows: {told}"))


def _confine(room: int) -> None:
    """Let this process take so many bytes more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # others have no such bound
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = min(taken + room, sys.maxsize if hard == resource.RLIM_INFINITY else hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _refused(group, limit: int) -> str:
    """Why a row group is not decoded, by what the file says of it; empty where it is."""
    columns = [group.column(i) for i in range(group.num_columns)]
    stored = sum(column.total_compressed_size for column in columns)
    size = sum(column.total_uncompressed_size for column in columns)
    expands = sum(max(0, each.total_uncompressed_size - EXPANSION * each.total_compressed_size) for each in columns)
    if expands > limit:
        return f"is refused: its {stored} bytes become {size}, and read.max_bytes={limit}"
    if size > limit * group.num_rows:
        return f"is refused: {size} bytes, for each row more than read.max_bytes={limit}"
    return ""


def _contradiction(group, read: int) -> str:
    """What tells that not all rows of a row group were read; empty where nothing does."""
    counts = {"its data": read} | {
        f"column '{column.path_in_schema}'": column.num_values
        for column in map(group.column, range(group.num_columns))
        if "." not in column.path_in_schema  # of lists, each entry is a value
    }
    return next((f"is damaged: {what} has {count}" for what, count in counts.items() if count != group.num_rows), "")


def _rows(file, number: int, limit: int) -> Iterator[dict[str, Any] | str]:
    """The rows of a row group."""
    group = file.metadata.row_group(number)
    # A page that all rows share is repeated in each: the larger, the fewer at a time.
    largest = max((group.column(i).total_uncompressed_size for i in range(group.num_columns)), default=0)
    rows = max(1, min(ROWS, limit // max(largest, 1)))
    for batch in file.iter_batches(rows, row_groups=[number], use_threads=False):
        yield from _values(batch)


def _values(batch) -> Iterator[dict[str, Any] | str]:
    """The rows, or why one has no values in Python: text that isn't UTF-8, a date beyond the calendar ..."""
    try:
        yield from batch.to_pylist()
        return
    except MemoryError:
        raise
    except Exception:  # of whatever conversion
        pass
    for number in range(batch.num_rows):
        try:
            (row,) = batch.slice(number, 1).to_pylist()
        except MemoryError:
            raise
        except Exception as error:
            row = f"the row has a value that can't be read: {error}"
        yield row


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody wants more
        descriptor, of, most = map(int, sys.argv[1:])
        _serve(Connection(descriptor), of, most)
