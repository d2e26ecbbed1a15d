"""Which rank does what with the files of a checkpoint, where ranks share a directory and where they do not.

Ranks that differ only in their data or context hold the same state; one of them writes it. Where hosts have
disks of their own, each disk gets all files that its ranks will want to read, and a tracker.
"""

from dataclasses import dataclass

import torch

from megatron.core import parallel_state
from megatron.training.agreement import world_size


@dataclass(frozen=True)
class Role:
    """A rank's part in a save.

    Attributes:
        writes: whether it writes the model file of its place.
        publishes: whether it renames what the ranks of its storage wrote, and moves the tracker there.
    """

    writes: bool
    publishes: bool


def role_in_save(save_dir: str, name: str) -> Role:
    """This rank's part in saving under ``save_dir``; ``name`` is the path of its model file."""
    if world_size() == 1:
        return Role(writes=True, publishes=True)
    return Role(
        writes=parallel_state.get_expert_data_parallel_rank() == 0,
        publishes=torch.distributed.get_rank() == 0,
    )
