"""Progress lines in Megatron's wording."""

import sys
import time

_MIB = 1024 * 1024


class Progress:
    """Prints a line to stderr each time another ``interval`` documents are done.

    Args:
        interval: documents between two lines.
        total_bytes: size of all inputs on disk; 0 when it is not known (a pipe).

    Attributes:
        documents: done so far.
        bytes_done: their records, uncompressed.
    """

    def __init__(self, interval: int, total_bytes: int):
        self._interval = interval
        self._total_bytes = total_bytes
        self._started = time.monotonic()
        self.documents = 0
        self.bytes_done = 0

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def advance(self, documents: int, size_bytes: int, bytes_read: int) -> None:
        """Note further documents, the size of their records, and how much of the inputs is read by now."""
        due = self.documents - self.documents % self._interval + self._interval
        self.documents += documents
        self.bytes_done += size_bytes
        seconds = self.seconds
        rates = f"{self.documents / seconds:.1f} docs/s, {self.bytes_done / seconds / _MIB:.1f} MB/s"
        for count in range(due, self.documents + 1, self._interval):
            print(f"Processed {count} documents ({rates}).{self._left(seconds, bytes_read)}", file=sys.stderr)
        if due <= self.documents:
            sys.stderr.flush()

    def _left(self, seconds: float, bytes_read: int) -> str:
        if not self._total_bytes or not bytes_read:
            return ""
        share = min(1.0, bytes_read / self._total_bytes)
        left = int(seconds / share - seconds)
        return f" {share:.0%} done, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
