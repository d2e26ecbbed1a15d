"""Which layers each pipeline stage holds.

The layers are dealt out in the order data flows through them: virtual stage ``chunk * pp + stage`` is the
``chunk``-th part of the model on pipeline stage ``stage``. Everything here follows from the sizes of these
parts, listed in that order.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from megatron.core import parallel_state
from megatron.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def get_layer_counts(config: TransformerConfig) -> list[int]:
    """Number of layers of every virtual stage, in the order of the data.  [pp * vpp]

    Raises:
        ConfigError: the layers cannot be dealt out as asked; the message says which numbers would do.
    """
    pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    if pp == 1:
        return [config.num_layers]
    if config.num_layers_in_first_pipeline_stage is None and config.num_layers_in_last_pipeline_stage is None:
        return _even_counts(config, pp, vpp)
    return _uneven_counts(config, pp, vpp)


def _even_counts(config: TransformerConfig, pp: int, vpp: int) -> list[int]:
    """Equal parts; the embedding and the loss may each stand for a layer."""
    with_embedding = config.account_for_embedding_in_pipeline_split
    with_loss = config.account_for_loss_in_pipeline_split
    slots = config.num_layers + with_embedding + with_loss
    if slots % (pp * vpp):
        extra = " (the embedding and the loss counted as asked)" if with_embedding or with_loss else ""
        raise ConfigError(
            f"{slots} layers{extra} do not divide into {pp} pipeline stages x {vpp} virtual stages: use a "
            f"multiple of {pp * vpp}, or num_layers_in_first_pipeline_stage and "
            "num_layers_in_last_pipeline_stage"
        )
    counts = [slots // (pp * vpp)] * (pp * vpp)
    counts[0] -= with_embedding
    counts[-1] -= with_loss
    return counts


def _uneven_counts(config: TransformerConfig, pp: int, vpp: int) -> list[int]:
    """The first and the last stage as given, the rest in equal parts."""
    if config.account_for_embedding_in_pipeline_split or config.account_for_loss_in_pipeline_split:
        raise ConfigError(
            "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage fix the outer stages: "
            "leave out account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split"
        )
    given = {
        0: ("num_layers_in_first_pipeline_stage", config.num_layers_in_first_pipeline_stage),
        pp - 1: ("num_layers_in_last_pipeline_stage", config.num_layers_in_last_pipeline_stage),
    }
    per_stage: list[int | None] = [None] * pp
    for stage, (field, count) in given.items():
        if count is not None and (count <= 0 or count % vpp):
            raise ConfigError(f"{field} {count}: must be positive and a multiple of {vpp} virtual stages")
        per_stage[stage] = count
    rest = config.num_layers - sum(count or 0 for count in per_stage)
    open_stages = per_stage.count(None)
    parts = open_stages * vpp
    if rest < parts or (rest % parts if parts else rest):
        fit = f"needs a positive multiple of {parts}" if parts else "must be 0: there are no other stages"
        asked = " and ".join(f"{field} {count}" for field, count in given.values() if count is not None)
        raise ConfigError(
            f"{config.num_layers} layers on {pp} stages, with {asked}, leave {rest} for {open_stages} others "
            f"x {vpp} virtual stages, which {fit}"
        )
    filled = [rest // open_stages if count is None else count for count in per_stage]
    return [count // vpp for _ in range(vpp) for count in filled]


def get_layer_ranges(config: TransformerConfig) -> list[range]:
    """The layers of every virtual stage, counted from 0 over the whole model, in the order of the data."""
    counts = get_layer_counts(config)
    return [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]


def _layers_here(config: TransformerConfig) -> range:
    """The layers of the stage (and virtual stage) that this process is building or running."""
    pp = config.pipeline_model_parallel_size
    if pp == 1:
        return range(config.num_layers)
    chunk = 0
    if config.virtual_pipeline_model_parallel_size is not None:
        chunk = parallel_state.get_virtual_pipeline_model_parallel_rank()
        if chunk is None:
            raise ConfigError(
                "no virtual stage is selected: before building chunk i call "
                "parallel_state.set_virtual_pipeline_model_parallel_rank(i)"
            )
    return get_layer_ranges(config)[chunk * pp + parallel_state.get_pipeline_model_parallel_rank()]


def get_num_layers_to_build(config: TransformerConfig) -> int:
    """Number of layers of this (virtual) stage: all of them with one stage."""
    return len(_layers_here(config))


def get_transformer_layer_offset(config: TransformerConfig) -> int:
    """Number of layers before this (virtual) stage in the order of the data: 0 with one stage."""
    return _layers_here(config).start
