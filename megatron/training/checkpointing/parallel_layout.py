"""Parallel sizes a checkpoint of format torch was saved with, against those of this run.

Its files hold the parts of the model as they lay on the ranks, so the sizes must be the same on load.
"""

import argparse

from megatron.core import parallel_state
from megatron.training.checkpointing.layout import own_place

REMEDY = (
    "A checkpoint of format torch must be loaded with the parallel sizes it was saved with, on as many "
    "processes as they need (--use-checkpoint-args --use-mp-args-from-checkpoint-args takes them from it)."
)


def sizes_here() -> dict[str, int | None]:
    """The sizes of this run, by the name of their argument."""
    return {
        "tensor_model_parallel_size": own_place(parallel_state.get_tensor_model_parallel_world_size, 1),
        "pipeline_model_parallel_size": own_place(parallel_state.get_pipeline_model_parallel_world_size, 1),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "expert_model_parallel_size": max(
            1, own_place(parallel_state.get_expert_model_parallel_world_size, 1)
        ),
    }


def differences(stored: argparse.Namespace) -> list[str]:
    """``--flag N in the checkpoint, M in this run`` for every size that differs.

    Args:
        stored: arguments of the checkpoint; old ones may lack some, which are not compared.
    """
    found = []
    for name, here in sizes_here().items():
        value = getattr(stored, name, here)
        if (value or 1) != (here or 1):
            # Virtual stages have two flags, and neither has this name.
            is_flag = name != "virtual_pipeline_model_parallel_size"
            flag = f"--{name.replace('_', '-')}" if is_flag else name.replace("_", " ")
            found.append(f"{flag} {value or 1} in the checkpoint, {here or 1} in this run")
    return found


def optimizer_differences(stored: argparse.Namespace, args: argparse.Namespace) -> list[str]:
    """What keeps the optimizer state of a checkpoint from fitting this run's optimizer.

    The distributed optimizer's file follows the layout of the gradient buffers.
    """
    saved, here = (getattr(a, "use_distributed_optimizer", False) for a in (stored, args))
    if saved == here:
        return []
    return [
        "saved with --use-distributed-optimizer, this run is without it"
        if saved
        else "saved without --use-distributed-optimizer, this run is with it"
    ]
