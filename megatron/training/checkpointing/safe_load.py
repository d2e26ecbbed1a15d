"""Reading checkpoint files without running code from them.

A pickle can name any function and have it called. Files are therefore read by torch's restricted unpickler,
which knows tensors and containers, plus the few names below. Everything that belongs to Megatron becomes
either our enumeration of the same name or an inert stand-in; any other name stops the load, before a single
instruction of the pickle is carried out.
"""

import argparse
import os
import pickle
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

# Enumerations that occur in the arguments and in the state of the fault detection, under the names that files
# know them by. They are pickled as a call of the class with the value, and by Python 3.11.0 to 3.11.3 as a
# call of getattr with the class and the member's name.
ENUMS = {
    "megatron.core.enums.ModelType": ModelType,
    "megatron.core.transformer.enums.ModelType": ModelType,
    "megatron.model.enums.ModelType": ModelType,
    "megatron.core.transformer.enums.AttnBackend": AttnBackend,
    "megatron.core.rerun_state_machine.RerunMode": RerunMode,
    "megatron.core.rerun_state_machine.RerunState": RerunState,
    "megatron.core.rerun_state_machine.RerunDiagnostic": RerunDiagnostic,
}

# Arguments of ours that are members; they are stored as their values.
_MEMBER_ARGUMENTS = {"model_type": ModelType, "attention_backend": AttnBackend}
_GETATTR = "builtins.getattr"
# NumPy's letters for truth values, and for whole, real and complex numbers of each size.
_NUMERIC_TYPES = "?bBhHiIlLqQefdFD"

_CHUNK_BYTES = 2**24

# Packages whose other classes become stand-ins: state objects that a load may ignore.
_FOREIGN_PACKAGES = ("megatron.", "mindspeed.", "mindspeed_llm.", "modellink.")


class Unknown:
    """Stand-in for an object whose class is not part of this package, with its name, arguments and state."""

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

    def member(self, name: str) -> Any:
        """The member of that name, which is all that ``getattr`` may fetch."""
        found = self._enum.__members__.get(name)
        return self._unknown(name) if found is None else found


def _member_of(owner: Any, name: Any, *default: Any) -> Any:
    """Replacement of ``getattr`` in a file: returns members of enumerations, and refuses anything else."""
    if isinstance(name, str) and not default:
        if isinstance(owner, _EnumReader):
            return owner.member(name)
        if isinstance(owner, type) and issubclass(owner, Unknown):
            return owner(name)
    raise pickle.UnpicklingError(f"GLOBAL {_GETATTR} of something else than an enumeration")


def _stand_in(path: str) -> type[Unknown]:
    return type("Unknown", (Unknown,), {"class_name": path})


def _numpy_names() -> list[tuple[Any, str]]:
    """Names in the pickles of NumPy's numbers and arrays, under the module names of NumPy 1 and 2."""
    import numpy as np

    reconstruct = np.ndarray(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    names: list[tuple[Any, str]] = [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    for core in ("core", "_core"):
        names.append((reconstruct, f"numpy.{core}.multiarray._reconstruct"))
        names.append((scalar, f"numpy.{core}.multiarray.scalar"))
    # A dtype is built through its own class, which is a private name of NumPy.
    for kind in {type(np.dtype(code)) for code in _NUMERIC_TYPES}:
        names.append((kind, f"{kind.__module__}.{kind.__qualname__}"))
    return names


def _allow_list() -> list[Callable | tuple[Callable, str]]:
    readers = [(_EnumReader(path), path) for path in ENUMS]
    return [(argparse.Namespace, "argparse.Namespace"), *readers, *_numpy_names()]


def load_file(path: str) -> dict[str, Any]:
    """Content of a checkpoint file that is one dict, with every tensor on the CPU.

    Raises:
        CheckpointError: as of :func:`load_dict_or_list`, or it holds something else.
    """
    content = load_dict_or_list(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def load_dict_or_list(path: str) -> dict[str, Any] | list[Any]:
    """Content of a checkpoint file, with every tensor on the CPU; several chained optimizers save a list.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or asks for a function that is not allowed.
    """
    _check_readable(path)
    allowed = _allow_list()
    with torch.serialization.safe_globals(allowed):
        others = _names_in(path)
    unsafe = sorted(name for name in others if not name.startswith(_FOREIGN_PACKAGES))
    if unsafe not in ([], [_GETATTR]):
        raise _refusal(path, unsafe)
    _explained(path, lambda: _check_sums(path))
    allowed += [(_stand_in(name), name) for name in others if name != _GETATTR]
    allowed.append((_member_of, _GETATTR))  # refuses whatever is not a member when it gets there
    with torch.serialization.safe_globals(allowed):
        content = _explained(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    if not isinstance(content, dict | list):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict")
    if isinstance(content, dict):
        _restore_members(content.get("args"))
    return content


def _restore_members(args: Any) -> None:
    """Turn the stored values of arguments back into members; a value that we do not have stays as it is."""
    for name, kind in _MEMBER_ARGUMENTS.items():
        value = getattr(args, name, None)
        if type(value) is int and value in [member.value for member in kind]:
            setattr(args, name, kind(value))


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
