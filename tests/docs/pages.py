"""The pages of the documentation as text: their code blocks, links and headings, and the navigation."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START = "docs/index.md"
# Blocks in these languages are typed by a reader; others show files, output and directives.
TYPED = ("sh", "python")
_BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str


@dataclass(frozen=True)
class Page:
    """One Markdown file, by its path from the root of the project."""

    name: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        return [Block(language, text) for language, text in _BLOCK.findall(self.text)]

    @cached_property
    def prose(self) -> str:
        """The text without its fenced blocks."""
        return _BLOCK.sub("", self.text)

    @property
    def links(self) -> list[str]:
        """Targets inside this project of links and pictures: ``path``, ``path#heading`` or ``#heading``."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.prose)
        return [target for target in targets if not re.match(r"[a-z]+:", target)]

    @property
    def anchors(self) -> set[str]:
        """What links can point to in this page."""
        headings = re.findall(r"^#{1,3} (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}

    @property
    def commands(self) -> list[str]:
        """What a reader types, one entry for each line of a shell and each program in Python."""
        found = []
        for block in self.blocks:
            if block.language == "python":
                found.append(block.text)
            elif block.language == "sh":
                lines = block.text.replace("\\\n", " ").splitlines()
                found += [re.sub(r"  +", " ", re.sub(r" +# .*", "", line)) for line in lines if line.strip()]
        return found

    @property
    def toctree(self) -> list[str]:
        """Pages that this one puts into the navigation, by their paths from the root."""
        entries = []
        for block in self.blocks:
            if block.language == "{toctree}":
                lines = [line for line in block.text.splitlines() if line and not line.startswith(":")]
                entries += [f"docs/{line}.md" for line in lines if "*" not in line and line != "self"]
        return entries


def all_pages() -> list[Page]:
    """The pages of the site."""
    paths = sorted((ROOT / "docs").rglob("*.md"))
    return [Page(str(path.relative_to(ROOT))) for path in paths]


def navigation() -> set[str]:
    """Every page that can be reached from the start page."""
    reached, waiting = {START}, [START]
    while waiting:
        for name in Page(waiting.pop()).toctree:
            if name not in reached:
                reached.add(name)
                waiting.append(name)
    return reached
