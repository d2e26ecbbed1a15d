"""Random states: what has to be put back so that the next dropout mask and shuffle are the same."""

import random
from typing import Any

import numpy as np
import torch

from megatron.core import accelerator, parallel_state
from megatron.core.errors import CheckpointError, NotBuiltYetError
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.training.checkpointing import replaceable
from megatron.training.utils import print_rank_0


def get_rng_state(ckpt_format: str) -> list[dict[str, Any]]:
    """Random states of this process, as a list with one entry.

    Data-parallel ranks share their states, unless each drew weights of its own
    (``data_parallel_random_init``): then the list has an entry per data-parallel rank, and all of them must
    call this together.

    Raises:
        NotBuiltYetError: for a sharded checkpoint format.
    """
    if ckpt_format != "torch":
        raise NotBuiltYetError(
            "random states in a sharded checkpoint",
            f"--ckpt-format {ckpt_format}",
            "Use --ckpt-format torch.",
        )
    own = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": accelerator.get_rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }
    if not replaceable.get_args().data_parallel_random_init:
        return [own]
    group = parallel_state.get_data_parallel_group()
    entries: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(entries, own, group=group)
    return entries


def set_rng_state(state_dict: dict[str, Any], data_parallel_random_init: bool) -> None:
    """Put back the random states of a checkpoint.

    A device state that another kind of device wrote cannot be read here; it is left out with a warning.

    Raises:
        CheckpointError: the checkpoint has no random states.
    """
    state = _entry_of_this_rank(state_dict, data_parallel_random_init)
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    tracker_states = state["rng_tracker_states"]
    if not tracker_states:
        raise CheckpointError(
            "the checkpoint's random states lack the named streams of dropout (rng_tracker_states is empty); "
            "go on without them with --no-load-rng"
        )
    try:
        for stream_state in (state["cuda_rng_state"], *tracker_states.values()):
            torch.Generator(device=accelerator.current_device()).set_state(stream_state)
    except (RuntimeError, TypeError) as error:
        print_rank_0(
            "WARNING: the checkpoint's device random states do not fit this device "
            f"({accelerator.device_type()}: {str(error).splitlines()[0]}); "
            "dropout goes on from the seed instead"
        )
        return
    accelerator.set_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(tracker_states)


def _entry_of_this_rank(state_dict: dict[str, Any], data_parallel_random_init: bool) -> dict[str, Any]:
    if "rng_state" in state_dict:
        entries = state_dict["rng_state"]
        rank = parallel_state.get_data_parallel_rank() if data_parallel_random_init else 0
        if rank >= len(entries):
            raise CheckpointError(
                f"the checkpoint has random states of {len(entries)} data-parallel rank(s), this is rank "
                f"{rank}; leave out --data-parallel-random-init or add --no-load-rng"
            )
        return entries[rank]
    if "random_rng_state" in state_dict:  # checkpoints of 2021 and before
        return state_dict
    raise CheckpointError(
        "the checkpoint holds no random states (it was saved with --no-save-rng); add --no-load-rng to load "
        "the rest of it"
    )
