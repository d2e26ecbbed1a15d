"""The pool of ranks: results in order, failures with every traceback, nothing left behind."""

import gc
import logging
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.core import overrides, parallel_state, rerun_state_machine, tensor_parallel
from megatron.core.num_microbatches_calculator import get_num_microbatches, init_num_microbatches_calculator
from megatron.core.tensor_parallel import deferred_gradients
from megatron.core.utils.straggler import StragglerDetector
from megatron.training import checkpointing, global_vars
from tests.distributed import pool
from tests.distributed.pool import run_ranks


def rank_and_sum(offset, scale=1):
    value = torch.tensor(scale * (dist.get_rank() + offset))
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), int(value)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_results_come_in_the_order_of_ranks(world_size):
    expected = 10 * sum(range(1, world_size + 1))
    results = run_ranks(world_size, rank_and_sum, 1, scale=10)
    assert results == [(rank, world_size, expected) for rank in range(world_size)]


def tensor_of_rank(value):
    return {
        "value": value * dist.get_rank(),
        "environment": {n: os.environ[n] for n in ("RANK", "WORLD_SIZE")},
    }


def test_tensors_travel_by_value_and_the_environment_names_the_rank():
    results = run_ranks(2, tensor_of_rank, torch.arange(3.0))
    assert torch.equal(results[1]["value"], torch.arange(3.0))
    assert results[1]["environment"] == {"RANK": "1", "WORLD_SIZE": "2"}


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("the cause")
    dist.barrier()


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(17)
    dist.barrier()


def hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(1000)


def process_id():
    return os.getpid()


def test_a_failure_shows_every_traceback_and_the_workers_go_on():
    before = run_ranks(4, process_id)
    with pytest.raises(AssertionError) as failure:
        run_ranks(4, fail_on, 2)
    text = str(failure.value)
    assert "test_pool.fail_on failed on 4 ranks\n---- rank 2" in text  # the cause comes first
    assert "ValueError: the cause" in text and "line" in text
    assert all(f"---- rank {rank}\n" in text for rank in range(4))
    assert run_ranks(4, process_id) == before


def test_a_rank_that_dies_is_replaced():
    before = run_ranks(2, process_id)
    with pytest.raises(AssertionError, match="rank 1\nthe process died with exit code 17"):
        run_ranks(2, die_on, 1)
    after = run_ranks(2, process_id)
    assert after[0] == before[0] and after[1] != before[1]


def test_a_rank_that_hangs_is_killed_and_replaced():
    before = run_ranks(2, process_id)
    with pytest.raises(AssertionError, match="rank 0: no end within 5 s, killed") as failure:
        run_ranks(2, hang_on, 0, timeout=5)
    assert "in hang_on" in str(failure.value) and "rank 1" not in str(failure.value)
    after = run_ranks(2, process_id)
    assert after[0] != before[0] and after[1] == before[1]


def leave_late(failing_rank):
    """Goes on writing into the directory of the job after the answer, as a store does that is closed late."""
    directory = Path(dist.distributed_c10d._get_default_store().underlying_store.path).parent
    leave = dist.destroy_process_group

    def write_and_leave():
        dist.destroy_process_group = leave
        for number in range(20):
            time.sleep(0.02)
            (directory / f"late{dist.get_rank()}_{number}").touch()
        leave()

    dist.destroy_process_group = write_and_leave
    if dist.get_rank() == failing_rank:
        raise ValueError("the cause")
    return str(directory)


def test_the_directory_of_a_job_goes_when_all_ranks_have_left():
    (directory, _) = run_ranks(2, leave_late, None)
    assert not Path(directory).exists()
    with pytest.raises(AssertionError, match="ValueError: the cause"):
        run_ranks(2, leave_late, 1)
    assert run_ranks(2, rank_and_sum, 0) == [(0, 2, 1), (1, 2, 1)]


def leave_never():
    dist.destroy_process_group = lambda: time.sleep(1000)
    return os.getpid()


def test_a_rank_that_does_not_leave_is_replaced(monkeypatch):
    monkeypatch.setattr(pool, "LEAVE_S", 0.5)
    before = run_ranks(2, leave_never)
    after = run_ranks(2, process_id)
    assert not set(before) & set(after)


def leave_state_behind():
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    rerun_state_machine.get_rerun_state_machine()
    init_num_microbatches_calculator(0, None, 8, 1, 1)
    global_vars.set_args("arguments")
    deferred_gradients.defer(print)
    overrides.disable("all")
    checkpointing.set_checkpoint_version(3.0)
    StragglerDetector().left_behind = True
    gc.disable()
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    logging.getLogger().addHandler(logging.NullHandler())
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    for draw in (torch.rand, np.random.rand):
        draw(3)
    random.random()


def state_found():
    tracker = tensor_parallel.get_cuda_rng_tracker()
    found = {
        "groups": parallel_state.is_initialized(),
        "streams": tracker.get_states(),
        "rerun machine": rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE,
        "variables": dict(global_vars._REGISTRY),
        "deferred gradients": deferred_gradients.pending(),
        "disabled": set(overrides._disabled),
        "checkpoint version": checkpointing.get_checkpoint_version(),
        "straggler": vars(StragglerDetector()),
        "garbage collection": gc.isenabled(),
        "environment": "LEFT_BEHIND" in os.environ,
        "handlers": len([h for h in logging.getLogger().handlers if isinstance(h, logging.NullHandler)]),
        "directory": os.getcwd(),
        "type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "draws": (float(torch.rand(1)), float(np.random.rand()), random.random()),
    }
    with pytest.raises(Exception, match="batch size is not set up"):
        get_num_microbatches()
    return found


def test_a_job_leaves_nothing_behind():
    (before,) = run_ranks(1, state_found)
    run_ranks(1, leave_state_behind)
    (after,) = run_ranks(1, state_found)
    assert after == before
    assert before["directory"] != "/" and before["variables"] == {} and before["streams"] == {}


def test_a_world_the_pool_does_not_have_is_refused():
    with pytest.raises(ValueError, match="1 to 8 ranks"):
        run_ranks(9, process_id)
