"""``import torch``, and with it the back ends that other packages register, one by one and explained.

Torch loads them itself at the end of its import, and one that fails ends that import: with a traceback,
before any code of ours has run. Import this module before torch, as the entry points do: it keeps torch from
loading them, loads them itself, and remembers what went wrong, for ``accelerator.device_type`` to say where
no device is left. Once torch is imported there is nothing left to do.

Back end ``torch_NAME`` is loaded where the package ``megatron_NAME`` wants it (its function ``is_wanted``,
which imports neither), or where there is no such package. ``MEGATRON_DEVICE=cpu`` loads none, and
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` means here what it means to torch.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys

from megatron.core.errors import MegatronError

_GROUP = "torch.backends"
_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
# Back ends that were wanted and cannot be used, with a sentence that says why.
PROBLEMS: dict[str, str] = {}


def _import_torch() -> None:
    # Torch's warnings about lost connections come with frames of C++; what they mean is said elsewhere.
    quiet = _LOG_LEVEL not in os.environ
    if quiet:
        os.environ[_LOG_LEVEL] = "ERROR"
    asked = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "0"
    import torch  # noqa: F401

    if quiet:
        del os.environ[_LOG_LEVEL]
    if asked is None:
        del os.environ[_SWITCH]
    else:
        os.environ[_SWITCH] = asked


def _load_back_ends() -> None:
    if os.environ.get(_SWITCH, "1") != "1":
        return
    found = importlib.metadata.entry_points(group=_GROUP)
    loaded = [back_end.name for back_end in found if _loads(back_end)]
    if len(loaded) < len(found):
        # Processes that this one starts would fail in their import of torch.
        os.environ[_SWITCH] = "0"


def _loads(back_end: importlib.metadata.EntryPoint) -> bool:
    """Loads a back end if it is wanted, and says whether it has."""
    try:
        if not _is_wanted(back_end.name):
            return False
        back_end.load()()
    except MegatronError as error:
        PROBLEMS[back_end.name] = str(error)
    except Exception as error:  # whatever a package of others does
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        PROBLEMS[back_end.name] = f"torch cannot load its back end {back_end.name}: {reason}"
    return back_end.name not in PROBLEMS


def _is_wanted(name: str) -> bool:
    if os.environ.get("MEGATRON_DEVICE", "").strip().lower() == "cpu":
        return False
    package = f"megatron_{name.removeprefix('torch_')}"
    if not name.startswith("torch_") or importlib.util.find_spec(package) is None:
        return True
    return importlib.import_module(package).is_wanted()


if "torch" not in sys.modules:
    _import_torch()
    _load_back_ends()
