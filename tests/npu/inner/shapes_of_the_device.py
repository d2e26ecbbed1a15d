"""What ``accelerator`` says and does where the device is an NPU: names, collectives, random state, memory."""

import os

import pytest
import torch

from megatron.core import accelerator
from megatron.core.errors import ConfigError


def test_npu_is_the_device_in_use() -> None:
    assert accelerator.device_type() == "npu"
    assert accelerator.current_device() == torch.device("npu", 0)
    assert accelerator.device_name() == os.environ["STUB_NPU_SOC"]
    assert accelerator.device_count() == int(os.environ["STUB_NPU_COUNT"])
    with pytest.raises(ConfigError, match="asks for device npu:7"):
        accelerator.set_device(7)


def test_collectives_use_hccl_whatever_the_flag_says() -> None:
    assert {accelerator.collective_backend(name) for name in (None, "nccl", "hccl")} == {"hccl"}
    assert accelerator.collective_backend("gloo") == "gloo"


def test_random_state_is_the_generator_of_the_device() -> None:
    accelerator.manual_seed(1234)
    start = accelerator.get_rng_state()
    generator = torch.npu.default_generators[0]
    assert generator.initial_seed() == 1234
    before = torch.get_rng_state()
    generator.manual_seed(99)
    accelerator.set_rng_state(start)
    assert generator.initial_seed() == 1234
    assert torch.equal(accelerator.get_rng_state(), start)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_counted() -> None:
    accelerator.reset_peak_memory()
    before = accelerator.memory_report()
    held = torch.empty(3 << 20, dtype=torch.uint8, device="npu:0")
    report = accelerator.memory_report()
    # The allocator pads.
    assert held.numel() <= report["allocated"] - before["allocated"] <= held.numel() + 1024
    del held
    after = accelerator.memory_report()
    assert after["allocated"] == before["allocated"]
    assert after["max_allocated"] >= report["allocated"] and after["reserved"] >= 3 << 20
    assert accelerator.memory_stats()["allocated_bytes.all.peak"] == after["max_allocated"]


def test_streams_and_events() -> None:
    stream = accelerator.new_stream()
    with accelerator.use_stream(stream):
        assert accelerator.current_stream() == stream
    start, end = accelerator.new_event(enable_timing=True), accelerator.new_event(enable_timing=True)
    start.record()
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) >= 0.0
