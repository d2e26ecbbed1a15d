"""Print the commands that README.md opens with, one a line; fail unless there are exactly two of them.

"Opens with" means: before the second heading there are two fenced ``sh`` blocks of one line each.
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


if __name__ == "__main__":
    try:
        print(*opening_commands(Path(sys.argv[1]).read_text(encoding="utf-8")), sep="\n")
    except ValueError as exc:
        sys.exit(f"error: {exc}")
