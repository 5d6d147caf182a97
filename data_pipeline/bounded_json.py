"""JSON that anybody may have written: no text of it takes more than a few times its bytes to hold."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

PIECE = 1 << 20  # bytes or characters, read at a time
MARKS = 1 << 21  # brackets, braces and commas of one sample: each may stand for a value of 100 bytes
MANY = "it has too many values"
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)  # a whole string, or a mark
NO_SPACE = re.compile(r"[^ \t\n\r]")


def parse_json(text: bytes | str) -> Any:
    """A JSON text's value; ValueError where it is none, is nested too deep, or has too many values."""
    marks = (b"[", b"{", b",") if isinstance(text, bytes) else ("[", "{", ",")
    if len(text) > MARKS and sum(map(text.count, marks)) > MARKS:  # type: ignore[arg-type]
        raise ValueError(MANY)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def bounded_lines(stream: Any, limit: int) -> Iterator[bytes | None]:
    """The lines of a binary stream; None for each that has more than `limit` bytes."""
    read = getattr(stream, "read1", stream.read)  # of a damaged gzip, `read` loses what it had before the damage
    line, too_long = bytearray(), False
    while piece := read(PIECE):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield None if too_long or len(line) + len(end) > limit else bytes(line) + end
            line, too_long = bytearray(), False
        too_long = too_long or len(line) + len(rest) > limit
        line = bytearray() if too_long else line + rest
    if line or too_long:
        yield None if too_long else bytes(line)


class ArrayReader:
    """The entries of a JSON array of any size, of which little more than one is held.

    ValueError where it is broken, or an entry has more than `limit` characters or too many values.
    """

    def __init__(self, stream: Any, limit: int):
        self.stream, self.limit, self.utf8 = stream, limit, codecs.getincrementaldecoder("utf-8-sig")()
        self.decoder, self.text, self.at = json.JSONDecoder(), "", 0

    def __iter__(self) -> Iterator[Any]:
        self._take("[")
        if self._mark() == "]":
            return
        while True:
            yield self._value()
            if self._take(",]") == "]":
                break
        if self._mark():
            raise ValueError("there is more behind the array")

    def _more(self) -> bool:
        # As much as there is, so that an entry of many pieces is not copied again for each; within bounds.
        piece = self.stream.read(min(max(PIECE, len(self.text) - self.at), 16 * PIECE))
        self.text, self.at = self.text[self.at :] + self.utf8.decode(piece, final=not piece), 0
        return bool(piece)

    def _mark(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            if found := NO_SPACE.search(self.text, self.at):
                self.at = found.start()
                return found[0]
            self.at = len(self.text)
            if not self._more():
                return ""

    def _take(self, marks: str) -> str:
        mark = self._mark()
        if not mark or mark not in marks:
            found = f"'{mark}'" if mark else "the end"
            raise ValueError(f"{found} where {' or '.join(marks)} must stand")
        self.at += 1
        return mark

    def _value(self) -> Any:
        """The next entry, parsed once the whole of it is there."""
        self._mark()
        depth = marks = read = 0  # `read`: characters of it that were looked at
        while True:
            for token in TOKEN.finditer(self.text, self.at + read):
                mark, length = self.text[token.start()], token.end() - token.start()
                if mark == '"' and length == 1:
                    break  # a string, of which there is more to come
                marks += mark in "[{,"
                depth += (mark in "[{") - (mark in "]}")
                if marks > MARKS:
                    raise ValueError(MANY)
                if depth <= 0:  # also where a bare word ends: at the mark behind it
                    return self._parsed()
                read = token.end() - self.at
            if len(self.text) - self.at > self.limit:
                raise ValueError(f"an entry has more than read.max_bytes={self.limit} characters")
            if not self._more():
                return self._parsed()  # which says what is missing

    def _parsed(self) -> Any:
        value, self.at = self.decoder.raw_decode(self.text, self.at)
        return value
