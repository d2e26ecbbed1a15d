"""Writing a checkpoint from all ranks at once: every file is written aside, and all are renamed together.

Ranks exchange their success after each phase, so that one that cannot write stops all of them, with its own
message, while the previous checkpoint is still the latest. Ranks that differ only in their data or context
hold the same state; one of them writes it. Where hosts have disks of their own, each disk gets every file
that a rank there will read, and a tracker.
"""

import os
import shutil
import threading
from dataclasses import dataclass
from typing import Any

import torch

from megatron.training.agreement import failing_together, world_size
from megatron.training.checkpointing import durable, layout
from megatron.training.checkpointing.state import to_host
from megatron.training.processes import stop_signals
from megatron.training.shared_storage import lowest_rank_that_shares


def write_together(
    state: dict[str, Any],
    optimizer_shards: Any | None,
    save_dir: str,
    iteration: int,
    name: str,
) -> None:
    """Write this rank's files aside; when all ranks have, rename them and update the tracker.

    Args:
        state: content of ``model_optim_rng.pt``; written by one of the ranks that share ``name``.
        optimizer_shards: content of ``distrib_optim.pt`` on the rank that gathered it, else None.
        save_dir: the save directory.
        iteration: number of finished iterations.
        name: final path of the model file.

    Raises:
        CheckpointError: a rank cannot write; the same on all ranks.
    """
    final = layout.iteration_directory(save_dir, iteration)
    staging = durable.staging_directory(final)
    role = role_in_save(save_dir, name)
    try:
        with failing_together():
            if role.publishes:
                durable.remove_leftovers(save_dir)
        with failing_together():
            if role.writes:
                _write_aside(state, name, final, staging)
            if optimizer_shards is not None:
                beside = layout.get_distributed_optimizer_checkpoint_name(name)
                _write_aside(optimizer_shards, beside, final, staging)
        with failing_together(), stop_signals.held_back():
            if role.publishes:
                durable.publish(staging, final)
        with failing_together(), stop_signals.held_back():
            if role.publishes:
                layout.write_tracker(save_dir, iteration)
    except BaseException:
        if role.publishes:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_aside(content: Any, name: str, final: str, staging: str) -> None:
    host_content = to_host(content)
    target = os.path.join(staging, os.path.relpath(name, final))
    durable.write_file(target, lambda file: torch.save(host_content, file))


@dataclass(frozen=True)
class Role:
    """A rank's part in a save.

    Attributes:
        writes: whether it writes the model file of its model-parallel rank.
        publishes: whether it renames what the ranks of its storage wrote, and updates the tracker there.
    """

    writes: bool
    publishes: bool


def role_in_save(save_dir: str, name: str) -> Role:
    """This rank's part in saving under ``save_dir``. Takes all ranks.

    Args:
        save_dir: the save directory.
        name: path of this rank's model file.
    """
    if world_size() == 1:
        return Role(writes=True, publishes=True)
    rank, owner = torch.distributed.get_rank(), lowest_rank_that_shares(save_dir)
    # Asked of the names: with expert tensor parallelism of another size than that of dense layers, neither
    # the data-parallel nor the expert data-parallel rank tells which ranks hold the same.
    own = (owner, os.path.relpath(name, save_dir))
    wanted: list[tuple[int, str]] = [own] * world_size()
    torch.distributed.all_gather_object(wanted, own)
    return Role(writes=wanted.index(own) == rank, publishes=rank == owner)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def cleanup_old_non_persistent_checkpoint(
    save_dir: str, leave_ckpt_num: int = 1, do_async: bool = False
) -> None:
    """Deletes all iterations in ``save_dir`` but the newest; on rank 0, other ranks do nothing.

    Args:
        leave_ckpt_num: how many are left.
        do_async: delete while the caller goes on.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    iterations = layout.saved_iterations(save_dir)
    old = [
        layout.iteration_directory(save_dir, each) for each in iterations[: len(iterations) - leave_ckpt_num]
    ]

    def delete() -> None:
        for directory in old:
            shutil.rmtree(directory, ignore_errors=True)

    if do_async:
        threading.Thread(target=delete).start()
    else:
        delete()
