"""Saving a checkpoint: collect its content, write it aside, rename it, and only then update the tracker."""

from collections.abc import Callable
from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError, NotBuiltYetError
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import wandb_utils
from megatron.training.agreement import failing_together
from megatron.training.checkpointing import durable, layout, optimizer_state, run_context
from megatron.training.checkpointing.publishing import write_together
from megatron.training.checkpointing.state import generate_state_dict, get_rng_state
from megatron.training.utils import print_rank_0, unwrap_model


def save_checkpoint(
    iteration: int,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict[str, Any] | None = None,
    pipeline_rank: int | None = None,
    expert_rank: int | None = None,
    tensor_rank: int | None = None,
    pipeline_parallel: bool | None = None,
    expert_parallel: bool | None = None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Any = None,
    preprocess_common_state_dict_fn: Callable[[dict], dict] | None = None,
) -> None:
    """Save everything that is needed to continue the run, under ``--save``.

    Whatever happens meanwhile, the directory holds the previous checkpoint or the new one, complete.

    Args:
        iteration: number of finished iterations.
        model: model chunks of this rank, wrapped or not.
        optimizer: optimizer or None.
        opt_param_scheduler: schedule or None.
        num_floating_point_operations_so_far: stored as it is.
        checkpointing_context: caches of sharded formats; not used by format torch.
        pipeline_rank: pipeline stage in the name of this rank's file; None asks ``parallel_state``, as for
            the next four.
        expert_rank: expert-parallel rank.
        tensor_rank: tensor-parallel rank.
        pipeline_parallel: whether there are several stages.
        expert_parallel: whether experts are spread over ranks.
        non_persistent_ckpt: a rolling checkpoint.
        train_data_iterator: asked for its state where ``--dataloader-save`` is set.
        preprocess_common_state_dict_fn: hook of sharded formats; not used by format torch.

    Raises:
        CheckpointError: the directory cannot be written, or the disk is full.
        NotBuiltYetError: another format than torch, or a rolling checkpoint.
    """
    args = run_context.get_args()
    _refuse_what_is_not_built(args, non_persistent_ckpt)
    save_dir = args.save
    print_rank_0(f"saving checkpoint at iteration {iteration:7d} to {save_dir} in {args.ckpt_format} format")
    with failing_together():
        maybe_save_dataloader_state(train_data_iterator, iteration, getattr(args, "dataloader_save", None))
    state = generate_state_dict(
        args,
        unwrap_model(model, None),
        optimizer,
        opt_param_scheduler,
        None if args.no_save_rng else get_rng_state(args.ckpt_format),
        iteration=iteration,
        rerun_state=get_rerun_state_machine().state_dict(train_data_iterator, args.ckpt_format),
    )
    state["num_floating_point_operations_so_far"] = num_floating_point_operations_so_far
    name = layout.get_checkpoint_name(
        save_dir,
        iteration,
        release=False,
        pipeline_parallel=pipeline_parallel,
        tensor_rank=tensor_rank,
        pipeline_rank=pipeline_rank,
        expert_parallel=expert_parallel,
        expert_rank=expert_rank,
    )
    # Gathering the shards takes all ranks; only the first of each data-parallel group gets the whole.
    shards = None if args.no_save_optim else optimizer_state.gathered_state(optimizer)
    write_together(state, shards, save_dir, iteration, name)
    print_rank_0(
        f"  successfully saved checkpoint from iteration {iteration:7d} to {save_dir} {describe_rank()}"
    )
    wandb_utils.on_save_checkpoint_success(
        layout.iteration_directory(save_dir, iteration),
        layout.get_checkpoint_tracker_filename(save_dir),
        save_dir,
        iteration,
    )


def describe_rank() -> str:
    """Tensor and pipeline rank of this process, one-based, for log lines: ``[ t 1/2, p 1/4 ]``."""
    tensor_rank = layout.rank_or_size(parallel_state.get_tensor_model_parallel_rank, 0)
    tensor_size = layout.rank_or_size(parallel_state.get_tensor_model_parallel_world_size, 1)
    stage = layout.rank_or_size(parallel_state.get_pipeline_model_parallel_rank, 0)
    stages = layout.rank_or_size(parallel_state.get_pipeline_model_parallel_world_size, 1)
    return f"[ t {tensor_rank + 1}/{tensor_size}, p {stage + 1}/{stages} ]"


def maybe_save_dataloader_state(
    train_iterator: Any, iteration: int, dataloader_save_path: str | None
) -> None:
    """Save the state of a data loader that offers ``save_state()``; the built-in ones resume by samples.

    Raises:
        CheckpointError: a path is given, but the loader has no state to save.
    """
    if isinstance(train_iterator, list):  # one per virtual stage; those that read have read alike
        train_iterator = next((iterator for iterator in train_iterator if iterator is not None), None)
    # Context-parallel ranks read the same samples.
    if not dataloader_save_path or train_iterator is None or parallel_state.get_context_parallel_rank() > 0:
        return
    loader = getattr(train_iterator, "iterable", train_iterator)
    if not hasattr(loader, "save_state"):
        raise CheckpointError(
            f"dataloader_save={dataloader_save_path}: {type(loader).__name__} has no save_state() method; "
            "leave the path out, the built-in loaders resume from the number of samples consumed"
        )
    rank = parallel_state.get_data_parallel_rank()
    path = layout.get_checkpoint_name(
        dataloader_save_path, iteration, basename=f"train_dataloader_dprank{rank:03d}.pt"
    )
    loader_state = {"dataloader_state_dict": loader.save_state()}
    durable.write_file(path, lambda file: torch.save(loader_state, file))


def _refuse_what_is_not_built(args: Any, non_persistent_ckpt: bool) -> None:
    if args.save is None:
        raise CheckpointError("a checkpoint was to be saved, but no directory is given: add --save DIR")
    if non_persistent_ckpt:
        raise NotBuiltYetError(
            "a rolling checkpoint", "--non-persistent-save-interval", "Use --save-interval alone."
        )
    if args.ckpt_format != "torch":
        raise NotBuiltYetError(
            "saving in this format", f"--ckpt-format {args.ckpt_format}", "Use --ckpt-format torch."
        )
