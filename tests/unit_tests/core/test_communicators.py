"""What carries which tensors in a group, and what a device's package hears when groups are made."""

import sys
import types

import pytest
import torch
import torch.distributed as dist

from megatron.core import accelerator, parallel_state, process_groups
from megatron.core.parallel_state.groups import GROUP_AXES, GROUP_LABELS
from tests.distributed.pool import run_ranks


def heard(sizes: dict[str, int], **layout: int) -> list[tuple[tuple[str, ...], dict[str, int]]]:
    """Calls that a device's package gets for the groups of this rank."""
    calls = []
    original = accelerator.companion
    chooser = lambda labels, buffers_mb: calls.append((labels, dict(buffers_mb)))  # noqa: E731
    accelerator.companion = {"communicator_options": chooser}.get
    try:
        parallel_state.initialize_model_parallel(**layout, communicator_buffers_mb=sizes)
    finally:
        accelerator.companion = original
    return calls


def test_every_use_of_a_shared_group_is_announced_before_it_is_made() -> None:
    """Of two tensor-parallel ranks the groups mp and tp are one, and it must suit tp, which comes later."""
    for calls in run_ranks(2, heard, {"tp": 7}, tensor_model_parallel_size=2):
        assert all(sizes == {"tp": 7} for _, sizes in calls)
        labels = [set(labels) for labels, _ in calls]
        assert {"mp", "tp", "tp_dp", "tp_cp", "tp_dp_cp", "ep_tp", "tp_ep_mp", "tp_ep_pp"} in labels
        assert {"dp", "dp_cp", "cp", "pp", "intra_dp_cp", "embd", "pos_embd", "ep", "ep_dp"} in labels
        assert len(labels) == 2


def test_groups_that_differ_are_asked_for_one_by_one() -> None:
    first, last = run_ranks(2, heard, {}, pipeline_model_parallel_size=2)
    assert {("embd" in labels, "pp" in labels) for labels, _ in first} == {(True, True), (False, False)}
    assert any("pos_embd" in labels for labels, _ in first)
    assert not any("pos_embd" in labels for labels, _ in last)


def test_labels_are_those_of_the_groups() -> None:
    assert {label for _, _, label in GROUP_AXES.values()} < GROUP_LABELS


def routes() -> tuple:
    return process_groups.backends(), process_groups.device_backend(), process_groups.message_device()


def test_a_gloo_world_carries_host_tensors() -> None:
    for carried, own, device in run_ranks(2, routes):
        assert carried["cpu"] == own == "gloo"
        assert device == torch.device("cpu")


@pytest.mark.parametrize(
    ("backend", "own", "messages"),
    [("hccl", "hccl", "npu:3"), ("cpu:gloo,npu:hccl", "hccl", "cpu"), ("npu:hccl,cpu:gloo", "hccl", "cpu")],
)
def test_messages_go_through_host_memory_where_they_can(monkeypatch, backend, own, messages) -> None:
    configured = {"hccl": "npu:hccl"}.get(backend, backend)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: configured)
    monkeypatch.setattr(accelerator, "device_type", lambda: "npu")
    monkeypatch.setattr(accelerator, "current_device", lambda: messages)
    assert process_groups.device_backend() == own
    assert str(process_groups.message_device()) == messages


@pytest.mark.parametrize(
    ("requested", "gloo_too", "given"),
    [
        ("nccl", True, "cpu:gloo,cuda:nccl"),
        (None, True, "cpu:gloo,cuda:nccl"),
        ("nccl", False, "nccl"),
        ("gloo", True, "gloo"),
        ("fake", True, "fake"),
    ],
)
def test_gloo_stands_beside_the_backend_of_an_accelerator(monkeypatch, requested, gloo_too, given) -> None:
    monkeypatch.setattr(accelerator, "device_type", lambda: "cuda")
    assert accelerator.world_backend(requested, gloo_too) == given


def test_a_cpu_needs_no_second_backend() -> None:
    assert accelerator.world_backend("nccl") == "gloo"


def test_a_package_offers_what_it_has(monkeypatch) -> None:
    assert accelerator.companion("communicator_options") is None  # no megatron_cpu
    package = types.ModuleType("megatron_cpu")
    package.__spec__ = types.SimpleNamespace()
    package.answer = lambda: 42
    monkeypatch.setitem(sys.modules, "megatron_cpu", package)
    assert accelerator.companion("answer")() == 42
    assert accelerator.companion("question") is None
