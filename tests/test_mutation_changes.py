"""Single-point changes: which there are, that each is one, and that recording changes nothing."""

import ast
import json

import pytest

from tests.mutation import evaluations, sample
from tests.mutation.changes import changes_of

SOURCE = '''"""Docstring with 1 < 2."""

from __future__ import annotations

LIMIT: int = 3
__all__ = ["f", "g"]


class C:
    on: bool = True

    def f(self, x, y=0.5):
        """1 + 1"""
        if x < y and not self.on:
            raise ValueError(f"{x + 1} of {2}")
        total = x[-1:] + y * 2 if x else "a" + "é" * 3
        warnings.warn("more than 4" if x > 4 else "less")
        return [v for v in total if v is not None]
'''


def test_changes_are_exactly_those_of_every_kind():
    found = {(change.before, change.after) for change in changes_of("a.py", SOURCE)}
    assert found == {
        ("3", "4"), ("3", "2"), ("True", "False"), ("0.5", "1.0"),
        ("x < y", "x <= y"), ("x < y", "x >= y"), ("x < y and not self.on", "x < y or not self.on"),
        ("not self.on", "self.on"), ("-1", "1"), ("1", "2"), ("1", "0"), ("2", "3"), ("2", "1"),
        ("x[-1:] + y * 2", "x[-1:] - y * 2"), ("y * 2", "y // 2"), ("x", "not (x)"),
        ("v is not None", "v is None"),
    }  # fmt: skip


def test_each_change_is_in_one_place():
    original = ast.dump(ast.parse(SOURCE))
    for change in changes_of("a.py", SOURCE):
        text = change.apply(SOURCE).encode()
        assert ast.dump(ast.parse(text)) != original
        assert text[: change.start] == SOURCE.encode()[: change.start]
        assert text.endswith(SOURCE.encode()[change.end :])
        assert SOURCE.encode()[change.start : change.end].decode() == change.before
        assert SOURCE.splitlines()[change.line - 1].strip() == change.code
    changes = changes_of("a.py", SOURCE)
    assert len({change.key for change in changes}) == len(changes)
    assert {change.scope for change in changes} == {"", "C", "C.f"}


def test_keys_stay_when_lines_move():
    moved = SOURCE.replace("class C:", "# one more\n\n\nclass C:")
    assert [c.key for c in changes_of("a.py", moved)] == [c.key for c in changes_of("a.py", SOURCE)]


CODE = '''"""Docstring."""

from __future__ import annotations


def f(a, b=2):
    if a > 1 and not b == 3:
        return [x * 2 for x in range(a) if x]
    return -a + b * 3
'''


def test_recording_changes_no_result_and_sees_what_is_evaluated(tmp_path, monkeypatch):
    changes = changes_of("a.py", CODE)
    expressions: dict[tuple[int, int], list[int]] = {}
    for number, change in enumerate(changes):
        expressions.setdefault((change.start, change.end), []).append(number)
    plain, recorded = {}, {}
    exec(compile(CODE, "a.py", "exec", dont_inherit=True), plain)
    monkeypatch.setenv(evaluations.FOLDER, str(tmp_path))
    exec(compile(evaluations.with_seen(CODE, expressions), "a.py", "exec", dont_inherit=True), recorded)
    (tmp_path / "seen").write_text("")
    assert recorded["f"](0) == plain["f"](0)
    first = {changes[int(line.split()[0])].before for line in (tmp_path / "seen").read_text().splitlines()}
    assert first == {"a > 1", "1", "a > 1 and not b == 3", "-a", "b * 3", "3", "-a + b * 3"}
    for a, b in ((3, 2), (3, 3), (5, 0)):
        assert recorded["f"](a, b) == plain["f"](a, b)
    again = {changes[int(line.split()[0])].before for line in (tmp_path / "seen").read_text().splitlines()}
    assert again == {change.before for change in changes}


def test_tests_that_evaluate_a_change_come_first_and_quickest(tmp_path):
    (change, *_) = changes_of("megatron/core/fusions/fused_softmax.py", CODE)
    room = "tests/unit_tests/fusions"
    seconds = {
        f"{room}/test_a.py::slow": 3.0, f"{room}/test_a.py::other": 0.1, f"{room}/test_b.py::quick": 0.2,
        f"{room}/test_c.py::unrelated": 0.1, "tests/unit_tests/core/test_d.py::elsewhere": 0.1,
    }  # fmt: skip
    names = [f"{room}/test_a.py::slow", f"{room}/test_b.py::quick"]
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"tests": {change.key: names}, "seconds": seconds}))
    assert sample.room_of(change.path)[0] == room
    order = sample.Evaluations(record).order(change, (room,))
    assert order == [f"{room}/test_b.py::quick", f"{room}/test_a.py::slow", f"{room}/test_a.py::other"]
    record.write_text(json.dumps({"tests": {change.key: [""]}, "seconds": seconds}))  # on import
    assert len(sample.Evaluations(record).order(change, (room,))) == 4
    record.write_text(json.dumps({"tests": {change.key: []}, "seconds": seconds}))
    assert sample.Evaluations(record).order(change, (room,)) == []


@pytest.mark.parametrize(
    ("path", "rooms"),
    [
        ("megatron/core/timers.py", ("core",)),
        ("megatron/core/utils/tensors.py", ("core",)),
        ("megatron/core/datasets/indexed_dataset/layout.py", ("datasets",)),
        ("megatron/core/extensions/transformer_engine.py", ("tensor_parallel", "transformer")),
    ],
)
def test_tests_of_a_file_are_found(path, rooms):
    names = (*rooms, "test_private_names.py", "test_private_names_of_data.py")
    assert sample.room_of(path) == tuple(f"tests/unit_tests/{name}" for name in names)
    assert all((sample.ROOT / name).exists() for name in sample.room_of(path))
