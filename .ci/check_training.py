"""Check the log of a first training run: it learned, saved, and showed a sample, in few lines.

Learned means: the last validation loss is at least 2 nats under ln(vocabulary), which is the loss of a
model that knows nothing. Few lines are those that a person reads on the way to the sample.
"""

import math
import re
import sys
from pathlib import Path

MOST_LINES = 120
LOG_LINES = {
    "vocabulary": r"padded vocab \(size: (\d+)\)",
    "validation loss": r"validation loss at .* on validation set \| lm loss value: (\S+)",
    "saved checkpoint": r"launch: checkpoint: (\S+)",
    "sample": r"^(def .*)$",
}


def main(log: str) -> None:
    found = {name: re.findall(pattern, log, re.MULTILINE) for name, pattern in LOG_LINES.items()}
    missing = [name for name, hits in found.items() if not hits]
    if missing:
        sys.exit(f"error: the training log shows no {', no '.join(missing)}")
    loss, ceiling = float(found["validation loss"][-1]), math.log(int(found["vocabulary"][-1])) - 2
    lines = log[: log.index("launch: sample: ")].count("\n")
    if lines > MOST_LINES:
        sys.exit(f"error: {lines} lines before the sample, more than {MOST_LINES}")
    verdict = "under" if loss <= ceiling else "NOT under"
    print(f"{lines} lines before the sample (at most {MOST_LINES})")
    print(f"validation loss {loss:.3f} is {verdict} ln(vocabulary) - 2 = {ceiling:.3f}")
    sys.exit(loss > ceiling)


if __name__ == "__main__":
    main(Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace"))
