"""Multi-head latent attention: keys and values of all heads from one small vector per token.

DeepSeek-V2 (2024), section 2.1. Letters: n heads, r latent width, dn, dr and dv the widths of a head's plain
part, of its rotated part and of its value.
"""

import inspect
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.errors import UsageError
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding, yarn_mscale
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.attention import Attention, Spec, refuse_inference_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module, get_module
from megatron.core.transformer.transformer_config import MLATransformerConfig


@dataclass
class MLASelfAttentionSubmodules:
    """Slots of latent attention: ``linear_q_proj`` serves models that do not compress their queries, the
    pair of ``linear_q_down_proj`` and ``linear_q_up_proj`` those that do.
    """

    linear_q_proj: Spec = None
    linear_q_down_proj: Spec = None
    linear_q_up_proj: Spec = None
    linear_kv_down_proj: Spec = None
    linear_kv_up_proj: Spec = None
    core_attention: Spec = None
    linear_proj: Spec = None
    q_layernorm: Spec = None
    kv_layernorm: Spec = None


class MultiLatentAttention(Attention):
    """Base: what latent attention does with queries, keys and values; subclasses make them.

    Scores are multiplied by ``m^2 / sqrt(dn + dr)`` with ``m = yarn_mscale(rotary_scaling_factor, mscale)``,
    whatever ``rope_type`` says, unless ``softmax_scale`` is set. Positions come from an embedding of its own.

    Args:
        config, submodules, layer_number, attn_mask_type, attention_type, cp_comm_type: as of
            :class:`Attention`.
    """

    config: MLATransformerConfig

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
    ):
        q_head_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        magnitude = yarn_mscale(config.rotary_scaling_factor, config.mscale)
        scale = magnitude**2 / math.sqrt(q_head_dim)
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type,
            attention_type,
            cp_comm_type,
            value_width=config.v_head_dim,
            core_options={
                "softmax_scale": scale if config.softmax_scale is None else config.softmax_scale,
                "k_channels": q_head_dim,
                "v_channels": config.v_head_dim,
            },
        )
        self.q_head_dim = q_head_dim
        self.rotary_pos_emb = _rotary_embedding(config)
        self.recompute_up_proj = config.recomputes("mla_up_proj")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        position_ids: Tensor | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h], and the projection's bias for the caller to add.

        Arguments are those of :meth:`Attention.forward`; ``position_ids`` are not read: positions count from
        the start of the sequence.

        Raises:
            UsageError: rotary angles from outside.
        """
        refuse_inference_state(inference_context, inference_params, sequence_len_offset)
        if any(t is not None for t in (rotary_pos_emb, rotary_pos_cos, rotary_pos_sin)):
            raise UsageError(
                "latent attention makes its own rotary angles: leave rotary_pos_emb, rotary_pos_cos and "
                "rotary_pos_sin out"
            )
        recompute = CheckpointWithoutOutput() if self.recompute_up_proj and self.training else None
        query, key, value = self._query_key_value(
            hidden_states, key_value_states, packed_seq_params, recompute
        )
        context = self._core_or_recomputed(
            query, key, value, attention_mask, attention_bias, packed_seq_params
        )
        if recompute is not None:
            recompute.discard_output_and_register_recompute(context)
        return self.linear_proj(context)

    @abstractmethod
    def _query_key_value(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        recompute: CheckpointWithoutOutput | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`get_query_key_value_tensors`; ``recompute`` is told how to make them once more."""


def _rotary_embedding(config: MLATransformerConfig) -> RotaryEmbedding:
    """Angles of the rotated part of a head, as ``config.rope_type`` says."""
    if config.rope_type == "rope":
        return RotaryEmbedding(
            config.qk_pos_emb_head_dim,
            config.rotary_percent,
            rotary_base=config.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
        )
    return YarnRotaryEmbedding(
        config.qk_pos_emb_head_dim,
        config.rotary_percent,
        rotary_base=config.rotary_base,
        use_cpu_initialization=config.use_cpu_initialization,
        scaling_factor=config.rotary_scaling_factor,
        original_max_position_embeddings=config.max_position_embeddings,
        beta_fast=config.beta_fast,
        beta_slow=config.beta_slow,
        mscale=config.mscale,
        mscale_all_dim=config.mscale_all_dim,
    )


class MLASelfAttention(MultiLatentAttention):
    """Latent attention of a sequence to itself.

    Rows of ``linear_q_up_proj`` (or ``linear_q_proj``) are, head by head, dn plain and dr rotated ones; those
    of ``linear_kv_up_proj`` dn of the key and dv of the value; those of ``linear_kv_down_proj`` the latent
    and the rotated key, which all heads share. Ranks hold whole heads.

    Args:
        config: sizes; without ``q_lora_rank``, queries come straight from the hidden states.
        submodules, layer_number, attn_mask_type, cp_comm_type: as of :class:`Attention`.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
    ):
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type)
        heads, r_kv, r_q = config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
        if r_q is None:
            self.linear_q_proj = self._up(
                submodules.linear_q_proj, config.hidden_size, heads * self.q_head_dim
            )
        else:
            self.linear_q_down_proj = self._down(submodules.linear_q_down_proj, r_q)
            self.linear_q_up_proj = self._up(submodules.linear_q_up_proj, r_q, heads * self.q_head_dim)
        self.linear_kv_down_proj = self._down(
            submodules.linear_kv_down_proj, r_kv + config.qk_pos_emb_head_dim
        )
        widths = heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = self._up(submodules.linear_kv_up_proj, r_kv, widths)
        self.q_layernorm = None if r_q is None else self._norm(submodules.q_layernorm, r_q)
        self.kv_layernorm = self._norm(submodules.kv_layernorm, r_kv)

    def _down(self, spec: Spec, width: int) -> torch.nn.Module:
        """Projection to a latent: by a layer that every rank has whole, or by one whose outputs are split."""
        assert spec is not None
        is_whole = "parallel_mode" in inspect.signature(get_module(spec)).parameters
        kind = (
            {"parallel_mode": None, "skip_weight_param_allocation": False}
            if is_whole
            else {"gather_output": False, "is_expert": False}
        )
        return build_module(
            spec,
            self.config.hidden_size,
            width,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            skip_bias_add=False,
            **kind,
        )

    def _up(self, spec: Spec, width_in: int, width_out: int) -> torch.nn.Module:
        """Projection to heads, of which every rank has its own."""
        return build_module(
            spec,
            width_in,
            width_out,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )

    def _norm(self, spec: Spec, width: int) -> torch.nn.Module | None:
        if spec is None:
            return None
        return build_module(spec, hidden_size=width, config=self.config, eps=self.config.layernorm_epsilon)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, h] -> query and key [s, b, n/TP, dn + dr], value [s, b, n/TP, dv], rotated."""
        refuse_inference_state(inference_context, inference_params)
        return self._query_key_value(hidden_states, key_value_states, packed_seq_params, None)

    def _query_key_value(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        recompute: CheckpointWithoutOutput | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if key_value_states is not None:
            raise UsageError(
                "self attention makes its keys and values from hidden_states: leave key_value_states out"
            )
        config = self.config
        latent_q = hidden_states
        if config.q_lora_rank is not None:
            latent_q = self._project_down(self.linear_q_down_proj, hidden_states, config.q_lora_rank)
        rotary_width = config.qk_pos_emb_head_dim
        joined = self._project_down(
            self.linear_kv_down_proj, hidden_states, config.kv_lora_rank + rotary_width
        )
        latent_kv, rotary_key = joined.split([config.kv_lora_rank, rotary_width], dim=-1)
        rotary_key = self._for_own_heads(rotary_key)
        angles, magnitude = self._angles(hidden_states, packed_seq_params)
        ends = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q

        def rotated(t: Tensor) -> Tensor:
            return apply_rotary_pos_emb(t, angles, config, cu_seqlens=ends, mscale=magnitude)

        def expand(latent_q: Tensor, latent_kv: Tensor, rotary_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            query = self._query(latent_q)
            plain, turned = query.split([config.qk_head_dim, rotary_width], dim=-1)
            query = torch.cat((plain, rotated(turned)), dim=-1)
            keys, value = self._keys_and_values(latent_kv)
            # [s, b, dr] -> [s, b, n, dr]: one for all heads
            shared = rotated(rotary_key.unsqueeze(2)).expand(-1, -1, keys.shape[2], -1)
            return query, torch.cat((keys, shared), dim=-1), value.contiguous()

        if recompute is not None:
            return recompute.checkpoint(expand, latent_q, latent_kv, rotary_key)
        return expand(latent_q, latent_kv, rotary_key)

    def _project_down(self, linear: torch.nn.Module, hidden_states: Tensor, width: int) -> Tensor:
        """[s, b, h] -> [s, b, width]; the part of the sequence stays that of ``hidden_states``."""
        latent, _ = linear(hidden_states)
        if latent.shape[-1] == width:
            return latent
        latent = tensor_parallel.gather_from_tensor_model_parallel_region(latent)
        if self.config.sequence_parallel:
            latent = tensor_parallel.scatter_to_sequence_parallel_region(latent)
        return latent

    def _for_own_heads(self, rotary_key: Tensor) -> Tensor:
        """The whole sequence's shared keys, whose gradient is the sum over the heads of all ranks."""
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(rotary_key)
        return tensor_parallel.copy_to_tensor_model_parallel_region(rotary_key)

    def _angles(self, hidden_states: Tensor, packed: PackedSeqParams | None) -> tuple[Tensor, float]:
        """Rotary angles [s, 1, 1, dr], and the factor of cosine and sine."""
        length = self.rotary_pos_emb.get_rotary_seq_len(None, None, hidden_states, self.config, packed)
        is_packed = packed is not None and packed.qkv_format == "thd"
        table = self.rotary_pos_emb(length, packed_seq=is_packed)
        return table if isinstance(table, tuple) else (table, 1.0)

    def _query(self, latent: Tensor) -> Tensor:
        """[s, b, r] (or [s, b, h]) -> [s, b, n/TP, dn + dr]"""
        if self.config.q_lora_rank is None:
            query, _ = self.linear_q_proj(latent)
        else:
            query, _ = self.linear_q_up_proj(latent if self.q_layernorm is None else self.q_layernorm(latent))
        return query.unflatten(-1, (self.num_attention_heads_per_partition, self.q_head_dim))

    def _keys_and_values(self, latent: Tensor) -> tuple[Tensor, ...]:
        """[s, b, r] -> plain part of the keys [s, b, n/TP, dn], values [s, b, n/TP, dv]"""
        widths = [self.config.qk_head_dim, self.config.v_head_dim]
        joined, _ = self.linear_kv_up_proj(latent if self.kv_layernorm is None else self.kv_layernorm(latent))
        return joined.unflatten(-1, (self.num_attention_heads_per_partition, sum(widths))).split(
            widths, dim=-1
        )
