"""What the device module promises on a machine without an accelerator."""

import mmap
from types import SimpleNamespace

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


@pytest.fixture
def two_devices(monkeypatch):
    """A machine with two accelerators whose driver says what the test wants; the devices that were chosen."""
    chosen = []
    driver = SimpleNamespace(get_device_name=lambda: "Chip 7")
    accelerators = SimpleNamespace(
        device_count=lambda: 2,
        set_device_index=chosen.append,
        current_device_index=lambda: chosen[-1],
        memory_stats=lambda: {"allocated": 5},
        reset_peak_memory_stats=lambda: chosen.append("reset"),
    )
    monkeypatch.setattr(torch, "accelerator", accelerators)
    monkeypatch.setattr(accelerator, "is_accelerated", lambda: True)
    monkeypatch.setattr(accelerator, "device_type", lambda: "cuda")
    monkeypatch.setattr(accelerator, "_module", lambda: driver)
    return SimpleNamespace(chosen=chosen, driver=driver)


def test_a_process_takes_the_device_of_its_rank(two_devices):
    assert accelerator.device_count() == 2 and accelerator.device_name() == "Chip 7"
    for local_rank in (1, 0):
        assert accelerator.set_device(local_rank) == torch.device("cuda", local_rank)
    for beyond in (2, 3, -1):
        with pytest.raises(ConfigError, match=f"local rank {beyond} .* 2 are visible"):
            accelerator.set_device(beyond)
    assert two_devices.chosen == [1, 0]


def test_what_a_driver_may_say(two_devices):
    assert accelerator.architecture() == (0, 0) and accelerator.supports_bf16()
    accelerator.set_device(1)
    assert accelerator.total_memory() == 0
    two_devices.driver.get_device_capability = lambda: (9, 4)
    two_devices.driver.get_device_properties = lambda device: SimpleNamespace(total_memory=64 + device.index)
    two_devices.driver.is_bf16_supported = lambda: False
    assert accelerator.architecture() == (9, 4) and accelerator.total_memory() == 65
    assert not accelerator.supports_bf16()
    two_devices.driver.get_device_capability = lambda: None
    assert accelerator.architecture() == (0, 0)
    assert accelerator.memory_stats() == {"allocated": 5}
    accelerator.reset_peak_memory()
    assert two_devices.chosen == [1, "reset"]
    assert accelerator.draws_in_parallel(torch.device("cuda", 0)) is True


def test_cpu_reports_no_memory_figures():
    assert accelerator.architecture() == (0, 0) and accelerator.total_memory() == 0
    assert accelerator.supports_bf16() and accelerator.memory_stats() == {}
    accelerator.reset_peak_memory()


@pytest.mark.parametrize(
    ("on_meta", "on_cpu", "kind"),
    [(True, True, "meta"), (True, False, "meta"), (False, True, "cpu"), (False, False, "cuda")],
)
def test_where_parameters_are_made(on_meta, on_cpu, kind, two_devices):
    accelerator.set_device(1)
    config = SimpleNamespace(init_model_with_meta_device=on_meta, use_cpu_initialization=on_cpu)
    assert accelerator.build_device(config).type == kind


def test_streams_and_events_are_of_the_device(two_devices, monkeypatch):
    accelerator.set_device(1)
    monkeypatch.setattr(torch, "Stream", lambda device: ("stream", device.type, device.index))
    monkeypatch.setattr(torch, "Event", lambda kind, enable_timing: ("event", kind, enable_timing))
    assert accelerator.new_stream() == ("stream", "cuda", 1)
    assert accelerator.new_event(True) == ("event", "cuda", True)
    assert accelerator.new_event() == ("event", "cuda", False)


def test_a_cpu_has_no_streams():
    assert accelerator.new_stream() is None
