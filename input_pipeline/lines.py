"""Files of lines read in parts: JSON Lines and plain text.

A part of a file that is not compressed is a range of its bytes, found without reading the rest: a line, or paragraph,
belongs to the part in which the one before it ends. Of a compressed file part i of n has every n-th row, and each reads
all of it. Only line feeds end lines, so that a U+2028 inside a string does not.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from input_pipeline.examples import RowError
from input_pipeline.files import File, opened, size
from input_pipeline.jsonl import parse_line
from input_pipeline.records import Position, Record, falls_to

SAMPLES = ("line", "paragraph", "document")  # what is a row of a text file
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Lines:
    """A file of JSON Lines (`sample` "json"), or of text whose rows `{"text": …}` are lines, paragraphs (what stands
    between blank lines) or the whole document; or part `index` of `count` of it."""

    file: File
    sample: str
    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        return self.file.path

    def part(self, index: int, count: int) -> "Lines":
        """Part `index` of `count`."""
        assert self.count == 1
        return replace(self, index=index, count=count)

    def where(self, number: int) -> str:
        """`row 17 of data/train.jsonl`: the line, counted from 1, so that an editor finds it."""
        return f"row {self._line(number)} of {self.file.path}"

    def read(self, position: Position | None = None) -> Iterator[Record]:
        """The rows from `position` on; `number` is a row's first line, counted from where the part begins."""
        whole = self.file.codec or self.sample == "document"
        if whole and self.sample == "document" and self.index:
            return
        with opened(self.file) as file:
            start, stop = (0, None) if whole else self._range(file)
            byte, line, row = (position["byte"], position["line"], position["row"]) if position else (start, 0, 0)
            _skip(file, byte) if self.file.codec else file.seek(byte)
            for record in self._rows(file, byte, line, row, stop):
                if not self.file.codec or falls_to(record.next["row"], index=self.index, count=self.count):
                    yield record

    def _rows(self, file: BinaryIO, byte: int, line: int, row: int, stop: int | None) -> Iterator[Record]:
        """Rows of an open file, the first of which is line `line` + 1 and begins at `byte`."""
        if self.sample == "document":
            if byte == 0 and (text := file.read()).strip():
                yield self._record(text, 1, 0, {"byte": max(len(text), 1), "line": 1, "row": 1})
            return
        held, first, begins = bytearray(), line + 1, byte  # of the paragraph so far
        while stop is None or byte < stop:
            text = file.readline()
            blank = not (text.removeprefix(codecs.BOM_UTF8) if byte == 0 else text).strip()
            byte, line = byte + len(text), line + 1
            if self.sample != "paragraph":
                if not blank:
                    row += 1
                    after = {"byte": byte, "line": line, "row": row}
                    yield self._record(text, line, byte - len(text), after)
            elif blank and held:
                row += 1
                yield self._record(bytes(held), first, begins, {"byte": byte, "line": line, "row": row})
                held.clear()
            elif not blank:
                if not held:
                    first, begins = line, byte - len(text)
                held += text
            if not text:
                return
        if held:
            yield self._record(bytes(held), first, begins, {"byte": byte, "line": line, "row": row + 1})

    def _record(self, text: bytes, line: int, byte: int, after: Position) -> Record:
        if byte == 0 and text.startswith(codecs.BOM_UTF8):
            text = text[len(codecs.BOM_UTF8) :]
        row: Any
        try:
            if self.sample == "json":
                row = parse_line(text, self.file.path, line, byte)
            else:
                row = {"text": text.decode().replace("\r\n", "\n").strip("\n")}
        except RowError:
            row = self._error(text, line, byte)  # once more, with the line of the file
        except UnicodeDecodeError as error:
            place = f"byte {byte + error.start} of the file (0x{text[error.start]:02x})"
            row = RowError(f"{self.file.path}:{self._line(line)}: {place} is not UTF-8", "encoding")
        return Record(row, line, after)

    def _error(self, text: bytes, line: int, byte: int) -> RowError:
        try:
            parse_line(text, self.file.path, self._line(line), byte)
        except RowError as error:
            return error
        raise AssertionError(f"{self.file.path}: a line that was wrong is right")

    def _line(self, number: int) -> int:
        """A line of the file from a line of this part; lines before the part are counted only when one is asked for."""
        if self.file.codec or self.count == 1 or self.sample == "document":
            return number
        with opened(self.file) as file:
            start, before = self._range(file)[0], 0
            file.seek(0)
            while start > 0 and (block := file.read(min(_BLOCK, start))):
                before, start = before + block.count(b"\n"), start - len(block)
        return before + number

    def _range(self, file: BinaryIO) -> tuple[int, int]:
        """The bytes [start, stop) of this part."""
        length = size(self.file)
        ends = [self._boundary(file, length * i // self.count, length) for i in (self.index, self.index + 1)]
        return ends[0], ends[1]

    def _boundary(self, file: BinaryIO, target: int, length: int) -> int:
        """Where the first row begins after the line that holds the byte before `target`."""
        if target in (0, length):
            return target
        file.seek(target - 1)
        file.readline()
        if self.sample == "paragraph":
            while (text := file.readline()).strip():
                pass
            if not text:
                return length
        return min(file.tell(), length)


def _skip(file: BinaryIO, count: int) -> None:
    """Read so many bytes: what is unpacked cannot be leapt over."""
    while count > 0 and (block := file.read(min(_BLOCK, count))):
        count -= len(block)
