"""Small shared pieces: the split names, weights, a blend's list of words, and files that appear complete."""

import os
import tempfile
from enum import Enum
from typing import Any

import numpy as np

from megatron.core.errors import ConfigError, DataError


def __getattr__(name: str) -> Any:
    """``log_single_rank`` on first use: what reads words and weights needs no torch."""
    if name != "log_single_rank":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron.core.utils import log_single_rank

    return log_single_rank


class Split(Enum):
    """The three parts a data set is divided into."""

    train = 0
    valid = 1
    test = 2


def normalize(weights: list[float]) -> list[float]:
    """Divide by the sum, in double precision."""
    array = np.array(weights, dtype=np.float64)
    return (array / array.sum()).tolist()


def _as_float(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def get_blend_from_list(blend: list[str] | None) -> tuple[list[str], list[float] | None] | None:
    """Read the words of a blend.

    An odd number of words is a list of prefixes. An even number is weight/prefix pairs when the first
    word of every pair is a number, and a list of prefixes when none is.

    Returns:
        (prefixes, weights or None); None for None.

    Raises:
        ConfigError: some pairs have a weight and some do not.
    """
    if blend is None:
        return None
    if len(blend) % 2 == 1:
        return [word.strip() for word in blend], None
    weights = [_as_float(word) for word in blend[0::2]]
    if all(weight is None for weight in weights):
        return [word.strip() for word in blend], None
    bad = [word for word, weight in zip(blend[0::2], weights, strict=True) if weight is None]
    if bad:
        raise ConfigError(
            f"a blend mixes weights and bare prefixes: {' '.join(blend)!r} has {bad[0]!r} where a weight "
            "belongs. Give every prefix a weight (0.3 A 0.7 B) or none (A B C)."
        )
    return [word.strip() for word in blend[1::2]], [weight for weight in weights if weight is not None]


def os_error_text(error: OSError) -> str:
    """What the operating system said, without the file name: ``No space left on device``."""
    return error.strerror or str(error)


def write_error(path: str, error: OSError, remedy: str) -> DataError:
    """A :class:`DataError` for a file that could not be written."""
    return DataError(f"cannot write {path}: {os_error_text(error)}. {remedy}")


def temporary_beside(path: str) -> str:
    """A new empty file in the directory of ``path``: renamed to it when complete, it appears at once."""
    descriptor, name = tempfile.mkstemp(
        prefix=f".{os.path.basename(path)}.", suffix=".partial", dir=os.path.dirname(path) or "."
    )
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(descriptor, 0o666 & ~mask)  # mkstemp makes files private; data sets and caches are shared
    os.close(descriptor)
    return name


def sync_directory(directory: str) -> None:
    """Make renames in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def compile_helpers() -> None:
    """Do nothing: index building is NumPy and needs no compiler. Kept for scripts that call it."""
