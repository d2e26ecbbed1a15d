"""Core attention: queries, keys and values in, weighted values out; no parameters."""

import contextlib
import math

import torch
from torch import Tensor

from megatron.core import accelerator
from megatron.core.context_parallel.attention import ContextParallelAttention, comm_type_of_layer
from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.fusions.fused_attention import fused_attention, masked_keys, packed_attention
from megatron.core.fusions.fused_bias_dropout import dropout
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax, soft_cap
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import attention_mask_func
from megatron.core.utils import divide

FUSED_BACKENDS = (AttnBackend.auto, AttnBackend.flash, AttnBackend.fused)
CAUSAL_TYPES = (AttnMaskType.causal, AttnMaskType.padding_causal)


class DotProductAttention(MegatronModule):
    """``softmax(masked(cap(scale * Q K^T))) V``, in one fused operation or in explicit steps.

    The soft cap is ``config.attn_logit_softcapping``, applied in fp32 by both; without one there is none.

    ``config.attention_backend`` chooses: auto, flash and fused take the fused function of this device,
    unfused and local the steps. Both mask the same keys: those after the query (causal types), those outside
    ``config.window_size``, and those marked in ``attention_mask``.

    Args:
        config: model config.
        layer_number: global, counted from 1; divides the scores under ``apply_query_key_layer_scaling``.
        attn_mask_type: which keys a query may see.
        attention_type: ``"self"`` or ``"cross"``.
        attention_dropout: probability; default the config's.
        softmax_scale: factor in front of the scores; default the config's, or 1 / sqrt(head width).
        cp_comm_type: exchange between context-parallel ranks; default the config's for this layer.
        k_channels, v_channels: widths of a query/key head and of a value head; default the config's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        super().__init__(config)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.fused = config.attention_backend in FUSED_BACKENDS
        width = config.kv_channels if k_channels is None else k_channels
        assert width is not None, "the config fills it in"
        scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.softmax_scale = 1.0 / math.sqrt(width) if scale is None else scale
        # Dividing by the layer number keeps fp16 scores small; the softmax multiplies it back in fp32.
        self.coefficient = self.layer_number if config.apply_query_key_layer_scaling else None
        self.scale_mask_softmax = FusedScaleMaskSoftmax(
            input_in_fp16=config.fp16,
            input_in_bf16=config.bf16,
            attn_mask_type=AttnMaskType.padding,  # masks are made here
            scaled_masked_softmax_fusion=config.masked_softmax_fusion,
            mask_func=attention_mask_func,
            softmax_in_fp32=config.attention_softmax_in_fp32,
            # Capped scores are small, and are so only once they have their true size.
            scale=None if config.attn_logit_softcapping else self.coefficient,
        )
        self.split: ContextParallelAttention | None = None
        if config.context_parallel_size > 1:
            kind = cp_comm_type or comm_type_of_layer(config, self.layer_number)
            self.split = ContextParallelAttention(config, kind)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of every head.

        Args:
            query: [sq, b, n, d].
            key: [sk, b, g, d], g dividing n.
            value: [sk, b, g, dv].
            attention_mask: bool [b or 1, 1, sq, sk], True masks; or None. Where context-parallel ranks share
                the sequence, operands are this rank's chunks and the mask has all keys: [.., sq, sk*CP].
            attn_mask_type: overrides the layer's own.
            packed_seq_params: the sequences of a packed row, b = 1; then there is no other mask.

        Returns:
            [sq, b, n*dv]
        """
        if attention_bias is not None:
            raise NotBuiltYetError("a bias on attention scores", remedy="Pass attention_bias=None.")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        causal = mask_type in CAUSAL_TYPES
        dropout_p = self.attention_dropout if self.training else 0.0
        if packed_seq_params is not None:
            with self._random_stream(dropout_p):
                return self._packed(
                    query, key, value, attention_mask, packed_seq_params, causal=causal, dropout_p=dropout_p
                )
        compute = self._fused if self.fused else self._unfused
        with self._random_stream(dropout_p):
            if self.split is None:
                return compute(query, key, value, attention_mask, causal, dropout_p)
            return self.split(
                query,
                key,
                value,
                attention_mask,
                causal=causal,
                softmax_scale=self.softmax_scale,
                dropout_p=dropout_p,
                whole=compute,
            )

    def _random_stream(self, dropout_p: float) -> contextlib.AbstractContextManager[None]:
        """Dropout of split heads differs between ranks; under sequence parallel the caller sees to that."""
        if dropout_p > 0.0 and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        params: PackedSeqParams,
        *,
        causal: bool,
        dropout_p: float,
    ) -> Tensor:
        """Boundaries on the CPU cost no waiting for the device."""
        if self.split is not None:
            raise NotBuiltYetError("attention over packed sequences that ranks share")
        if mask is not None or q.shape[1] != 1 or params.qkv_format != "thd":
            raise ConfigError(
                f"packed sequences are one row of format 'thd' without a mask of their own, not {q.shape[1]} "
                f"rows of format {params.qkv_format!r}{'' if mask is None else ' with a mask'}"
            )
        if params.cu_seqlens_q_padded is not None or params.cu_seqlens_kv_padded is not None:
            raise NotBuiltYetError(
                "padding between packed sequences", remedy="Leave the cu_seqlens_*_padded fields out."
            )
        starts = (params.cu_seqlens_q, params.cu_seqlens_kv)
        query_ends, key_ends = (t.tolist()[1:] for t in starts if t is not None)
        out = packed_attention(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            query_ends=query_ends,
            key_ends=key_ends,
            causal=causal,
            window=self.config.window_size,
            softmax_scale=self.softmax_scale,
            dropout_p=dropout_p,
            softcap=self.config.attn_logit_softcapping,
        )
        # [t, n, dv] -> [t, 1, n*dv]
        return out.flatten(1).unsqueeze(1)

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float
    ) -> Tensor:
        layout = self.config.attention_layout
        out = fused_attention(
            _flatten_heads(q, layout),
            _flatten_heads(k, layout),
            _flatten_heads(v, layout),
            num_heads=q.shape[2],
            num_query_groups=k.shape[2],
            layout=layout,
            causal=causal,
            window=self.config.window_size,
            attention_mask=mask,
            softmax_scale=self.softmax_scale,
            dropout_p=dropout_p,
            softcap=self.config.attn_logit_softcapping,
        )
        # [b, sq, n*dv] -> [sq, b, n*dv]
        return out if layout == "SBH" else out.transpose(0, 1).contiguous()

    def _unfused(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float
    ) -> Tensor:
        (sq, b, n, _), (sk, _, g, _) = q.shape, k.shape
        dtype = q.dtype
        compute = accelerator.matmul_compute_dtype(dtype, q.device)
        # Queries of one group side by side, so that keys need no copies: [s, b, n, d] -> [b*g, (n/g)*sq, d]
        grouped_q = (
            q.to(compute)
            .unflatten(2, (g, divide(n, g)))
            .permute(1, 2, 3, 0, 4)
            .reshape(b * g, -1, q.shape[-1])
        )
        # [sk, b, g, d] -> [b*g, sk, d]
        grouped_k, grouped_v = (t.to(compute).permute(1, 2, 0, 3).reshape(b * g, sk, -1) for t in (k, v))
        scale = self.softmax_scale / (self.coefficient or 1)
        scores = self._capped(torch.bmm(grouped_q * scale, grouped_k.transpose(1, 2)))
        # [b*g, (n/g)*sq, sk] -> [b, n, sq, sk]
        probs = self.scale_mask_softmax(
            scores.view(b, n, sq, sk),
            masked_keys(sq, sk, causal, self.config.window_size, mask, q.device),
        ).to(compute)
        if dropout_p > 0.0:
            probs = dropout(probs, dropout_p)
        # [b*g, (n/g)*sq, sk] x [b*g, sk, dv] -> [b, n, sq, dv] -> [sq, b, n*dv]
        out = torch.bmm(probs.view(b * g, -1, sk), grouped_v).view(b, n, sq, -1)
        return out.permute(2, 0, 1, 3).flatten(2).to(dtype)

    def _capped(self, scores: Tensor) -> Tensor:
        """Scores of their true size, bounded, in fp32 at least; without a cap as they are."""
        cap = self.config.attn_logit_softcapping
        if cap is None:
            return scores
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return soft_cap(wide if self.coefficient is None else wide * self.coefficient, cap)


def _flatten_heads(t: Tensor, layout: str) -> Tensor:
    """[s, b, n, d] -> [s, b, n*d] (SBH) or [b, s, n*d] (BSH), contiguous."""
    return (t if layout == "SBH" else t.transpose(0, 1)).flatten(2).contiguous()
