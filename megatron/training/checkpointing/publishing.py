"""All or nothing over all ranks: every rank writes aside, and only when all have does anything get its name.

Ranks exchange their success after each phase, so that one that cannot write stops all of them, with its own
message, while the checkpoint from before is still the latest.
"""

import os
import shutil
import threading
from typing import Any

import torch

from megatron.training import stop_signals
from megatron.training.agreement import failing_together
from megatron.training.checkpointing import durable, layout, storage, tracker
from megatron.training.checkpointing.state import to_host


def write_together(
    state: dict[str, Any],
    optimizer_shards: Any | None,
    save_dir: str,
    iteration: int,
    name: str,
) -> None:
    """Write this rank's files aside; when all ranks have, publish them and move the tracker.

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
    role = storage.role_in_save(save_dir, name)
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
                tracker.write_tracker(save_dir, iteration)
    except BaseException:
        if role.publishes:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_aside(content: Any, name: str, final: str, staging: str) -> None:
    host_content = to_host(content)
    target = os.path.join(staging, os.path.relpath(name, final))
    durable.write_file(target, lambda file: torch.save(host_content, file))


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
