"""Base class of all modules, and the wrapper that runs a model in half precision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.unbuilt.placeholders import WithoutShardedState

_HALVES = (torch.float16, torch.bfloat16)


def param_is_not_shared(param: Tensor) -> bool:
    """True unless the parameter is a copy of one that another stage owns."""
    return not getattr(param, "shared", False)


class MegatronModule(WithoutShardedState, torch.nn.Module):
    """A module that keeps its config."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """What goes into a checkpoint: the state dict, unless a class says otherwise."""
        return self.state_dict(prefix=prefix, keep_vars=keep_vars)

    def set_is_first_microbatch(self) -> None:
        """Hint for fp8 weight caches, of which there are none here."""


def conversion_helper(val: Any, conversion: Callable[[Any], Any]) -> Any:
    """``conversion`` of every leaf of nested tuples and lists."""
    if isinstance(val, tuple | list):
        return type(val)(conversion_helper(item, conversion) for item in val)
    return conversion(val)


def fp32_to_float16(val: Any, float16_convertor: Callable[[Tensor], Tensor]) -> Any:
    """fp32 tensors of a nest through ``float16_convertor``; everything else as it is."""

    def convert(leaf: Any) -> Any:
        is_wide = isinstance(leaf, Tensor) and leaf.dtype == torch.float32
        return float16_convertor(leaf) if is_wide else leaf

    return conversion_helper(val, convert)


def float16_to_fp32(val: Any) -> Any:
    """Half-precision tensors of a nest as fp32; everything else as it is."""

    def convert(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in _HALVES else leaf

    return conversion_helper(val, convert)


class Float16Module(MegatronModule):
    """Runs a model in fp16 or bf16.

    The model's parameters are cast; fp32 inputs are cast on the first stage, outputs widened to fp32 on the
    last. State dicts are the model's own.

    Attributes:
        module: the model.
        fp16, bf16: which of the two.
    """

    # A model brings methods of its own, which torch.nn.Module does not have.
    module: Any

    def __init__(self, config: TransformerConfig, module: torch.nn.Module):
        super().__init__(config)
        if config.fp16 == config.bf16:
            raise ConfigError("Float16Module needs exactly one of config.fp16 and config.bf16")
        self.fp16, self.bf16 = config.fp16, config.bf16
        self.dtype = torch.float16 if config.fp16 else torch.bfloat16
        self.add_module("module", module.to(self.dtype))

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hands the previous stage's activations to the model."""
        self.module.set_input_tensor(input_tensor)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if getattr(self.module, "pre_process", True):
            inputs = fp32_to_float16(inputs, lambda tensor: tensor.to(self.dtype))
        outputs = self.module(*inputs, **kwargs)
        return float16_to_fp32(outputs) if getattr(self.module, "post_process", True) else outputs

    def state_dict(
        self, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        return self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        return self.module.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any:
        return self.module.load_state_dict(state_dict, strict=strict)
