"""Small helpers used across the library, and by user scripts under this path."""

import functools
import hashlib
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

from megatron import unbuilt
from megatron.core import accelerator, config, parallel_state
from megatron.core.errors import ConfigError, MegatronError, UsageError
from megatron.core.parallel_state.state import GlobalMemoryBuffer
from megatron.core.utils.straggler import StragglerDetector
from megatron.core.utils.tensors import (
    MakeViewlessTensor,
    WrappedTensor,
    assert_viewless_tensor,
    get_data_parallel_group_if_dtensor,
    get_full_tensor_if_necessary,
    init_method_normal,
    make_viewless_tensor,
    prepare_input_tensors_for_wgrad_compute,
    safely_set_viewless_tensor_data,
    scaled_init_method_normal,
    to_local_if_dtensor,
    xavier_uniform_init_method,
)

# Public under this path, but built on what stands above it: name -> module, imported on first use.
_FROM_ABOVE = {
    "drain_embedding_wgrad_compute": "megatron.core.tensor_parallel.deferred_gradients",
    "get_batch_on_this_cp_rank": "megatron.core.context_parallel.zigzag",
}
_name_of_unbuilt = unbuilt.names_of(__name__)


def __getattr__(name: str) -> Any:
    if name in _FROM_ABOVE:
        return getattr(importlib.import_module(_FROM_ABOVE[name]), name)
    return _name_of_unbuilt(name)


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raises ConfigError unless ``denominator`` divides ``numerator``."""
    if numerator % denominator != 0:
        raise ConfigError(f"{numerator} is not divisible by {denominator}")


def divide(numerator: int, denominator: int) -> int:
    """Exact quotient of two integers; ConfigError if there is a remainder."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def log_single_rank(logger: logging.Logger, *args: Any, rank: int = 0, **kwargs: Any) -> None:
    """``logger.log(*args, **kwargs)`` on one global rank only, or always without process groups."""
    if not dist.is_initialized() or dist.get_rank() == rank:
        logger.log(*args, **kwargs)


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


def get_model_config(model: torch.nn.Module) -> Any:
    """``config`` of a wrapped model."""
    return get_attr_wrapped_model(model, "config", allow_none=False)


def check_param_hashes_across_dp_replicas(model: list[torch.nn.Module], cross_check: bool = False) -> bool:
    """Compare the bytes of all parameters over the data-parallel ranks.

    Args:
        model: model chunks of this rank.
        cross_check: True when every rank needs the common answer; otherwise a rank compares itself with
            data-parallel rank 0 alone.

    Returns:
        True when the parameters are equal bit for bit.
    """
    digest = hashlib.sha1()
    for chunk in model:
        for param in chunk.parameters():
            digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(accelerator.current_device())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    gathered = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, own, group=group)
    if not cross_check:
        return torch.equal(gathered[0], own)
    return all(torch.equal(gathered[0], other) for other in gathered)


def deprecate_inference_params(inference_context: Any, inference_params: Any) -> Any:
    """The context, or the value given under its old name, with a warning."""
    if inference_context is None and inference_params is not None:
        warnings.warn("inference_params is the old name of inference_context", DeprecationWarning)
        return inference_params
    return inference_context


# Names kept for other people's scripts: nothing of this project calls what follows.

# Stands for "not installed": smaller than any release, so every minimum-version test fails.
_ABSENT = "0.0.0"


def _installed_version(*distributions: str) -> Version:
    for distribution in distributions:
        try:
            return Version(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Version(_ABSENT)


def get_te_version() -> Version:
    """Version of TransformerEngine; 0.0.0 when it is not installed."""
    return _installed_version("transformer-engine", "transformer_engine")


T = TypeVar("T")


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def log_on_each_pipeline_stage(logger: logging.Logger, *args: Any, **kwargs: Any) -> None:
    """``logger.log`` on one rank per pipeline stage: that with data- and tensor-parallel rank 0."""
    if not dist.is_initialized() or (
        parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
    ):
        logger.log(*args, **kwargs)


def get_torch_version() -> Version:
    """Version of torch."""
    return Version(torch.__version__)


def get_fa_version() -> Version:
    """Version of flash-attn; 0.0.0 when it is not installed."""
    return _installed_version("flash-attn", "flash_attn")


def _at_least(found: Version, version: str, check_equality: bool) -> bool:
    return found >= Version(version) if check_equality else found > Version(version)


def is_torch_min_version(version: str, check_equality: bool = True) -> bool:
    """True if torch is at least ``version`` (newer than it without ``check_equality``)."""
    return _at_least(get_torch_version(), version, check_equality)


def is_te_min_version(version: str, check_equality: bool = True) -> bool:
    """The same for TransformerEngine; False where it is absent."""
    return _at_least(get_te_version(), version, check_equality)


def is_fa_min_version(version: str, check_equality: bool = True) -> bool:
    """The same for flash-attn; False where it is absent."""
    return _at_least(get_fa_version(), version, check_equality)


class ExperimentalNotEnabledError(MegatronError):
    """Experimental code was called while the switch is off."""


def _require_enabled(name: str, version: str) -> None:
    if not config.ENABLE_EXPERIMENTAL:
        raise ExperimentalNotEnabledError(
            f"{name} is experimental since {version}; set megatron.core.config.ENABLE_EXPERIMENTAL = "
            "True to use it"
        )


def experimental_fn(introduced_with_version: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorator of a function that must not run while the switch is off."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> T:
            _require_enabled(function.__name__, introduced_with_version)
            return function(*args, **kwargs)

        return checked

    return decorate


def experimental_cls(introduced_with_version: str) -> Callable[[type[T]], type[T]]:
    """Decorator of a class that must not be constructed while the switch is off."""

    def decorate(cls: type[T]) -> type[T]:
        construct = cls.__init__

        @functools.wraps(construct)
        def checked(self: T, *args: Any, **kwargs: Any) -> None:
            _require_enabled(cls.__name__, introduced_with_version)
            construct(self, *args, **kwargs)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate


def local_multi_tensor_applier(
    op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> Any:
    """Calls ``op`` as the fused applier does, with a chunk size that these operations do not need."""
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def local_multi_tensor_l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: Any
) -> tuple[Tensor, Tensor | None]:
    """Euclidean norm of all tensors of the first list together, and of each if ``per_tensor`` (fp32)."""
    norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensor_lists[0]])
    return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else None


def local_multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> tuple[None, None]:
    """Writes ``source * scale`` into the destinations: ``tensor_lists = [sources, destinations]``."""
    sources, destinations = tensor_lists
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source * scale)
    return None, None


def get_model_type(model: torch.nn.Module) -> Any:
    """``model_type`` of a wrapped model."""
    return get_attr_wrapped_model(model, "model_type")


def get_model_xattn(model: torch.nn.Module) -> bool:
    """``xattn_needed`` of a wrapped model; False where it has none."""
    try:
        return get_attr_wrapped_model(model, "xattn_needed")
    except UsageError:
        return False


def is_submodule(module: torch.nn.Module, parent_module: torch.nn.Module, strict: bool = True) -> bool:
    """True if ``module`` itself is inside ``parent_module`` (or is the parent, unless ``strict``)."""
    if strict and module is parent_module:
        return False
    return any(child is module for child in parent_module.modules())
