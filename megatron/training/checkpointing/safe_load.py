"""Reading checkpoint files without running what is in them.

A pickle can name any function and have it called. Files are therefore read by torch's restricted unpickler,
which knows tensors and containers, plus the few names below. Everything that belongs to Megatron becomes
either our enumeration of the same name or an inert stand-in; any other name stops the load, before a single
instruction of the pickle is carried out.
"""

import argparse
import os
import re
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from megatron.core.enums import ModelType
from megatron.core.errors import CheckpointError
from megatron.core.rerun_state_machine import RerunDiagnostic, RerunMode, RerunState
from megatron.core.transformer.enums import AttnBackend
from megatron.training.checkpointing import layout

# Enumerations that occur in the arguments and in the state of the fault detection. They are pickled as
# "class, value", under these names.
ENUMS = {
    "megatron.core.enums.ModelType": ModelType,
    "megatron.core.transformer.enums.ModelType": ModelType,
    "megatron.model.enums.ModelType": ModelType,
    "megatron.core.transformer.enums.AttnBackend": AttnBackend,
    "megatron.core.rerun_state_machine.RerunMode": RerunMode,
    "megatron.core.rerun_state_machine.RerunState": RerunState,
    "megatron.core.rerun_state_machine.RerunDiagnostic": RerunDiagnostic,
}

_CHUNK_BYTES = 2**24

# Packages whose other classes become stand-ins: state objects that a load may ignore.
_FOREIGN_PACKAGES = ("megatron.", "mindspeed.", "mindspeed_llm.", "modellink.")


class Unknown:
    """What is left of an object whose class is not part of this package: its name, arguments and state."""

    class_name = ""
    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.class_name}{self.args}>"


class _EnumReader:
    """Turns a pickled (class, value) into our member, or a stand-in for a value that we do not have."""

    def __init__(self, path: str):
        self._enum = ENUMS[path]
        self._unknown = _stand_in(path)

    def __call__(self, *value: Any) -> Any:
        try:
            return self._enum(*value)
        except (ValueError, TypeError):
            return self._unknown(*value)


def _stand_in(path: str) -> type[Unknown]:
    return type("Unknown", (Unknown,), {"class_name": path})


def _numpy_names() -> list[tuple[Any, str]]:
    """What NumPy's generator state is made of, under the module names of NumPy 1 and 2."""
    import numpy as np

    reconstruct = np.ndarray(0).__reduce__()[0]
    names: list[tuple[Any, str]] = [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    names += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    # A dtype is built through its own class, which is a private name of NumPy.
    for kind in (type(np.dtype(np.uint32)), type(np.dtype(np.int64)), type(np.dtype(np.float64))):
        names.append((kind, f"{kind.__module__}.{kind.__qualname__}"))
    return names


def _allow_list() -> list[tuple[Any, str]]:
    return [(argparse.Namespace, "argparse.Namespace"), *_numpy_names()]


def load_file(path: str) -> dict[str, Any]:
    """Content of a checkpoint file, with every tensor on the CPU.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or asks for a function that is not allowed.
    """
    _check_readable(path)
    allowed = _allow_list()
    with torch.serialization.safe_globals(allowed):
        others = _names_in(path)
    unsafe = sorted(name for name in others if not name.startswith(_FOREIGN_PACKAGES))
    if unsafe:
        raise _refusal(path, unsafe)
    _explained(path, lambda: _check_sums(path))
    allowed += [(_EnumReader(name) if name in ENUMS else _stand_in(name), name) for name in others]
    with torch.serialization.safe_globals(allowed):
        content = _explained(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot open checkpoint file {path}: {error.strerror}") from error


def _names_in(path: str) -> list[str]:
    """Names outside the allow-list that the pickle mentions, found without running it."""
    if not zipfile.is_zipfile(path):
        # Either cut short, or the layout of torch before 1.6, which the restricted unpickler guards alone.
        return []
    return _explained(path, lambda: torch.serialization.get_unsafe_globals_in_checkpoint(path))


def _check_sums(path: str) -> None:
    """Compare every part of the archive with its CRC-32, which torch's reader does not look at.

    A writer may leave the sums out (``torch.serialization.set_crc32_options``); they are 0 then.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.CRC == 0:
                continue
            with archive.open(part) as content:
                while content.read(_CHUNK_BYTES):
                    pass  # the last read compares the sum


def _explained(path: str, read: Callable[[], Any]) -> Any:
    """``read()``, with every way in which a bad file makes it fail turned into a :class:`CheckpointError`."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise _refusal(path, [named[1]]) from None
        raise _damaged(path, error) from error


def _refusal(path: str, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} was not loaded: it wants to run or build {', '.join(names)}, which a checkpoint has no "
        "business doing. Nothing in it was executed. If the file comes from somebody else, do not trust it; "
        "if it is your own, save it again without that object."
    )


def _damaged(path: str, error: Exception) -> CheckpointError:
    size = os.path.getsize(path)
    iteration_dir = os.path.dirname(os.path.dirname(path))
    name = os.path.basename(iteration_dir)
    iteration = int(name[5:]) if re.fullmatch(r"iter_\d+", name) else None
    reason = str(error).splitlines()[0].split(". ")[0][:160] if str(error) else type(error).__name__
    return CheckpointError(
        f"{path} ({size} bytes) is cut short or damaged and cannot be read: {reason}. "
        + layout.advice_on_other_iterations(os.path.dirname(iteration_dir), unusable=iteration)
    )
