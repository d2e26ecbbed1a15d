"""Names kept for the scripts of others stand apart from what runs, and their page is current."""

from pathlib import Path

import public_names
from public_names import Code
from source_tree import ROOT, Module


def test_names_that_nothing_here_calls_stand_below_the_heading() -> None:
    found = public_names.misplaced()
    assert not found, f"move these below {public_names.HEADING!r}:\n" + "\n".join(found)


def test_page_is_current() -> None:
    text = (ROOT / public_names.PAGE).read_text(encoding="utf-8")
    assert text == public_names.page(), f"{public_names.WRITE}"


def test_callers_are_followed_from_what_runs(tmp_path: Path) -> None:
    """Used: by a module, in a chain from a program, by name in a string. Unused: in a chain from nowhere."""
    source = """
TABLE = {"x": in_a_table, "y": "some.module.in_a_string"}
__all__ = ["only_exported"]

def main(): first()
def first(): return Used().method()
def in_a_table(): pass
def in_a_string(): pass
def only_exported(): helper()
def helper(): pass
class Used:
    def __init__(self): self.made_in_init()
    def method(self): pass
    def made_in_init(self): pass
    def never(self): never()
class Unused:
    def method(self): pass
def never(): never()
"""
    path = tmp_path / "program.py"
    path.write_text(source)
    code = Code([], set())
    code.read(path, Module(path, tmp_path).tree.body)
    names = [each.qualified_name for each in code.unused()]
    assert names == ["only_exported", "helper", "Used.never", "Unused", "Unused.method", "never"]
