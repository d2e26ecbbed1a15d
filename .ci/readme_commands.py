"""Print commands of a page, one a line.

With a page alone: those that README.md opens with; fail unless there are exactly two of them. "Opens with"
means: before the second heading there are two fenced ``sh`` blocks of one line each. With a page and a
heading ("## Install"): those of the one block below that heading.
"""

import re
import sys
from pathlib import Path

FENCED_SH = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def opening_commands(readme: str) -> list[str]:
    """The two one-line commands at the top of a README.

    Raises:
        ValueError: there are not two blocks, or one has more than a line.
    """
    opening = re.split(r"^##+ ", readme, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = [block.strip() for block in FENCED_SH.findall(opening)]
    if len(blocks) != 2 or any("\n" in block for block in blocks):
        raise ValueError(f"the README must open with two sh blocks of one line each; found {blocks}")
    return blocks


def commands_below(page: str, heading: str) -> list[str]:
    """The lines of the one block between a heading and the next.

    Raises:
        ValueError: there is no such heading, or not one block below it.
    """
    sections = re.split(r"^(?=##+ )", page, flags=re.MULTILINE)
    below = "".join(section for section in sections if section.startswith(f"{heading}\n"))
    blocks = FENCED_SH.findall(below)
    if len(blocks) != 1:
        raise ValueError(f"one sh block is needed below {heading!r}; found {blocks}")
    return blocks[0].splitlines()


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    try:
        print(*(commands_below(text, sys.argv[2]) if sys.argv[2:] else opening_commands(text)), sep="\n")
    except ValueError as exc:
        sys.exit(f"error: {exc}")
