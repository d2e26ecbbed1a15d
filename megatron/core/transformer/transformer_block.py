"""A stack of layers, with the recompute policy and the final norm."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.errors import UsageError
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.pipeline_layout import get_num_layers_to_build
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from megatron.core.utils import WrappedTensor


@dataclass
class TransformerBlockSubmodules:
    """One spec per layer of this stage, and the class of the final norm."""

    layer_specs: list[ModuleSpec] | None = None
    layer_norm: ModuleSpec | type | None = None


def _block_submodules(
    config: TransformerConfig, spec: TransformerBlockSubmodules | ModuleSpec
) -> TransformerBlockSubmodules:
    if isinstance(spec, TransformerBlockSubmodules):
        return spec
    module = get_module(spec)
    if issubclass(module, TransformerBlock):
        return spec.submodules
    if issubclass(module, BaseTransformerLayer):
        return TransformerBlockSubmodules([spec] * get_num_layers_to_build(config), WrappedTorchNorm)
    raise TypeError(
        f"{module.__name__} is neither a transformer layer nor a block: no spec for a TransformerBlock"
    )


class TransformerBlock(MegatronModule):
    """The layers of one stage.

    Attributes:
        layers: the layers, in order.
        final_layernorm: norm of the last stage's output, or None.
        input_tensor: activations received from the previous stage.

    Args:
        config: model config.
        spec: specs of the layers, or of one layer that is repeated.
        post_layer_norm: have a final norm (on the last stage).
        pre_process: this is the first stage.
        post_process: this is the last stage.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules | ModuleSpec,
        post_layer_norm: bool = True,
        pre_process: bool = True,
        post_process: bool = True,
    ):
        super().__init__(config)
        self.submodules = _block_submodules(config, spec)
        self.post_layer_norm = post_layer_norm
        self.pre_process, self.post_process = pre_process, post_process
        self.input_tensor: Tensor | None = None
        self.checkpoint_core_attention = config.recomputes("core_attn")
        if self.submodules.layer_specs is None:
            raise UsageError("a block is made of layer_specs: give the spec of each layer of this stage")
        self.layers = torch.nn.ModuleList(
            build_module(layer_spec, config=config, layer_number=number)
            for number, layer_spec in enumerate(self.submodules.layer_specs, start=1)
        )
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.final_layernorm = None
        if self.submodules.layer_norm is not None and post_process and post_layer_norm:
            self.final_layernorm = build_module(
                self.submodules.layer_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )

    def _get_layer(self, layer_number: int) -> torch.nn.Module:
        """The layer at a place of this stage, counted from 0."""
        return self.layers[layer_number]

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Hands in the activations received from the previous stage.  [s, b, h]"""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor | WrappedTensor,
        attention_mask: Tensor | None,
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
        apply_final_norm: bool = True,
    ) -> Tensor:
        """[s, b, h] -> [s, b, h]; a stage other than the first takes its input from ``set_input_tensor``.

        Without ``apply_final_norm`` the caller wants the output of the last layer, and norms it itself.
        """
        x = hidden_states.unwrap() if isinstance(hidden_states, WrappedTensor) else hidden_states
        if not self.pre_process:
            if self.input_tensor is None:
                raise UsageError("a later stage needs set_input_tensor() before forward()")
            x = self.input_tensor
        arguments = {
            "attention_mask": attention_mask,
            "context": context,
            "context_mask": context_mask,
            "rotary_pos_emb": rotary_pos_emb,
            "rotary_pos_cos": rotary_pos_cos,
            "rotary_pos_sin": rotary_pos_sin,
            "attention_bias": attention_bias,
            "inference_context": inference_context,
            "packed_seq_params": packed_seq_params,
            "sequence_len_offset": sequence_len_offset,
            "inference_params": inference_params,
        }
        with self._random_stream():
            for first, last in self._recompute_units():
                x = self._run_recomputed(x, first, last, arguments)
            for layer in self.layers[self._num_recomputed() :]:
                x, _ = layer(x, **arguments)
        return x if self.final_layernorm is None or not apply_final_norm else self.final_layernorm(x)

    def _random_stream(self) -> contextlib.AbstractContextManager[None]:
        """Under sequence parallelism ranks hold different activations and must drop different elements."""
        if self.config.sequence_parallel and self.training:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()

    def _num_recomputed(self) -> int:
        """How many layers, from the first on, are recomputed as a whole."""
        config = self.config
        if config.recompute_granularity != "full" or not self.training:
            return 0
        if config.recompute_method == "uniform":
            return len(self.layers)
        assert config.recompute_num_layers is not None, "the config's rules ask for it"
        return min(config.recompute_num_layers, len(self.layers))

    def _recompute_units(self) -> list[tuple[int, int]]:
        """(first, last + 1) of layers recomputed together: groups (uniform) or single ones (block)."""
        total = self._num_recomputed()
        uniform = self.config.recompute_method == "uniform"
        step = (self.config.recompute_num_layers or 1) if uniform else 1
        return [(first, min(first + step, total)) for first in range(0, total, step)]

    def _run_recomputed(
        self, hidden_states: Tensor, first: int, last: int, arguments: dict[str, Any]
    ) -> Tensor:
        """Layers ``first .. last - 1``, of which only the input is kept."""

        def run(hidden_states: Tensor) -> Tensor:
            for layer in self.layers[first:last]:
                hidden_states, _ = layer(hidden_states, **arguments)
            return hidden_states

        return tensor_parallel.checkpoint(run, bool(self.config.distribute_saved_activations), hidden_states)
