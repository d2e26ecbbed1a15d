"""Building blocks of transformers: config, layer specs, attention, MLP, layer, stack of layers."""

import importlib
from typing import Any

# name -> submodule; imported on first use
_LAZY = {
    "MLATransformerConfig": "transformer_config",
    "MegatronModule": "module",
    "ModuleSpec": "spec_utils",
    "TransformerConfig": "transformer_config",
    "TransformerLayer": "transformer_layer",
    "TransformerLayerSubmodules": "transformer_layer",
    "build_module": "spec_utils",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
