"""Finding the checkpoint that a run starts from, and reading it.

Files of format torch hold the model as it was spread over the ranks, so a run must have the parallel sizes
that the checkpoint was saved with.
"""

import argparse
import enum
import os
from typing import Any

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError, NotBuiltYetError
from megatron.training.agreement import failing_together
from megatron.training.checkpointing import layout, safe_load
from megatron.training.checkpointing.layout import rank_or_size
from megatron.training.utils import print_rank_0


class CheckpointType(enum.Enum):
    """Kind of a checkpoint that was found."""

    LEGACY = enum.auto()
    LOCAL = enum.auto()
    GLOBAL = enum.auto()
    TORCH_DCP = enum.auto()


Found = tuple[dict[str, Any] | None, str, bool, CheckpointType | None]


def _load_base_checkpoint(
    load_dir: str,
    args: argparse.Namespace,
    rank0: bool = False,
    sharded_state_dict: dict[str, Any] | None = None,
    checkpointing_context: dict[str, Any] | None = None,
) -> Found:
    """Find the checkpoint that the arguments ask for, and read this rank's part of it.

    Args:
        load_dir: directory with the tracker file.
        args: ``ckpt_step`` overrides the tracker; with ``exit_on_missing_checkpoint`` a missing one is an
            error.
        rank0: read the file of rank 0, whatever layout it was saved with. Without this, all ranks call
            together, and an error of one is an error of all.
        sharded_state_dict: request of sharded formats.
        checkpointing_context: caches of sharded formats.

    Returns:
        ``(state dict, file name, release, kind)``; the state dict is None where there is no checkpoint.

    Raises:
        CheckpointError: the tracker, the directory or the file cannot be used.
        NotBuiltYetError: the checkpoint is in a sharded format.
    """
    iteration, release = _choose_iteration(load_dir, args, alone=rank0)
    if iteration is None:
        return None, "", False, None
    if rank0:
        return (*_read(load_dir, iteration, release, rank0), release, CheckpointType.LEGACY)
    print_rank_0(
        f" loading release checkpoint from {load_dir}"
        if release
        else f" loading checkpoint from {load_dir} at iteration {iteration}"
    )
    with failing_together():
        state_dict, name = _read(load_dir, iteration, release, rank0)
    return state_dict, name, release, CheckpointType.LEGACY


def _read(load_dir: str, iteration: int, release: bool, rank0: bool) -> tuple[dict[str, Any], str]:
    """The checkpoint file of rank 0 or of this rank, and its name."""
    base = layout.iteration_directory(load_dir, iteration, release)
    found = layout.disk_format(base)
    if found in ("torch_dist", "torch_dcp"):
        raise NotBuiltYetError(
            f"loading a checkpoint of format {found} ({base})",
            remedy="Convert it with the original's --ckpt-convert-format torch, or load one of format torch.",
        )
    if found is None:
        raise _no_checkpoint_error(load_dir, base, None if release else iteration)
    find = layout.find_checkpoint_rank_0 if rank0 else layout.get_checkpoint_name
    name = find(load_dir, iteration, release)
    if name is None or not os.path.isfile(name):
        raise _missing_file_error(load_dir, iteration, release, name)
    state_dict = safe_load.load_file(name)
    if not any(key in state_dict for key in ("model", "model0")):
        raise CheckpointError(
            f"{name} is not a checkpoint of this program: it holds {sorted(map(str, state_dict))}"
        )
    return state_dict, name


def _choose_iteration(load_dir: str, args: argparse.Namespace, alone: bool) -> tuple[int | None, bool]:
    """Iteration and release flag; (None, False) where there is no checkpoint."""
    ckpt_step = getattr(args, "ckpt_step", None)
    if ckpt_step is not None:
        return ckpt_step, False
    tracker_file = layout.get_checkpoint_tracker_filename(load_dir)
    if not alone:
        chosen = layout.read_together(tracker_file)
    else:
        chosen = layout.read_tracker(tracker_file) if os.path.isfile(tracker_file) else None
    if chosen is not None:
        return chosen
    if getattr(args, "exit_on_missing_checkpoint", False):
        raise CheckpointError(
            f"{tracker_file} does not exist, and a checkpoint is needed (--exit-on-missing-checkpoint). "
            + layout.advice_on_other_iterations(load_dir)
        )
    if not alone:
        print_rank_0(f"WARNING: could not find the metadata file {tracker_file}")
        print_rank_0("    will not load any checkpoints and will start from random")
    return None, False


def _no_checkpoint_error(load_dir: str, base: str, iteration: int | None) -> CheckpointError:
    what = (
        "does not exist" if not os.path.isdir(base) else f"holds no {layout.MODEL_FILE} and no metadata.json"
    )
    return CheckpointError(f"{base} {what}. " + layout.advice_on_other_iterations(load_dir, iteration))


def _missing_file_error(load_dir: str, iteration: int, release: bool, name: str | None) -> CheckpointError:
    """The error for a directory without the file of this rank; names the parallel sizes it was saved with."""
    base = layout.iteration_directory(load_dir, iteration, release)
    rank_0_file = layout.find_checkpoint_rank_0(load_dir, iteration, release)
    if name is None or rank_0_file is None:
        return CheckpointError(
            f"{base} is incomplete: rank 0's {layout.MODEL_FILE} is missing. "
            + layout.advice_on_other_iterations(load_dir, None if release else iteration)
        )
    stored = safe_load.load_file(rank_0_file).get("args", argparse.Namespace())
    explanation = "; ".join(size_differences(stored)) or "a rank's file is missing"
    return CheckpointError(
        f"{name} does not exist; {base} holds {', '.join(sorted(os.listdir(base)))}: {explanation}. " + REMEDY
    )


REMEDY = (
    "A checkpoint of format torch must be loaded with the parallel sizes it was saved with, on as many "
    "processes as they need (--use-checkpoint-args --use-mp-args-from-checkpoint-args takes them from it)."
)


def sizes_here() -> dict[str, int | None]:
    """The parallel sizes of this run, by the name of their argument."""
    return {
        "tensor_model_parallel_size": rank_or_size(parallel_state.get_tensor_model_parallel_world_size, 1),
        "pipeline_model_parallel_size": rank_or_size(
            parallel_state.get_pipeline_model_parallel_world_size, 1
        ),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "expert_model_parallel_size": max(
            1, rank_or_size(parallel_state.get_expert_model_parallel_world_size, 1)
        ),
        "expert_tensor_parallel_size": max(
            1, rank_or_size(parallel_state.get_expert_tensor_parallel_world_size, 1)
        ),
    }


def size_differences(stored: argparse.Namespace) -> list[str]:
    """``--flag N in the checkpoint, M in this run`` for every size that differs.

    Args:
        stored: arguments of the checkpoint; old ones may lack some, which are not compared.
    """
    found = []
    for name, here in sizes_here().items():
        value = getattr(stored, name, here)
        if name == "expert_tensor_parallel_size" and not (value and getattr(stored, "num_experts", None)):
            continue  # no part of the checkpoint depends on it
        if (value or 1) != (here or 1):
            # Virtual stages have two flags, and neither has this name.
            is_flag = name != "virtual_pipeline_model_parallel_size"
            flag = f"--{name.replace('_', '-')}" if is_flag else name.replace("_", " ")
            found.append(f"{flag} {value or 1} in the checkpoint, {here or 1} in this run")
    return found


def optimizer_differences(stored: argparse.Namespace, args: argparse.Namespace) -> list[str]:
    """Reasons why the optimizer state of a checkpoint does not fit this run's optimizer.

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
