"""Pytest plug-in: which test evaluates which changed expression, and running the chosen tests first.

To record, a copy of the repository has every sampled expression ``E`` replaced by ``(__seen__(17) or (E))``.
Ranks of the pool, and scripts that tests start, are other processes: all of them read the number of the
current test from one mapped file, and append what they see to another.
"""

import ast
import contextlib
import json
import mmap
import os
import struct
import time
from pathlib import Path

import pytest

FOLDER = "MUTATION_FOLDER"
CHOSEN = "MUTATION_CHOSEN"
# Stands for whatever runs outside a test: imports, and fixtures wider than a function.
NO_TEST = 0


class _Record:
    """The mapped number of the current test, and the log of what was seen."""

    def __init__(self, folder: Path) -> None:
        path = folder / "current"
        if not path.exists():
            path.write_bytes(bytes(8))
        with open(path, "r+b") as file:
            self._current = mmap.mmap(file.fileno(), 8)
        self._log = os.open(folder / "seen", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._known: set[tuple[int, int]] = set()
        self._unwritten = b""

    def set_current(self, test: int) -> None:
        struct.pack_into("q", self._current, 0, test)

    def see(self, change: int) -> None:
        pair = (change, struct.unpack_from("q", self._current, 0)[0])
        if pair not in self._known:
            self._known.add(pair)
            self._unwritten += b"%d %d\n" % pair
        if self._unwritten:
            # A test may be playing a full disk; the next expression tries again.
            with contextlib.suppress(OSError):
                os.write(self._log, self._unwritten)
                self._unwritten = b""


_records: dict[str, _Record] = {}


def _record() -> _Record:
    folder = os.environ[FOLDER]
    if folder not in _records:
        _records[folder] = _Record(Path(folder))
    return _records[folder]


def seen(change: int) -> None:
    """Note that the current test evaluates the expression of ``change``; falsy, so that ``or`` goes on."""
    if FOLDER in os.environ:
        _record().see(change)


def with_seen(source: str, expressions: dict[tuple[int, int], list[int]]) -> str:
    """``source`` with a call to ``seen`` before each expression.

    Args:
        expressions: numbers of the changes by the (start, end) of the expression in the UTF-8 text.
    """
    data = source.encode()
    inserts: list[tuple[int, int, bytes]] = []
    for (start, end), numbers in expressions.items():
        calls = " or ".join(f"__seen__({number})" for number in numbers)
        # Of expressions that start together the longer one opens first; of those that end together it
        # closes last.
        inserts.append((start, -end, f"({calls} or (".encode()))
        inserts.append((end, end - start - 10**9, b"))"))
    for place, _, text in sorted(inserts, reverse=True):
        data = data[:place] + text + data[place:]
    body = ast.parse(source).body
    first = next((s for s in body if not _must_come_first(s)), body[-1])
    lines = data.decode().splitlines(keepends=True)
    at = min([first.lineno] + [d.lineno for d in getattr(first, "decorator_list", [])]) - 1
    lines.insert(at, "from tests.mutation.evaluations import seen as __seen__\n")
    return "".join(lines)


def _must_come_first(statement: ast.stmt) -> bool:
    docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return docstring or (isinstance(statement, ast.ImportFrom) and statement.module == "__future__")


class Recorder:
    """Numbers the tests, says which one runs, and writes the table of both to ``tests.json``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: list[str] = [""]
        self._seconds: dict[str, float] = {}
        self._record = _record()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        began = time.monotonic()
        try:
            return (yield)
        finally:
            self._record.set_current(NO_TEST)
            self._seconds[item.nodeid] = time.monotonic() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        # What a wider fixture computes is every test's of its file.
        inner = struct.unpack_from("q", self._record._current, 0)[0]
        if fixturedef.scope != "function":
            self._record.set_current(self._number(str(fixturedef.baseid)))
        try:
            return (yield)
        finally:
            self._record.set_current(inner)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._record.set_current(self._number(item.nodeid))

    def _number(self, name: str) -> int:
        self._names.append(name)
        return len(self._names) - 1

    def pytest_sessionfinish(self) -> None:
        table = {"names": self._names, "seconds": self._seconds}
        (self._folder / "tests.json").write_text(json.dumps(table))


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ[FOLDER])), "evaluations of changes")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHOSEN not in os.environ:
        return
    place = {name: number for number, name in enumerate(json.loads(Path(os.environ[CHOSEN]).read_text()))}
    items[:] = sorted(items, key=lambda item: place.get(item.nodeid, len(place)))
