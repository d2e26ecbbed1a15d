"""Attention blocks: projections around core attention."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state, tensor_parallel
from megatron.core.errors import ConfigError, NotBuiltYetError, TrainingError, UsageError
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings.rope_utils import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_with_cos_sin,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import deprecate_inference_params, divide

Spec = ModuleSpec | type | None


@dataclass
class SelfAttentionSubmodules:
    """Slots of self attention; the two norms act on each query and key head."""

    linear_qkv: Spec = None
    core_attention: Spec = None
    linear_proj: Spec = None
    q_layernorm: Spec = None
    k_layernorm: Spec = None


def refuse_inference_state(
    inference_context: Any, inference_params: Any = None, sequence_len_offset: Any = None
) -> None:
    """There is no key/value cache: generation calls the model on the whole prefix."""
    state = deprecate_inference_params(inference_context, inference_params)
    if state is not None or sequence_len_offset is not None:
        raise NotBuiltYetError("a key/value cache", remedy="Call the model on the whole sequence instead.")


class Attention(MegatronModule, ABC):
    """Base: core attention and the output projection; subclasses make queries, keys and values.

    Args:
        config: model config.
        submodules: slots.
        layer_number: global, counted from 1.
        attn_mask_type: which keys a query may see.
        attention_type: ``"self"`` or ``"cross"``.
        cp_comm_type: exchange between context-parallel ranks.
        value_width: of a head; default the config's ``kv_channels``.
        core_options: further arguments of core attention; default the config's scale of the scores.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        *,
        value_width: int | None = None,
        core_options: dict[str, Any] | None = None,
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        width, groups = config.kv_channels if value_width is None else value_width, config.num_query_groups
        assert width is not None and groups is not None, "the config fills them in"
        self.query_projection_size = width * config.num_attention_heads
        self.kv_projection_size = width * groups
        self.hidden_size_per_attention_head = divide(self.query_projection_size, config.num_attention_heads)
        place = tensor_parallel.Place.find(config)
        self.num_attention_heads_per_partition = place.divide(
            config.num_attention_heads, "num_attention_heads"
        )
        self.num_query_groups_per_partition = place.divide(groups, "num_query_groups")
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            cp_comm_type=cp_comm_type,
            **({"softmax_scale": config.softmax_scale} if core_options is None else core_options),
        )
        self.checkpoint_core_attention = config.recomputes("core_attn")
        self.linear_proj = build_module(
            submodules.linear_proj,
            self.query_projection_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
        )

    @abstractmethod
    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [s, b, n/TP, d], key and value [s, b, g/TP, d]."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: InferenceParams | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: InferenceParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h], and the projection's bias for the caller to add.

        Under sequence parallelism input and output hold this rank's part of the sequence, [s/TP, b, h].

        Args:
            hidden_states: input.
            attention_mask: bool [b or 1, 1, s, s], True masks; or None.
            key_value_states: source of keys and values of cross attention.
            rotary_pos_emb: angles [s, 1, 1, d], one tensor or a (query, key) pair.
            rotary_pos_cos, rotary_pos_sin: tables instead of angles, [s, d / 2].
            packed_seq_params: the sequences of a packed row, b = 1.
        """
        refuse_inference_state(inference_context, inference_params, sequence_len_offset)
        query, key, value = self.get_query_key_value_tensors(hidden_states, key_value_states)
        if rotary_pos_emb is not None:
            query, key = self._rotate(query, key, rotary_pos_emb, packed_seq_params)
        if rotary_pos_cos is not None and rotary_pos_sin is not None:
            if rotary_pos_emb is not None or packed_seq_params is not None:
                raise UsageError(
                    "rotary_pos_cos and rotary_pos_sin stand in the place of rotary_pos_emb, for sequences "
                    "that are not packed: pass rotary_pos_emb alone"
                )
            tables = (rotary_pos_cos, rotary_pos_sin, self.config.rotary_interleaved)
            query, key = (apply_rotary_pos_emb_with_cos_sin(t, *tables) for t in (query, key))
        context = self._core_or_recomputed(
            query, key, value, attention_mask, attention_bias, packed_seq_params
        )
        return self.linear_proj(context)

    def _rotate(
        self,
        query: Tensor,
        key: Tensor,
        angles: Tensor | tuple[Tensor, Tensor],
        packed: PackedSeqParams | None,
    ) -> tuple[Tensor, Tensor]:
        """Turns queries and keys by their positions, counted from the start of each packed sequence."""
        of_query, of_key = angles if isinstance(angles, tuple) else (angles, angles)
        starts = (None, None) if packed is None else (packed.cu_seqlens_q, packed.cu_seqlens_kv)
        return (
            apply_rotary_pos_emb(query, of_query, self.config, cu_seqlens=starts[0]),
            apply_rotary_pos_emb(key, of_key, self.config, cu_seqlens=starts[1]),
        )

    def _core_or_recomputed(self, query: Tensor, key: Tensor, value: Tensor, *extras: Any) -> Tensor:
        """What :meth:`_core` gives; with selective recomputation only its inputs are kept."""
        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(self._core, False, query, key, value, *extras)
        return self._core(query, key, value, *extras)

    def _core(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """[s, b, n/TP, d], 2 x [s, b, g/TP, d] -> [s, b, n*d/TP]"""
        return self.core_attention(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )


class SelfAttention(Attention):
    """Attention of a sequence to itself, with one projection for queries, keys and values.

    Rows of ``linear_qkv`` are grouped by query group: its n/g query heads, then its key head, then its value
    head. Ranks hold whole groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
    ):
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type)
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            self.query_projection_size + 2 * self.kv_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
        )
        self.q_layernorm = self._head_norm(submodules.q_layernorm)
        self.k_layernorm = self._head_norm(submodules.k_layernorm)

    def _head_norm(self, spec: Spec) -> torch.nn.Module | None:
        if spec is None:
            return None
        width = self.hidden_size_per_attention_head
        norm = build_module(spec, hidden_size=width, config=self.config, eps=self.config.layernorm_epsilon)
        if self.num_attention_heads_per_partition < self.config.num_attention_heads:
            for parameter in norm.parameters():
                # Every rank has the norm but only its own heads, with and without sequence parallelism: the
                # gradient is the sum over the ranks.
                parameter.sequence_parallel = True
        return norm

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, h] -> query [s, b, n/TP, d], key and value [s, b, g/TP, d].

        In ``config.test_mode`` the norms of heads are compared between ranks first.
        """
        if key_value_states is not None:
            raise UsageError(
                "self attention makes its keys and values from hidden_states: leave key_value_states out"
            )
        if self.config.test_mode and parallel_state.model_parallel_is_initialized():
            self.run_realtime_tests()
        mixed, _ = self.linear_qkv(hidden_states)
        g, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        per_group = divide(self.num_attention_heads_per_partition, g)
        # [s, b, (n + 2g)*d] -> [s, b, g, (n/g + 2)*d]
        mixed = mixed.unflatten(-1, (g, (per_group + 2) * d))
        query, key, value = torch.split(mixed, [per_group * d, d, d], dim=-1)
        # [s, b, g, (n/g)*d] -> [s, b, n, d]
        query = query.reshape(*query.shape[:2], -1, d)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value

    def run_realtime_tests(self) -> None:
        """Compares the norms of queries and keys with those on tensor- and data-parallel rank 0.

        Raises:
            TrainingError: they have drifted apart.
        """
        groups = {
            "data-parallel": parallel_state.get_data_parallel_group(),
            "tensor-parallel": parallel_state.get_tensor_model_parallel_group(),
        }
        for name in ("q_layernorm", "k_layernorm"):
            for label, parameter in _named_parameters(getattr(self, name)):
                for kind, group in groups.items():
                    if not _equals_first(parameter.detach(), group):
                        raise TrainingError(
                            f"layer {self.layer_number}: {name}.{label} differs from that of {kind} rank 0, "
                            "although all copies see the same updates: memory or a collective is faulty, or "
                            "code outside the optimizer changed it"
                        )


def _named_parameters(module: torch.nn.Module | None) -> list[tuple[str, Tensor]]:
    return [] if module is None else list(module.named_parameters())


def _equals_first(tensor: Tensor, group: ProcessGroup) -> bool:
    """True if this rank's ``tensor`` has the bits of the group's first."""
    first = tensor.clone()
    torch.distributed.broadcast(first, torch.distributed.get_global_rank(group, 0), group=group)
    return torch.equal(first, tensor)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


@dataclass
class CrossAttentionSubmodules:
    """Slots of cross attention."""

    linear_q: Spec = None
    linear_kv: Spec = None
    core_attention: Spec = None
    linear_proj: Spec = None


class CrossAttention(Attention):
    """Attention of one sequence, the queries, to another, the keys and values.

    Rows of ``linear_kv`` are grouped by head: its key, then its value. Ranks hold whole heads.

    Raises:
        ConfigError: grouped queries, or keys and values of another width than the queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
    ):
        if config.num_query_groups != config.num_attention_heads:
            raise ConfigError(
                f"num_query_groups {config.num_query_groups}: cross attention takes no grouped queries; "
                f"leave it out, or set it to num_attention_heads ({config.num_attention_heads})"
            )
        super().__init__(config, submodules, layer_number, attn_mask_type, "cross", cp_comm_type)
        self.linear_q = self._projection(submodules.linear_q, self.query_projection_size)
        self.linear_kv = self._projection(submodules.linear_kv, 2 * self.kv_projection_size)

    def _projection(self, spec: Spec, width: int) -> torch.nn.Module:
        return build_module(
            spec,
            self.config.hidden_size,
            width,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=self.config.add_bias_linear,
            skip_bias_add=False,
            is_expert=False,
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[sq, b, h] and [sk, b, h] -> query [sq, b, n/TP, d], key and value [sk, b, n/TP, d]."""
        n, d = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        mixed, _ = self.linear_kv(key_value_states)
        # [sk, b, n*2*d] -> 2 x [sk, b, n, d]
        key, value = mixed.unflatten(-1, (n, 2 * d)).chunk(2, dim=-1)
        query, _ = self.linear_q(hidden_states)
        # [sq, b, n*d] -> [sq, b, n, d]
        return query.unflatten(-1, (n, d)), key, value
