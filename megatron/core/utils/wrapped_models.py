"""Looking through the wrappers (DDP, Float16Module, ...) that hold a model in ``.module``."""

import warnings
from typing import Any

import torch

from megatron.core.errors import UsageError


def get_attr_wrapped_model(
    model: torch.nn.Module, attr: str, allow_none: bool = True, return_model_obj: bool = False
) -> Any:
    """Attribute ``attr`` of a model inside any number of wrappers.

    Args:
        model: the outermost wrapper.
        attr: name to look for, from the outside in.
        allow_none: whether a value of None counts as found.
        return_model_obj: return the object that has it instead of the value.

    Raises:
        UsageError: ``model`` is a list, or nothing has the attribute.
    """
    if isinstance(model, list):
        raise UsageError(f"looking for {attr!r} needs one model, not a list of {len(model)}: pass model[0]")
    current: Any = model
    while True:
        if hasattr(current, attr) and (allow_none or getattr(current, attr) is not None):
            return current if return_model_obj else getattr(current, attr)
        if not hasattr(current, "module"):
            raise UsageError(f"neither {type(model).__name__} nor what it wraps has the attribute {attr!r}")
        current = current.module


def get_model_type(model: torch.nn.Module) -> Any:
    """``model_type`` of a wrapped model."""
    return get_attr_wrapped_model(model, "model_type")


def get_model_xattn(model: torch.nn.Module) -> bool:
    """``xattn_needed`` of a wrapped model; False where it has none."""
    try:
        return get_attr_wrapped_model(model, "xattn_needed")
    except UsageError:
        return False


def get_model_config(model: torch.nn.Module) -> Any:
    """``config`` of a wrapped model."""
    return get_attr_wrapped_model(model, "config", allow_none=False)


def is_submodule(module: torch.nn.Module, parent_module: torch.nn.Module, strict: bool = True) -> bool:
    """True if ``module`` itself is inside ``parent_module`` (or is the parent, unless ``strict``)."""
    if strict and module is parent_module:
        return False
    return any(child is module for child in parent_module.modules())


def deprecate_inference_params(inference_context: Any, inference_params: Any) -> Any:
    """The context, or the value given under its old name, with a warning."""
    if inference_context is None and inference_params is not None:
        warnings.warn("inference_params is the old name of inference_context", DeprecationWarning)
        return inference_params
    return inference_context
