"""Modules with TransformerEngine's constructors and parameter names, made of this package's own functions.

Specs and checkpoints written for TransformerEngine work on any device with them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron import unbuilt
from megatron.core.context_parallel.zigzag import own_place
from megatron.core.errors import ConfigError
from megatron.core.fusions.embeddings import rotary
from megatron.core.fusions.fused_cross_entropy import split_cross_entropy
from megatron.core.fusions.fused_layer_norm import NORMS, layer_norm, rms_norm
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.tensor_parallel.initial_weights import InitMethod, new_bias, new_weight
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, LinearBase, RowParallelLinear
from megatron.core.tensor_parallel.random import (
    CheckpointWithoutOutput,
    CudaRNGStatesTracker,
    checkpoint,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.experts import GroupedLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils.tensors import mark

__getattr__ = unbuilt.names_of(__name__)

__all__ = [
    "TEColumnParallelGroupedLinear",
    "TEColumnParallelLinear",
    "TECudaRNGStatesTracker",
    "TEDotProductAttention",
    "TEGroupedLinear",
    "TELayerNormColumnParallelLinear",
    "TELinear",
    "TENorm",
    "TERowParallelGroupedLinear",
    "TERowParallelLinear",
    "fused_apply_rotary_pos_emb",
    "te_checkpoint",
    "te_parallel_cross_entropy",
]


# parallel_mode -> dimension of the weight [out, in] that is split
_SPLIT_DIMENSIONS = {"column": 0, "row": 1, "duplicated": None, None: None}


class TENorm:
    """Factory: constructing it gives the LayerNorm or RMSNorm that ``config.normalization`` asks for."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        return NORMS[config.normalization](config, hidden_size, eps)


def _refuse_gathering(gather_output: bool) -> None:
    if gather_output:
        raise ConfigError("gather_output: not offered by this layer; use ColumnParallelLinear")


class TEColumnParallelLinear(ColumnParallelLinear):
    """A linear layer whose outputs are split over the group, ``stride`` parts one by one; it never gathers
    them.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        stride: int = 1,
    ):
        _refuse_gathering(gather_output)
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            skip_weight_param_allocation=skip_weight_param_allocation,
            tp_comm_buffer_name=tp_comm_buffer_name,
            stride=stride,
        )


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    """A norm and a linear layer in one module: ``layer_norm_weight``, ``layer_norm_bias``, ``weight``,
    ``bias``.

    The norm is ``config.normalization``. With selective recomputation of ``layernorm``, its output is not
    kept.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        stride: int = 1,
    ):
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            gather_output=gather_output,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            skip_weight_param_allocation=skip_weight_param_allocation,
            tp_comm_buffer_name=tp_comm_buffer_name,
            stride=stride,
        )
        norm = NORMS[config.normalization](config, input_size, config.layernorm_epsilon)
        self.eps = norm.eps
        self.zero_centered_gamma = norm.zero_centered_gamma
        self.layer_norm_weight = norm.weight
        self.layer_norm_bias = getattr(norm, "bias", None)
        self.recompute_norm = config.recomputes("layernorm")

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As of :class:`ColumnParallelLinear`, of what the norm makes of ``input_``."""
        if not (self.recompute_norm and self.training):
            return super().forward(self._normed(input_), weight, runtime_gather_output)
        recompute = CheckpointWithoutOutput()
        normed = recompute.checkpoint(self._normed, input_)
        output, bias = super().forward(normed, weight, runtime_gather_output)
        recompute.discard_output_and_register_recompute(output)
        return output, bias

    def _normed(self, x: Tensor) -> Tensor:
        scale = self.layer_norm_weight + 1 if self.zero_centered_gamma else self.layer_norm_weight
        if self.layer_norm_bias is None:
            return rms_norm(x, scale, self.eps)
        return layer_norm(x, scale, self.layer_norm_bias, self.eps)


class TERowParallelLinear(RowParallelLinear):
    """A linear layer whose inputs are split over the group."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
    ):
        if not input_is_parallel:
            raise ConfigError("input_is_parallel=False: not offered by this layer; use RowParallelLinear")
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            input_is_parallel=input_is_parallel,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_comm_buffer_name=tp_comm_buffer_name,
        )


class TEGroupedLinear(GroupedLinear):
    """Linear layers of several groups of rows; ``parallel_mode`` as in :class:`TELinear`."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        stride: int = 1,
    ):
        if parallel_mode not in _SPLIT_DIMENSIONS:
            raise ConfigError(f"parallel_mode: {parallel_mode!r} is not column, row, duplicated or None")
        super().__init__(
            num_gemms,
            input_size,
            output_size,
            split_dim=_SPLIT_DIMENSIONS[parallel_mode],
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_comm_buffer_name=tp_comm_buffer_name,
            stride=stride,
        )


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    """Grouped linear layers whose outputs are split, ``stride`` parts one by one."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        stride: int = 1,
    ):
        super().__init__(
            num_gemms,
            input_size,
            output_size,
            parallel_mode="column",
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_comm_buffer_name=tp_comm_buffer_name,
            stride=stride,
        )


class TERowParallelGroupedLinear(TEGroupedLinear):
    """Grouped linear layers whose inputs are split."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
    ):
        super().__init__(
            num_gemms,
            input_size,
            output_size,
            parallel_mode="row",
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_comm_buffer_name=tp_comm_buffer_name,
        )


class TELinear(LinearBase):
    """A linear layer; ``parallel_mode`` says what is split over the group: "column" its outputs, "row" its
    inputs, None or "duplicated" nothing: every rank has the whole weight and works on what it is given.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        skip_weight_param_allocation: bool,
        tp_comm_buffer_name: str | None = None,
        is_expert: bool = False,
    ):
        if parallel_mode not in _SPLIT_DIMENSIONS:
            raise ConfigError(f"parallel_mode: {parallel_mode!r} is not column, row, duplicated or None")
        if skip_weight_param_allocation:
            raise ConfigError("skip_weight_param_allocation: not offered by this layer; it needs its weight")
        super().__init__(config, (input_size, output_size), skip_bias_add, is_expert)
        self.parallel_mode = parallel_mode
        self.weight, _ = new_weight(
            config, (output_size, input_size), _SPLIT_DIMENSIONS[parallel_mode], init_method, self.place
        )
        is_column = parallel_mode == "column"
        self.bias = new_bias(config, output_size, is_column, self.place) if bias else None
        # Whole parameters that see a part of the sequence: their gradients are summed over the ranks.
        if self.bias is not None and not is_column:
            mark(self.bias, sequence_parallel=self.sequence_parallel)
        if _SPLIT_DIMENSIONS[parallel_mode] is None:
            mark(self.weight, sequence_parallel=self.sequence_parallel)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], of which one is split with "column" or "row"; and the bias or None."""
        if self.parallel_mode == "row":
            return self._linear_then_sum(input_, self.weight)
        reduces = self.parallel_mode == "column" and self.communicates
        out = self._linear(input_, self.weight, None if self.skip_bias_add else self.bias, reduces)
        return out, self.bias if self.skip_bias_add else None


class TEDotProductAttention(DotProductAttention):
    """Core attention with TransformerEngine's constructor."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = "p2p",
    ):
        super().__init__(
            config,
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout,
            softmax_scale,
            cp_comm_type,
            k_channels,
            v_channels,
        )


# Kernels of TransformerEngine that callers test for None before they use them.
Fp8Padding = Fp8Unpadding = SplitAlongDim = None
fused_permute = fused_permute_with_probs = fused_unpermute = None
fused_sort_chunks_by_index = fused_sort_chunks_by_index_with_probs = None


def condition_init_method(config: TransformerConfig, init_method: InitMethod) -> InitMethod:
    """``init_method``, or one that leaves the weight as it is without ``config.perform_initialization``."""
    return init_method if config.perform_initialization else (lambda weight: None)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


class TECudaRNGStatesTracker(CudaRNGStatesTracker):
    """Named random streams; there is one kind here."""

    def __init__(self, is_inference_rng_tracker: bool = False):
        super().__init__(is_inference_rng_tracker=is_inference_rng_tracker)


def te_checkpoint(
    forward_func: Callable[..., Any],
    distribute_saved_activations: bool,
    get_rng_state_tracker: Callable[..., CudaRNGStatesTracker],
    tp_group: ProcessGroup | None,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    rotary_pos_emb: Tensor | None,
) -> Any:
    """``forward_func`` of the last five arguments, recomputed in backward.

    The tracker and the tensor-parallel group are this process's own, so those two arguments have no effect.
    """
    arguments = (hidden_states, attention_mask, context, context_mask, rotary_pos_emb)
    return checkpoint(forward_func, distribute_saved_activations, *arguments)


def te_parallel_cross_entropy(logits: Tensor, labels: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Per-token loss, fp32.  logits: [s, b, v/TP], labels: [s, b] -> [s, b]."""
    return split_cross_entropy(logits, labels, 0.0, tp_group)


def fused_apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """Rotates the first channels of every head.  t: [s, b, n, d], freqs: [s, 1, 1, d_rot].

    ``transpose_output_memory`` gives the result the memory order of [b, s, n, d].
    """
    width = freqs.shape[-1]
    rotated = rotary(t[..., :width], freqs.cos().to(t.dtype), freqs.sin().to(t.dtype), interleaved)
    out = torch.cat((rotated, t[..., width:]), dim=-1)
    return out.transpose(0, 1).contiguous().transpose(0, 1) if transpose_output_memory else out


def fused_apply_rotary_pos_emb_thd(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int = 1, cp_rank: int = 0
) -> Tensor:
    """The same for packed sequences.

    Args:
        t: rows of all sequences that this context-parallel rank holds, [t, n, d].
        cu_seqlens: where sequences begin, and where the last one ends.
        freqs: angles of all positions.
        cp_size, cp_rank: this rank's place; it has to be what ``parallel_state`` says.
    """
    if (cp_rank, cp_size) != own_place():
        raise ConfigError(f"rank {cp_rank} of {cp_size} is not this process's context-parallel place")
    return _apply_rotary_pos_emb_thd(t, cu_seqlens, freqs)
