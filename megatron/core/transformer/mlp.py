"""The feed-forward part of a layer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megatron import unbuilt
from megatron.core.errors import ConfigError
from megatron.core.fusions.fused_bias_geglu import gated_gelu
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl, gelu
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module
from megatron.core.transformer.transformer_config import TransformerConfig

__getattr__ = unbuilt.names_of(__name__)


@dataclass
class MLPSubmodules:
    """Slots of an MLP: projections to the inner width and back."""

    linear_fc1: ModuleSpec | type | None = None
    linear_fc2: ModuleSpec | type | None = None


class MLP(MegatronModule):
    """``fc2(activation(fc1(x)))``, with a gate if the config asks for one: fc1 then gives [gate; up], and
    every rank has its slice of both.

    GELU is the exact form; with ``bias_activation_fusion`` it is the tanh form, as the fused kernel of the
    original computes it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        is_expert: bool = False,
        input_size: int | None = None,
    ):
        super().__init__(config)
        self.input_size = config.hidden_size if input_size is None else input_size
        inner = config.moe_ffn_hidden_size if is_expert else config.ffn_hidden_size
        if inner is None:
            raise ConfigError(
                "moe_ffn_hidden_size: unset, but this MLP is an expert; set it, or num_moe_experts"
            )
        self.linear_fc1 = build_module(
            submodules.linear_fc1,
            self.input_size,
            2 * inner if config.gated_linear_unit else inner,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear,
            skip_bias_add=True,
            is_expert=is_expert,
            tp_comm_buffer_name="fc1",
            **({"stride": 2} if config.gated_linear_unit and takes_stride(submodules.linear_fc1) else {}),
        )
        self.activation_func = config.activation_func
        self.linear_fc2 = build_module(
            submodules.linear_fc2,
            inner,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=is_expert,
            tp_comm_buffer_name="fc2",
        )

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h], and the bias of fc2 for the caller to add.

        Args:
            hidden_states: input.
            per_token_scale: [s, b] factor of each token's activation.
        """
        inner, bias = self.linear_fc1(hidden_states)
        inner = self._activate(inner, bias)
        if per_token_scale is not None:
            inner = (inner * per_token_scale.unsqueeze(-1)).to(inner.dtype)
        return self.linear_fc2(inner)

    def _activate(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return activate(self.config, self.activation_func, x, bias)


def activate(
    config: TransformerConfig, activation_func: Callable[..., Tensor], x: Tensor, bias: Tensor | None
) -> Tensor:
    """The activation of ``x + bias``, with the gate if the config has one.

    [..., f] -> [..., f], or [..., 2f] -> [..., f] with a gate.
    """
    is_gelu, fused = activation_func is F.gelu, config.bias_activation_fusion
    if not config.gated_linear_unit:
        if fused and is_gelu and bias is not None:
            return bias_gelu_impl(x, bias)
        x = _add(x, bias)
        return gelu(x, "none") if is_gelu else activation_func(x)
    x = _add(x, bias)
    if is_gelu:
        return gated_gelu(x, "tanh" if fused else "none", config.glu_gate_last)
    if activation_func is F.silu and not config.glu_gate_last:
        return swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    if config.glu_gate_last:
        gate, up = up, gate
    return activation_func(gate) * up


def takes_stride(spec: ModuleSpec | type | None) -> bool:
    """False for layers of others with the constructor of TransformerEngine, which fill themselves."""
    return spec is not None and "stride" in inspect.signature(get_module(spec)).parameters


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
