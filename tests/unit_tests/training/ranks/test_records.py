"""Records in a store: liveness, two processes of one rank, and what a stack says."""

import ast
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.training.ranks import places
from megatron.training.ranks.beats import Beats

MEGATRON = Path(places.__file__).resolve().parents[2]


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def test_a_record_is_read_as_it_was_written(store: dist.Store):
    ranks = [Beats(store, rank, 2) for rank in range(2)]
    place = places.Place("iteration 3", "all_reduce at a.py:1 (f)", True)
    assert ranks[0].read_all([0, 1]) == [None, None]
    assert ranks[1].write(place=place, joined="abc") is None
    assert ranks[0].read_all([0, 1]) == [None, ranks[1].own]
    found = ranks[0].read(1)
    assert (found.place, found.joined, found.number, found.world_size) == (place, "abc", 1, 2)
    assert found.process.condition() == "runs"


def test_a_record_of_an_earlier_attempt_is_taken_over(store: dist.Store):
    earlier, later, reader = (Beats(store, 0, 2) for _ in range(3))
    for _ in range(3):
        earlier.write()
    assert [later.write() for _ in range(5)] == [None] * 5
    assert reader.read(0) == later.own


def test_two_processes_of_one_rank_are_both_noticed(store: dist.Store):
    first, second = Beats(store, 1, 2), Beats(store, 1, 2)
    found = {first: None, second: None}
    for _ in range(4):
        for beats in found:
            found[beats] = found[beats] or beats.write()
    assert found[first].nonce == second.own.nonce and found[second].nonce == first.own.nonce


@pytest.mark.parametrize("text", ["-", "{}", "[1]", '{"nonce": 1}', "no json"])
def test_other_texts_are_no_records(text: str, store: dist.Store):
    store.set("beat_0", text)
    assert Beats(store, 1, 2).read(0) is None


def _stack_in(function_name: str, module: str):
    """Frames of a call of a function of that name in a module of that name."""
    frames = []

    def note():
        frame = sys._getframe(1)
        while frame is not None:
            frames.append((frame, frame.f_lineno))
            frame = frame.f_back

    scope = {"__name__": module, "note": note}
    exec(compile(f"def {function_name}():\n    note()\n", "/x/megatron/some/file.py", "exec"), scope)
    scope[function_name]()
    return frames[::-1]


@pytest.mark.parametrize(
    ("function", "iteration", "phase"),
    [
        ("train_step", 11, "iteration 12"),
        ("evaluate", 3, "an evaluation after iteration 4"),
        ("save_checkpoint", 3, "saving a checkpoint after iteration 4"),
        ("_load_or_build_index", None, "building the index of a data set"),
        ("anything", 4, ""),
    ],
)
def test_the_stack_tells_the_phase(function: str, iteration: int | None, phase: str):
    place = places.of_frames(_stack_in(function, "megatron.some.file"), iteration, detail=False)
    assert place == places.Place(phase, f"megatron/some/file.py:2 ({function})", False)
    outside = places.of_frames(_stack_in(function, "users"), iteration, detail=False)
    assert outside.phase == "" and outside.call == f"file.py:2 ({function})"


def test_every_phase_is_a_function_of_the_package():
    functions = {
        node.name
        for path in MEGATRON.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(places.PHASES) <= functions
    assert set(places.LONG_PHASES) <= set(places.PHASES.values())


def test_a_message_that_fails_is_told_from_an_error_of_the_program():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(Exception) as message:
            dist.broadcast(torch.ones(2, 3), src=5)
        place = places.of_traceback(message.value.__traceback__, 1, detail=True)
    finally:
        dist.destroy_process_group()
    assert place.waits and place.call.startswith("broadcast of float32[2, 3] at test_records.py:")
    closed = RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert places.raised_by_a_message(closed)
    assert not places.raised_by_a_message(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not places.raised_by_a_message(ValueError("anything"))
