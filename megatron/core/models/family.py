"""What the training loop asks of a model: its layers, its batch, and the formulas for its cost.

Each folder beside this file describes its model in one ``ModelFamily``; ``FAMILIES`` lists them by name.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import torch

from megatron.core.errors import ConfigError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

# Name of a family -> where its description is. It is imported when a run asks for it.
FAMILIES: dict[str, str] = {
    "gpt": "megatron.core.models.gpt.family.GPT",
}


@dataclass(frozen=True)
class LatentShape:
    """Sizes of multi-head latent attention, under the names of ``MLATransformerConfig``."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, under the names of ``TransformerConfig``; all ranks together."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated_linear_unit: bool
    vocab_size: int
    """Rows of the embedding, padding included; 0 before the tokenizer is known."""
    num_moe_layers: int = 0
    """How many of the layers have experts in place of an MLP."""
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    """Width of one expert; None is ``ffn_hidden_size``."""
    moe_shared_expert_intermediate_size: int | None = None
    latent: LatentShape | None = None
    """Of models whose keys and values come from one latent; groups and ``kv_channels`` mean nothing there."""
    mtp_num_layers: int = 0
    """Layers behind the last one that predict further tokens; each is of the last one's kind."""
    last_layer_has_experts: bool = False
    moe_router_topk: int = 0
    """Experts of one token."""


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch, or of a micro-batch."""

    sequences: int
    sequence_length: int
    """Of the encoder, in a model that has encoder and decoder."""
    decoder_sequence_length: int | None = None
    """Of such a model's decoder; None where the run names none."""


class Stages(Flag):
    """Pipeline stages that compute with a tensor of the batch."""

    FIRST = auto()
    MIDDLE = auto()
    LAST = auto()
    ALL = FIRST | MIDDLE | LAST


def one_per_token(batch: BatchShape) -> tuple[int, ...]:
    """[b, s]."""
    return batch.sequences, batch.sequence_length


@dataclass(frozen=True)
class BatchTensor:
    """A tensor of a micro-batch, as the data set gives it."""

    dtype: torch.dtype
    stages: Stages
    shape: Callable[[BatchShape], tuple[int, ...]] = one_per_token
    is_attention_mask: bool = False
    """Present only in runs that keep the documents of a sample apart; absent, a mask is causal."""
    embeds_further_tokens: bool = False
    """Needed on the last stage too in runs that predict further tokens."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Parameters and activations of one micro-batch; all ranks together.

    Activations that are kept until backward are in bytes. Single tensors are in elements, because the run
    decides their type.
    """

    layer_weights: float
    """Weights of the linear layers in one layer, routed experts left out; of the lightest layer."""
    block_parameters: float
    """All layers and the final norm, without those that predict further tokens."""
    table_parameters: float
    """One embedding table; an untied output layer is another."""
    layer_activations: float
    """Of one layer."""
    input_activations: float
    """Of the embedding."""
    output_activations: float
    """Of the output layer and the loss."""
    residual_stream: float
    """Elements of what one layer hands to the next."""
    attention_tensors: float
    """Elements of queries, keys, values and the output of attention, in one layer."""
    mlp_activations: float
    """Elements of the output of the MLP's activation function, in one layer, routed experts left out."""
    linear_inputs: float
    """Elements of the inputs of all linear layers, in one layer without experts."""
    logits: float
    """Elements of the output layer's result."""
    expert_parameters: float = 0.0
    """Those of the block that are dealt out among expert-parallel ranks."""
    mtp_parameters: float = 0
    """Layers that predict further tokens, all on the last stage."""
    mtp_expert_parameters: float = 0.0
    """Those of them that are dealt out among expert-parallel ranks."""


@dataclass(frozen=True)
class ModelFamily:
    """One kind of model, as the training loop sees it."""

    name: str
    batch: Mapping[str, BatchTensor]
    """Key in a sample -> the tensor, in the order in which a batch lists them."""
    layer_spec: Callable[[TransformerConfig, bool], ModuleSpec | TransformerBlockSubmodules]
    """(config, with TransformerEngine's parameter names) -> spec of a layer, or of this stage's layers."""
    operations: Callable[[ModelShape, BatchShape], float]
    """Floating-point operations of forward and backward over a batch."""
    memory: Callable[[ModelShape, BatchShape], MemoryEstimate]
    """An estimate, to two digits or so, for one micro-batch."""
    parameters: Callable[[Any], int | None]
    """Exact number that this rank's part of a model should have; None for a model of another class."""


def get_model_family(name: str) -> ModelFamily:
    """The description that :data:`FAMILIES` names.

    Raises:
        ConfigError: it names none.
    """
    if name not in FAMILIES:
        raise ConfigError(f"there is no model family {name!r}; there are: {', '.join(FAMILIES)}")
    module, _, description = FAMILIES[name].rpartition(".")
    return getattr(importlib.import_module(module), description)
