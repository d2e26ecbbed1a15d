"""Layers that predict further tokens, behind the last layer of a model (DeepSeek-V3, section 2.2).

Depth k sees the tokens up to k positions ahead and predicts the one after them. All depths share the
embedding and the output layer with the model itself.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat, nn, ones_like

from megatron import unbuilt
from megatron.core import tensor_parallel
from megatron.core.errors import ConfigError, UsageError
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import is_pipeline_last_stage
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.mtp_losses import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
    attach_loss,
    next_tokens,
    roll_tensor,
)
from megatron.core.transformer.pipeline_layout import get_num_layers_to_build, get_transformer_layer_offset
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

__getattr__ = unbuilt.names_of(__name__)

__all__ = [
    "SUPPORTED_ATTN_MASK",
    "MTPLossAutoScaler",
    "MTPLossLoggingHelper",
    "MultiTokenPredictionBlock",
    "MultiTokenPredictionBlockSubmodules",
    "MultiTokenPredictionLayer",
    "MultiTokenPredictionLayerSubmodules",
    "get_mtp_layer_offset",
    "get_mtp_layer_spec",
    "get_mtp_num_layers_to_build",
    "roll_tensor",
]

Spec = ModuleSpec | type

SUPPORTED_ATTN_MASK = [
    AttnMaskType.padding,
    AttnMaskType.causal,
    AttnMaskType.no_mask,
    AttnMaskType.padding_causal,
]


@dataclass
class MultiTokenPredictionLayerSubmodules:
    """Slots of one depth: norms of embedding and hidden state, what joins them, a layer, the final norm."""

    enorm: Spec | None = None
    hnorm: Spec | None = None
    eh_proj: Spec | None = None
    transformer_layer: Spec | None = None
    layer_norm: Spec | None = None


@dataclass
class MultiTokenPredictionBlockSubmodules:
    """One spec per depth."""

    layer_specs: list[ModuleSpec] | None = None


def get_mtp_layer_spec(transformer_layer_spec: ModuleSpec, use_transformer_engine: bool) -> ModuleSpec:
    """One depth around a layer of this spec; the choice is between two sets of parameter names."""
    norm = TENorm if use_transformer_engine else WrappedTorchNorm
    return ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            eh_proj=TEColumnParallelLinear if use_transformer_engine else ColumnParallelLinear,
            transformer_layer=transformer_layer_spec,
            layer_norm=norm,
        ),
    )


def get_mtp_num_layers_to_build(config: TransformerConfig) -> int:
    """Depths on this (virtual) stage: all on the last one, 0 on the others."""
    is_last = config.pipeline_model_parallel_size == 1 or is_pipeline_last_stage()
    return (config.mtp_num_layers or 0) if is_last else 0


class MultiTokenPredictionLayer(MegatronModule):
    """One depth: joins the hidden state with the embedding of the next token, runs a layer, norms.

    Args:
        config: model config.
        submodules: slots.
        layer_number: depth, from 1.

    Raises:
        ConfigError: the layer's attention has a mask of a kind that this cannot handle.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        layer_number: int = 1,
    ):
        super().__init__(config)
        self.sequence_parallel = config.sequence_parallel
        self.submodules = submodules
        self.layer_number = layer_number
        _check_mask(submodules.transformer_layer)
        with tensor_parallel.weight_scope("mtp", layer_number):
            self._build()

    def _build(self) -> None:
        config, submodules = self.config, self.submodules
        self.enorm = self._norm(submodules.enorm)
        self.hnorm = self._norm(submodules.hnorm)
        # Every rank makes a slice of the channels.  [h, 2h]
        self.eh_proj = build_module(
            submodules.eh_proj,
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )
        # Numbered after the layers of the model: what is kept per layer keeps them apart.
        number = config.num_layers + self.layer_number - get_transformer_layer_offset(config)
        self.transformer_layer = build_module(
            submodules.transformer_layer, config=config, layer_number=number
        )
        self.final_layernorm = self._norm(submodules.layer_norm)

    def _norm(self, spec: Spec | None) -> Any:
        config = self.config
        return build_module(spec, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self,
        decoder_input: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | None = None,
    ) -> Tensor:
        """The hidden state of the next depth, behind its norm.

        Args:
            decoder_input: [s, b, h] (under sequence parallelism [s/TP, b, h]), embeddings of the tokens that
                follow those of ``hidden_states``.
            hidden_states: of the same shape, from the depth before.
        """
        hidden_states = self.hidden_states(
            decoder_input,
            hidden_states,
            attention_mask=attention_mask,
            context=context,
            context_mask=context_mask,
            rotary_pos_emb=rotary_pos_emb,
            rotary_pos_cos=rotary_pos_cos,
            rotary_pos_sin=rotary_pos_sin,
            attention_bias=attention_bias,
            inference_params=inference_params,
            packed_seq_params=packed_seq_params,
            sequence_len_offset=sequence_len_offset,
        )
        return self.final_layernorm(hidden_states)

    def hidden_states(self, decoder_input: Tensor, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """As ``forward``, before the norm; ``arguments`` are those of a layer."""
        if arguments.get("context") is not None:
            raise UsageError("multi-token prediction has no cross attention: leave context out")
        if arguments.get("packed_seq_params") is not None:
            raise UsageError(
                "multi-token prediction takes no packed sequences: leave packed_seq_params or mtp_num_layers "
                "out"
            )

        def run(decoder_input: Tensor, hidden_states: Tensor) -> Tensor:
            joined = self._join(decoder_input, hidden_states)
            return self.transformer_layer(joined, **arguments)[0]

        with self._random_stream():
            if self._is_recomputed():
                share = bool(self.config.distribute_saved_activations)
                return tensor_parallel.checkpoint(run, share, decoder_input, hidden_states)
            return run(decoder_input, hidden_states)

    def _join(self, decoder_input: Tensor, hidden_states: Tensor) -> Tensor:
        """[s, b, h] twice -> [s, b, h], or [s/TP, b, h] twice -> [s/TP, b, h]"""
        both = cat((self.enorm(decoder_input), self.hnorm(hidden_states)), dim=-1)
        # [s, b, h/TP], also under sequence parallelism
        channels, _ = self.eh_proj(both)
        if not self.sequence_parallel:
            return tensor_parallel.gather_from_tensor_model_parallel_region(channels)
        return tensor_parallel.all_to_all_hp2sp(channels).view_as(hidden_states)

    def _is_recomputed(self) -> bool:
        """Whether the depth is among the recomputed layers of its stage, which it comes after."""
        config = self.config
        if config.recompute_granularity != "full" or not self.training:
            return False
        before = get_num_layers_to_build(config) + self.layer_number - 1
        return config.recompute_method == "uniform" or before < (config.recompute_num_layers or 0)

    def _random_stream(self) -> contextlib.AbstractContextManager[None]:
        """As in the model's own layers."""
        if self.config.sequence_parallel and self.training:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


def _check_mask(spec: Spec | None) -> None:
    attention = getattr(getattr(spec, "submodules", None), "self_attention", None)
    kind = getattr(attention, "params", {}).get("attn_mask_type", AttnMaskType.causal)
    if kind not in SUPPORTED_ATTN_MASK:
        raise ConfigError(
            f"attn_mask_type {kind.name} of a layer that predicts further tokens: use one of "
            f"{', '.join(each.name for each in SUPPORTED_ATTN_MASK)}"
        )


class MultiTokenPredictionBlock(MegatronModule):
    """All depths, one after the other.

    With ``config.mtp_after_norm`` a depth continues from the output of the norm before it (the decoder's or
    that of the depth before), as Megatron does; without, from the input of that norm, which then serves the
    output layer alone.

    Args:
        config: model config.
        spec: a spec per depth.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: MultiTokenPredictionBlockSubmodules | TransformerBlockSubmodules | ModuleSpec,
    ):
        super().__init__(config)
        self.submodules = _block_submodules(spec)
        if config.mtp_loss_scaling_factor is None:
            raise ConfigError("mtp_loss_scaling_factor: unset; give the weight of the losses, such as 0.1")
        self.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor
        self.layers = nn.ModuleList(
            build_module(layer_spec, config=config, layer_number=number)
            for number, layer_spec in enumerate(self.submodules.layer_specs, 1)
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        runtime_gather_output: bool | None = None,
        loss_mask: Tensor | None = None,
        embedding: Callable[..., Tensor] | None = None,
        output_layer: Callable[..., tuple[Tensor, Any]] | None = None,
        output_weight: Tensor | None = None,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The hidden state of the model, whose backward also differentiates the losses of all depths.

        Args:
            input_ids, labels: [b, s] of the model itself.
            position_ids: [b, s] or None.
            hidden_states: [s, b, h] of the last layer, before or after the final norm.
            loss_mask: [b, s], 1 where a token counts; default everywhere.
            embedding: ``(input_ids=, position_ids=)`` -> [s, b, h].
            output_layer: ``(hidden_states, weight=, runtime_gather_output=)`` -> (logits, bias).
            output_weight: of the output layer, where it is tied.
            compute_language_model_loss: ``(labels, logits)`` -> [b, s].
        """
        if labels is None or embedding is None or output_layer is None or compute_language_model_loss is None:
            raise UsageError(
                "multi-token prediction computes losses: pass labels, embedding, output_layer and "
                "compute_language_model_loss"
            )
        loss_mask = ones_like(labels) if loss_mask is None else loss_mask
        main, arguments = (
            hidden_states,
            {
                "attention_mask": attention_mask,
                "context": context,
                "context_mask": context_mask,
                "rotary_pos_emb": rotary_pos_emb,
                "rotary_pos_cos": rotary_pos_cos,
                "rotary_pos_sin": rotary_pos_sin,
                "attention_bias": attention_bias,
                "inference_params": inference_params,
                "packed_seq_params": packed_seq_params,
                "sequence_len_offset": sequence_len_offset,
                **(extra_block_kwargs or {}),
            },
        )
        layers: Any = self.layers  # of the class that the spec names
        for depth, layer in enumerate(layers):
            input_ids, labels, loss_mask = (next_tokens(each) for each in (input_ids, labels, loss_mask))
            decoder_input = embedding(input_ids=input_ids, position_ids=position_ids)
            if self.config.mtp_after_norm:
                hidden_states = normed = layer(decoder_input, hidden_states, **arguments)
            else:
                hidden_states = layer.hidden_states(decoder_input, hidden_states, **arguments)
                normed = layer.final_layernorm(hidden_states)
            # The loss is made of logits that are split over ranks, whoever wants them whole otherwise.
            logits, _ = output_layer(normed, weight=output_weight, runtime_gather_output=False)
            main = attach_loss(
                main,
                compute_language_model_loss(labels, logits),
                loss_mask,
                depth,
                len(self.layers),
                self.mtp_loss_scaling_factor,
                self.config.calculate_per_token_loss,
            )
        return main


def _block_submodules(spec: Any) -> Any:
    """What lists the layers, from itself or from the spec of a block."""
    submodules = spec.submodules if isinstance(spec, ModuleSpec) else spec
    if not getattr(submodules, "layer_specs", None):
        raise ConfigError(
            f"{spec!r} lists no layers: make the spec with get_gpt_mtp_block_spec() of "
            "megatron.core.models.gpt.gpt_layer_specs"
        )
    return submodules


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def get_mtp_layer_offset(config: TransformerConfig) -> int:
    """Depths on earlier stages: 0, because the last stage has all of them."""
    return 0
