"""Version of the checkpoint layout that was loaded; some old parameters are stored in another order."""

from megatron.core.errors import CheckpointError

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
