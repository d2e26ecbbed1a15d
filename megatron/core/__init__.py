"""The library: models, parallelism, optimizers, data sets. Knows no command-line flags.

Submodules and the names below are imported on first use, so that ``import megatron.core`` stays cheap.
"""

import importlib
from typing import Any

from megatron.core.package_info import (
    __contact_emails__,
    __contact_names__,
    __description__,
    __download_url__,
    __homepage__,
    __keywords__,
    __license__,
    __package_name__,
    __repository_url__,
    __shortversion__,
    __version__,
)

# name -> (module, attribute of it, or None for the module itself)
_LAZY: dict[str, tuple[str, str | None]] = {
    "parallel_state": ("megatron.core.parallel_state", None),
    "mpu": ("megatron.core.parallel_state", None),
    "tensor_parallel": ("megatron.core.tensor_parallel", None),
    "utils": ("megatron.core.utils", None),
    "DistributedDataParallel": ("megatron.core.distributed", "DistributedDataParallel"),
    "InferenceParams": ("megatron.core.inference_params", "InferenceParams"),
    "ModelParallelConfig": ("megatron.core.model_parallel_config", "ModelParallelConfig"),
    "Timers": ("megatron.core.timers", "Timers"),
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_path, attribute = _LAZY[name]
    module = importlib.import_module(module_path)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
