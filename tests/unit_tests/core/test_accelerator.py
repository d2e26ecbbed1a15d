"""What the device module promises on a machine without an accelerator."""

import mmap

import pytest
import torch

from megatron.core import accelerator
from megatron.core.errors import ConfigError


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("MEGATRON_DEVICE", "cpu")


def test_device():
    assert accelerator.device_type() == "cpu"
    assert not accelerator.is_accelerated()
    assert accelerator.current_device() == torch.device("cpu")
    assert accelerator.set_device(5) == torch.device("cpu")
    assert accelerator.device_count() == 1
    assert accelerator.device_name()
    assert accelerator.draws_in_parallel(torch.device("cpu")) is False
    accelerator.synchronize()
    accelerator.empty_cache()


def test_unknown_device(monkeypatch):
    monkeypatch.setenv("MEGATRON_DEVICE", "abacus")
    with pytest.raises(ConfigError, match="MEGATRON_DEVICE=abacus"):
        accelerator.device_type()


@pytest.mark.parametrize(
    ("requested", "given"),
    [(None, "gloo"), ("nccl", "gloo"), ("HCCL", "gloo"), ("gloo", "gloo"), ("ucc", "ucc"), ("fake", "fake")],
)
def test_collective_backend(requested, given):
    assert accelerator.collective_backend(requested) == given


def test_memory():
    report = accelerator.memory_report()
    assert report.keys() == {"allocated", "max_allocated", "reserved", "max_reserved"}
    # Pages of its own: a tensor could take memory that earlier tests gave back to the allocator.
    with mmap.mmap(-1, 64 << 20) as ballast:
        ballast.write(bytes(64 << 20))
        after = accelerator.memory_report()
    assert after["allocated"] >= report["allocated"] + (32 << 20)
    assert after["max_allocated"] >= after["allocated"]
    assert accelerator.memory_stats() == {}


def test_random_state():
    accelerator.manual_seed(9)
    state = accelerator.get_rng_state()
    first = torch.rand(3)
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(9)))


def test_events_measure_host_time():
    first, last = accelerator.new_event(True), accelerator.new_event(True)
    first.record()
    sum(range(100_000))
    last.record()
    assert last.query()
    assert 0 < first.elapsed_time(last) < 10_000
    with accelerator.use_stream(accelerator.new_stream()):
        assert accelerator.current_stream() is None


def test_matmul_dtype(monkeypatch):
    monkeypatch.setattr(accelerator, "_cpu_matmul_dtypes", lambda: {torch.float16: torch.float32})
    cpu, elsewhere = torch.device("cpu"), torch.device("meta")
    assert accelerator.matmul_compute_dtype(torch.float16, cpu) is torch.float32
    assert accelerator.matmul_compute_dtype(torch.float16) is torch.float32
    assert accelerator.matmul_compute_dtype(torch.bfloat16, cpu) is torch.bfloat16
    assert accelerator.matmul_compute_dtype(torch.float16, elsewhere) is torch.float16
    assert accelerator.matmul_compute_dtype(torch.float64, cpu) is torch.float64


def test_dtypes_without_native_support_are_the_slow_ones():
    slow = accelerator._cpu_matmul_dtypes()
    assert set(slow.values()) <= {torch.float32}
    assert torch.float32 not in slow
