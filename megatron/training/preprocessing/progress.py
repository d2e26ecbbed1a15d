"""Progress lines in Megatron's wording."""

import sys
import time

_MIB = 1024 * 1024


class Progress:
    """Prints a line to stderr each time another ``interval`` documents are done.

    Args:
        interval: documents between two lines.
        total_bytes: size of all inputs on disk; 0 when it is not known (a pipe).
    """

    def __init__(self, interval: int, total_bytes: int):
        self._interval = interval
        self._total_bytes = total_bytes
        self._started = time.monotonic()
        self.documents = 0
        self.bytes_used = 0

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def advance(self, documents: int, bytes_used: int) -> None:
        """Note further documents, and how many bytes of the inputs have been used up so far."""
        due = self.documents - self.documents % self._interval + self._interval
        self.documents += documents
        self.bytes_used = bytes_used
        seconds = self.seconds
        rates = f"{self.documents / seconds} docs/s, {bytes_used / seconds / _MIB} MB/s"
        for count in range(due, self.documents + 1, self._interval):
            print(f"Processed {count} documents ({rates}).{self._left(seconds)}", file=sys.stderr)
        if due <= self.documents:
            sys.stderr.flush()

    def _left(self, seconds: float) -> str:
        if not self._total_bytes or not self.bytes_used:
            return ""
        share = min(1.0, self.bytes_used / self._total_bytes)
        left = int(seconds / share - seconds)
        return f" {share:.0%} done, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
