"""Heartbeats in a store, two processes with one rank, and what a stack shows."""

import ast
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.training.ranks import stack_location
from megatron.training.ranks.heartbeat import HeartbeatTable
from megatron.training.ranks.stack_location import StackLocation

MEGATRON = Path(stack_location.__file__).resolve().parents[2]


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def test_heartbeats_read_back_equal(store: dist.Store):
    ranks = [HeartbeatTable(store, rank, 2) for rank in range(2)]
    location = StackLocation("iteration 3", "all_reduce at a.py:1 (f)", True)
    assert ranks[0].read_all([0, 1]) == [None, None]
    assert ranks[1].write(location=location, joined="abc") is None
    assert ranks[0].read_all([0, 1]) == [None, ranks[1].own]
    found = ranks[0].read(1)
    assert (found.location, found.joined, found.number, found.world_size) == (location, "abc", 1, 2)
    assert found.process.condition() == "runs"


def test_a_restarted_rank_replaces_the_heartbeat_of_an_earlier_attempt(store: dist.Store):
    earlier, later, reader = (HeartbeatTable(store, 0, 2) for _ in range(3))
    for _ in range(3):
        earlier.write()
    assert [later.write() for _ in range(5)] == [None] * 5
    assert reader.read(0) == later.own


def test_two_processes_with_one_rank_each_detect_the_other(store: dist.Store):
    first, second = HeartbeatTable(store, 1, 2), HeartbeatTable(store, 1, 2)
    found = {first: None, second: None}
    for _ in range(4):
        for beats, other in found.items():
            found[beats] = other or beats.write()
    assert found[first].nonce == second.own.nonce and found[second].nonce == first.own.nonce


@pytest.mark.parametrize("text", ["-", "{}", "[1]", '{"nonce": 1}', "no json"])
def test_texts_that_are_no_heartbeat_read_as_none(text: str, store: dist.Store):
    store.set("heartbeat_0", text)
    assert HeartbeatTable(store, 1, 2).read(0) is None


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
def test_phase_follows_from_function_names_of_the_package(function: str, iteration: int | None, phase: str):
    location = stack_location.frames_location(
        _stack_in(function, "megatron.some.file"), iteration, detail=False
    )
    assert location == StackLocation(phase, f"megatron/some/file.py:2 ({function})", False)
    outside = stack_location.frames_location(_stack_in(function, "users"), iteration, detail=False)
    assert outside.phase == "" and outside.call == f"file.py:2 ({function})"


def test_every_phase_names_a_function_of_the_package():
    functions = {
        node.name
        for path in MEGATRON.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(stack_location.PHASES) <= functions
    assert set(stack_location.LONG_PHASES) <= set(stack_location.PHASES.values())


def test_communication_errors_are_distinguished_from_program_errors():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(Exception) as failed:
            dist.broadcast(torch.ones(2, 3), src=5)
        location = stack_location.traceback_location(failed.value.__traceback__, 1, detail=True)
    finally:
        dist.destroy_process_group()
    assert location.waits and location.call.startswith("broadcast of float32[2, 3] at test_heartbeat.py:")
    closed = RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert stack_location.raised_by_communication(closed)
    assert not stack_location.raised_by_communication(
        RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    )
    assert not stack_location.raised_by_communication(ValueError("anything"))
