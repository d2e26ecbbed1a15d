"""JSON that is not one record a line: an array of objects, or objects printed over several lines.

The elements are rewritten as one record a line, so that everything behind the reader sees lines only.
"""

import codecs
import json
from collections.abc import Iterator
from itertools import chain

from megatron.core.errors import DataError

Chunks = Iterator[tuple[bytes, int]]
_WHITE = " \t\r\n"
_SHOWN_CHARACTERS = 60


def is_json_lines(chunks: Chunks) -> tuple[bool, Chunks]:
    """Whether the first line is a JSON value of its own and no array; and the stream from its start."""
    head, taken = b"", []
    for piece in chunks:
        taken.append(piece)
        head += piece[0]
        if b"\n" in head.lstrip():
            break
    stream = chain(taken, chunks)
    text = head.lstrip()
    if text.startswith(b"["):
        return False, stream
    try:
        json.loads(text.split(b"\n", 1)[0])
    except ValueError:
        # A line that is broken for another reason is reported by whoever reads on.
        return not text.startswith(b"{"), stream
    return True, stream


def element_lines(chunks: Chunks, path: str) -> Iterator[tuple[bytes, int]]:
    """Yield one line for each object of an array, or of a run of objects parted by white space.

    Raises:
        DataError: with the line and the element at which the text stops being JSON.
    """
    text = _Text(chunks, path)
    opener = text.peek()
    in_array = opener == "["
    if in_array:
        text.skip(1)
    while (mark := text.peek()) not in ("", "]"):
        if mark != "{":
            raise text.error(f"expected a JSON object, found {text.excerpt()!r}")
        # Raw line ends are white space here: inside a string JSON wants them escaped.
        element = text.take_object().replace("\n", " ").replace("\r", " ")
        yield element.encode("utf-8", "surrogatepass") + b"\n", text.done
        if in_array and text.peek() == ",":
            text.skip(1)
            if text.peek() == "]":
                raise text.error("a comma stands before the closing ]")
        elif in_array and text.peek() != "]":
            raise text.error(f"expected a comma or ] behind the element, found {text.excerpt()!r}")
    if in_array:
        if text.peek() != "]":
            raise text.error("the array is not closed; the file was cut short")
        text.skip(1)
    if text.peek():
        raise text.error(f"more text follows the end of the JSON value: {text.excerpt()!r}")


class _Text:
    """The decoded stream, of which only the part that is not yet used is kept."""

    def __init__(self, chunks: Chunks, path: str):
        self._chunks = chunks
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._bytes_decoded = 0
        self._line = 1
        self._element = 1
        self.done = 0

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            rest = self._text[self._at : self._at + 1]
            if rest and rest not in _WHITE:
                return rest
            if rest:
                self._line += rest == "\n"
                self._at += 1
            elif not self._read_more():
                return ""

    def skip(self, characters: int) -> None:
        self._at += characters

    def excerpt(self) -> str:
        return self._text[self._at : self._at + _SHOWN_CHARACTERS]

    def take_object(self) -> str:
        """The source text of the JSON value that begins here."""
        while True:
            try:
                _, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Reading twice as much each time keeps the parsing of one long element linear.
                behind = error.pos - self._at
                if not self._read_more(len(self._text) - self._at):
                    self._line += self._text.count("\n", self._at, self._at + behind)
                    self._at += behind
                    raise self.error(f"invalid JSON: {error.msg}, at {self.excerpt()!r}") from error
            else:
                source = self._text[self._at : end]
                self._line += source.count("\n")
                self._at = end
                self._element += 1
                return source

    def error(self, problem: str) -> DataError:
        return DataError(f"{self._path}: element {self._element} (line {self._line}): {problem}")

    def _read_more(self, at_least: int = 1) -> bool:
        self._text, self._at = self._text[self._at :], 0
        before = len(self._text)
        for chunk, done in self._chunks:
            self._text += self._decode(chunk)
            self.done = done
            if len(self._text) - before >= at_least:
                return True
        self._decode(b"", final=True)
        return len(self._text) > before

    def _decode(self, chunk: bytes, final: bool = False) -> str:
        held = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            offset = self._bytes_decoded - held + error.start
            raise DataError(
                f"{self._path}: invalid UTF-8 at byte {offset} ({error.reason}); convert the file to UTF-8"
            ) from error
        self._bytes_decoded += len(chunk)
        return text
