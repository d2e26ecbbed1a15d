"""One layer: attention and MLP, each behind a norm and a residual connection."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.context_parallel.attention import comm_type_of_layer
from megatron.core.errors import NotBuiltYetError
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.pipeline_layout import get_transformer_layer_offset
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

Spec = ModuleSpec | type


@dataclass
class TransformerLayerSubmodules:
    """Slots of a layer.  ``*_bda`` slots hold ``f(training, fused)(x_with_bias, residual, p)``."""

    input_layernorm: Spec = IdentityOp
    self_attention: Spec = IdentityOp
    self_attn_bda: Spec | Callable[..., Any] = IdentityFuncOp
    pre_cross_attn_layernorm: Spec = IdentityOp
    cross_attention: Spec = IdentityOp
    cross_attn_bda: Spec | Callable[..., Any] = IdentityFuncOp
    pre_mlp_layernorm: Spec = IdentityOp
    mlp: Spec = IdentityOp
    mlp_bda: Spec | Callable[..., Any] = IdentityFuncOp
    # Prefixes of parameter names that distributed checkpoints spell differently
    sharded_state_dict_keys_map: dict[str, str] = field(default_factory=dict)
    post_attn_norm: Spec = IdentityOp
    post_mlp_layernorm: Spec = IdentityOp


class BaseTransformerLayer(ABC):  # noqa: B024  (a marker)
    """Marks layer classes: a block spec with such a module stands for a stack of them."""


class TransformerLayer(MegatronModule, BaseTransformerLayer):
    """A pre-norm layer.

    h = x + dropout(attention(norm(x)) + bias);  y = h + dropout(mlp(norm(h)) + bias). With
    ``apply_residual_connection_post_layernorm`` the norms' outputs take the place of x and h as residuals.
    Post norms, where the spec has them, act on the outputs of attention and MLP; biases come after them.

    Args:
        config: model config.
        submodules: slots.
        layer_number: counted from 1 within the stage; the attribute counts over the whole model.
        hidden_dropout: probability; default the config's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
    ):
        super().__init__(config)
        self.submodules_config = submodules
        self.layer_number = layer_number + get_transformer_layer_offset(config)
        self.hidden_dropout = config.hidden_dropout if hidden_dropout is None else hidden_dropout
        if submodules.cross_attention is not IdentityOp:
            raise NotBuiltYetError("cross attention")
        with tensor_parallel.weight_scope("decoder", self.layer_number):
            self._build(submodules)
        # A norm's output that also serves as residual stays alive anyway.
        self.recompute_norms = (
            config.recomputes("layernorm") and not config.apply_residual_connection_post_layernorm
        )
        # A layer of experts decides for itself: ``recompute_modules`` calls it moe.
        self.recompute_mlp = config.recomputes("mlp") and not isinstance(self.mlp, BaseMoELayer)

    def _build(self, submodules: TransformerLayerSubmodules) -> None:
        """The modules of the layer, in the order that numbers their weights."""
        self.input_layernorm = self._norm(submodules.input_layernorm)
        # Attention classes of users' specs need not know of context parallelism.
        split = self.config.context_parallel_size > 1
        exchange = {"cp_comm_type": comm_type_of_layer(self.config, self.layer_number)} if split else {}
        self.self_attention = build_module(
            submodules.self_attention, config=self.config, layer_number=self.layer_number, **exchange
        )
        self.self_attn_bda = build_module(submodules.self_attn_bda)
        self.pre_mlp_layernorm = self._norm(submodules.pre_mlp_layernorm)
        self.mlp = build_module(submodules.mlp, config=self.config)
        if isinstance(self.mlp, BaseMoELayer):
            self.mlp.set_layer_number(self.layer_number)
        self.mlp_bda = build_module(submodules.mlp_bda)
        self.post_attn_norm = self._norm(submodules.post_attn_norm)
        self.post_mlp_layernorm = self._norm(submodules.post_mlp_layernorm)

    def _norm(self, spec: Spec) -> Any:
        config = self.config
        return build_module(spec, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | None = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h], and ``context`` as it came."""

        def attend(normed: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = self.self_attention(
                normed,
                attention_mask=attention_mask,
                inference_context=inference_context,
                rotary_pos_emb=rotary_pos_emb,
                rotary_pos_cos=rotary_pos_cos,
                rotary_pos_sin=rotary_pos_sin,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                sequence_len_offset=sequence_len_offset,
                inference_params=inference_params,
            )
            return self.post_attn_norm(output), bias

        hidden_states = self._sublayer(hidden_states, self.input_layernorm, attend, self.self_attn_bda)
        hidden_states = self._sublayer(hidden_states, self.pre_mlp_layernorm, self._run_mlp, self.mlp_bda)
        return hidden_states, context

    def _sublayer(
        self,
        x: Tensor,
        norm: Any,
        function: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        bias_dropout_add: Callable[..., Callable[..., Tensor]],
    ) -> Tensor:
        """``residual + dropout(function(norm(x)))``.  [s, b, h] -> [s, b, h]"""
        recompute = None
        if self.recompute_norms and self.training and not isinstance(norm, IdentityOp):
            recompute = CheckpointWithoutOutput()
            normed = recompute.checkpoint(norm, x)
        else:
            normed = norm(x)
        output, bias = function(normed)
        if recompute is not None:
            recompute.discard_output_and_register_recompute(output)
        residual = normed if self.config.apply_residual_connection_post_layernorm else x
        if self.config.fp32_residual_connection:
            residual = residual.float()
        combine = bias_dropout_add(self.training, self.config.bias_dropout_fusion)
        return combine((output, bias), residual, self.hidden_dropout)

    def _run_mlp(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.recompute_mlp and self.training:
            return tensor_parallel.checkpoint(self._mlp_with_bias, False, normed), None
        output, bias = self.mlp(normed)
        return self.post_mlp_layernorm(output), bias

    def _mlp_with_bias(self, normed: Tensor) -> Tensor:
        """A parameter must not be an output of a recomputed function, so the bias is added inside."""
        output, bias = self.mlp(normed)
        output = self.post_mlp_layernorm(output)
        return output if bias is None else output + bias
