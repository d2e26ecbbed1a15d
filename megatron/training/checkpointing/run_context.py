"""Arguments of the run and version of its checkpoint, as the other files here see them.

User code and its tests replace ``get_args``, ``check_checkpoint_args`` and ``update_num_microbatches`` in the
public module, so they are looked up there at every call. The public module imports the files of this package,
so it is reached by name instead of imported.
"""

import argparse
import sys
from typing import Any

from megatron.core.errors import CheckpointError


def _public(name: str) -> Any:
    return getattr(sys.modules[__name__.rpartition(".")[0]], name)


def get_args() -> argparse.Namespace:
    """Arguments of the run."""
    return _public("get_args")()


def check_checkpoint_args(checkpoint_args: argparse.Namespace) -> None:
    """Compare a checkpoint's arguments with those of the run."""
    _public("check_checkpoint_args")(checkpoint_args)


def update_num_microbatches(consumed_samples: int, verbose: bool) -> None:
    """Update the number of microbatches for the samples consumed so far."""
    _public("update_num_microbatches")(consumed_samples=consumed_samples, verbose=verbose)


CURRENT_VERSION = 3.0

# One entry at most. A process works with checkpoints of one version.
_LOADED: list[float] = []


def set_checkpoint_version(value: float | None) -> None:
    """Remember the version of the loaded checkpoint; None forgets it.

    Raises:
        CheckpointError: a checkpoint of another version was loaded before.
    """
    if value is None:
        _LOADED.clear()
    elif _LOADED and _LOADED[0] != value:
        raise CheckpointError(
            f"checkpoints of versions {_LOADED[0]} and {value} cannot be mixed in one run: load them one "
            "after the other and save both again"
        )
    else:
        _LOADED[:] = [value]


def get_checkpoint_version() -> float | None:
    """Version of the loaded checkpoint, None before a load."""
    return _LOADED[0] if _LOADED else None
