"""Joining the world: what must be set before a device is touched."""

import os
from argparse import Namespace

import pytest
import torch

from megatron.core import accelerator
from megatron.training import initialize

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.fixture
def seen_by_the_driver(monkeypatch):
    """A function that joins with some sizes; returns the variable as the device's driver would read it."""
    seen = []
    monkeypatch.setattr(accelerator, "set_device", lambda rank: seen.append(os.environ.get(VARIABLE)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def join(backend: str, tensor: int = 1, context: int = 1, given: str | None = None, rank: int = 0):
        monkeypatch.setattr(accelerator, "collective_backend", lambda requested: backend)
        monkeypatch.delenv(VARIABLE, raising=False)
        if given is not None:
            monkeypatch.setenv(VARIABLE, given)
        else:  # so that what is set by the code is removed again
            monkeypatch.setenv(VARIABLE, "")
            monkeypatch.delenv(VARIABLE)
        args = Namespace(
            rank=rank,
            local_rank=0,
            distributed_backend=None,
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            bf16=False,
        )
        initialize._join_world(args)
        return seen[-1]

    return join


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"context": 2}])
def test_split_layers_get_one_hardware_queue_under_nccl(seen_by_the_driver, sizes):
    assert seen_by_the_driver("nccl", **sizes) == "1"
    assert seen_by_the_driver("hccl", **sizes) is None


def test_layers_without_tensor_parallelism_keep_the_default(seen_by_the_driver):
    assert seen_by_the_driver("nccl") is None


def test_a_value_set_by_the_user_is_kept_and_named_once(seen_by_the_driver, capsys):
    for rank in (0, 1):
        assert seen_by_the_driver("nccl", tensor=2, given="8", rank=rank) == "8"
    assert capsys.readouterr().out.count(f"{VARIABLE}=8") == 1
