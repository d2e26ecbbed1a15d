"""Figures of the layers of experts, gathered over micro-batches until the step's line is written.

Sums stay on the device; ranks meet once a step for the losses, and once a line for the loads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron.core import accelerator, parallel_state
from megatron.core.collectives import all_reduce, group_size

# Sums of loads, under names that no loss has.
LOAD, DROPPED, ENTROPY, TOKENS = "tokens per expert", "dropped tokens", "router entropy", "routed tokens"
LOADS = (LOAD, DROPPED, ENTROPY, TOKENS)


def _table() -> dict[str, dict[str, Any]]:
    return parallel_state.get_moe_layer_wise_logging_tracker()


def save_to_aux_losses_tracker(
    name: str,
    loss: Tensor,
    layer_number: int | None,
    num_layers: int,
    reduce_group: ProcessGroup | None = None,
    avg_group: ProcessGroup | None = None,
) -> None:
    """Adds to what a loss amounts to in one layer.

    Args:
        name: of the loss.
        loss: 0-dim; its gradient is not kept.
        layer_number: counted from 1; None is not tracked.
        num_layers: of the whole model.
        reduce_group: ranks whose losses add up to the loss of their tokens.
        avg_group: ranks over which the mean is taken.
    """
    if layer_number is None:
        return
    entry = _entry(name, num_layers, loss.device)
    entry["values"][layer_number - 1] += loss.detach()
    entry["reduce_group"], entry["avg_group"] = reduce_group, avg_group


def _entry(name: str, num_layers: int, device: torch.device) -> dict[str, Any]:
    table = _table()
    if name not in table:
        table[name] = {
            "values": torch.zeros(num_layers, device=device),
            "reduce_group": None,
            "avg_group": None,
        }
    return table[name]


def clear_aux_losses_tracker() -> None:
    """Sets all losses to zero; where they are summed is kept."""
    for name, entry in _table().items():
        if name not in LOADS:
            entry["values"].zero_()


def reduce_aux_losses_tracker_across_ranks(track_names: Sequence[str] | None = None) -> None:
    """Gives every rank the losses of all layers and of all ranks, in place.

    All ranks call this with the same names.
    """
    table = _table()
    for name in table if track_names is None else track_names:
        if name in LOADS:
            continue
        entry = table[name]
        values = entry["values"]
        # Within a stage first: stages without such a layer know no groups, and have nothing to add.
        all_reduce(values, entry["reduce_group"])
        if group_size(entry["avg_group"]) > 1:
            all_reduce(values, entry["avg_group"])
            values /= group_size(entry["avg_group"])
        if parallel_state.model_parallel_is_initialized():
            all_reduce(values, parallel_state.get_pipeline_model_parallel_group())


def moe_layer_count(num_layers: int, moe_layer_freq: int | Sequence[int] | None) -> int:
    """How many of the layers have experts."""
    if moe_layer_freq is None:
        return num_layers
    if isinstance(moe_layer_freq, int):
        return len(range(0, num_layers, moe_layer_freq))
    return sum(moe_layer_freq)


def track_moe_metrics(
    loss_scale: float,
    iteration: int,
    writer: Any,
    wandb_writer: Any = None,
    total_loss_dict: dict[str, Any] | None = None,
    per_layer_logging: bool = False,
    force_initialize: bool = False,
    track_names: str | Sequence[str] | None = None,
    num_layers: int | None = None,
    moe_layer_freq: int | Sequence[int] | None = None,
) -> None:
    """Writes the step's auxiliary losses, adds their means to the line's sums, and starts anew.

    All ranks call this together.

    Args:
        loss_scale: factor of the sums, 1 / number of micro-batches.
        iteration: x of the points.
        writer: TensorBoard, or None on ranks without one.
        wandb_writer: likewise.
        total_loss_dict: name -> sum over the steps of the line.
        per_layer_logging: write a point for every layer too.
        force_initialize: have an entry for ``track_names`` also where no layer has made one, as on stages
            without experts.
        track_names: losses to report; default all there are.
        num_layers: of the whole model.
        moe_layer_freq: which of them have experts; default all.
    """
    names = [track_names] if isinstance(track_names, str) else track_names
    if force_initialize and names is not None and num_layers is not None:
        for name in names:
            _entry(name, num_layers, accelerator.current_device())
    reduce_aux_losses_tracker_across_ranks(names)
    table = _table()
    for name in [name for name in (table if names is None else names) if name not in LOADS]:
        by_layer = table[name]["values"].float() * loss_scale
        count = moe_layer_count(len(by_layer) if num_layers is None else num_layers, moe_layer_freq)
        mean = by_layer.sum() / max(count, 1)
        if total_loss_dict is not None:
            total_loss_dict[name] = total_loss_dict.get(name, 0.0) + mean
        tags = [name]
        if per_layer_logging:
            tags += [f"moe/{name}_layer_{number}" for number in range(len(by_layer))]
        _write(tags, torch.cat((mean.view(1), by_layer)), iteration, writer, wandb_writer)
    clear_aux_losses_tracker()


def _write(tags: list[str], values: Tensor, iteration: int, writer: Any, wandb_writer: Any) -> None:
    """One point for each tag, from the first of the values, for which the host waits once."""
    if writer is None and wandb_writer is None:
        return
    points = dict(zip(tags, values.tolist(), strict=False))
    if writer is not None:
        for tag, point in points.items():
            writer.add_scalar(tag, point, iteration)
    if wandb_writer is not None:
        wandb_writer.log(points, iteration)


def save_load(
    layer_number: int | None, num_layers: int, wanted: Tensor, kept: Tensor, probabilities: Tensor
) -> None:
    """Adds to the loads of one layer.

    Args:
        layer_number: counted from 1; None is not tracked.
        num_layers: of the whole model.
        wanted: [E] tokens that chose each expert.
        kept: [E] those of them that it takes.
        probabilities: [t, E] of all experts, whose entropy is taken.
    """
    if layer_number is None:
        return
    table, device, row = _table(), wanted.device, layer_number - 1
    if LOAD not in table:
        # Whole numbers: float32 stops counting at 16 million tokens.
        table[LOAD] = {"values": torch.zeros(num_layers, len(wanted), dtype=torch.int64, device=device)}
        for name in (DROPPED, TOKENS):
            table[name] = {"values": torch.zeros(num_layers, dtype=torch.int64, device=device)}
        table[ENTROPY] = {"values": torch.zeros(num_layers, device=device)}
    table[LOAD]["values"][row] += kept
    table[DROPPED]["values"][row] += (wanted - kept).sum()
    table[ENTROPY]["values"][row] += torch.special.entr(probabilities.detach().float()).sum()
    table[TOKENS]["values"][row] += len(probabilities)


@dataclass(frozen=True)
class Load:
    """How one layer's tokens were spread over its experts.

    Attributes:
        layer: counted from 1.
        tokens: each expert's, over all ranks.
        dropped: copies of tokens that no expert took for want of capacity.
        entropy: mean over tokens of the router's entropy, in nats; ln(experts) for an even choice.
    """

    layer: int
    tokens: list[int]
    dropped: int
    entropy: float

    @property
    def largest_over_mean(self) -> float:
        """1 for an even load, the number of experts if one has it all."""
        total = sum(self.tokens)
        return max(self.tokens) * len(self.tokens) / total if total else 1.0

    @property
    def starving(self) -> list[int]:
        """Experts without a token."""
        return [expert for expert, count in enumerate(self.tokens) if not count]


def take_loads(num_layers: int, num_experts: int) -> list[Load]:
    """Loads of all layers and ranks since the last call; all ranks call this together."""
    table, device = _table(), accelerator.current_device()
    entries = {name: table.pop(name, None) for name in LOADS}

    def everywhere(name: str, width: int, dtype: torch.dtype) -> Tensor:
        """[L, width]; zeros on stages without experts."""
        entry = entries[name]
        if entry is None:
            return torch.zeros(num_layers, width, dtype=dtype, device=device)
        return entry["values"].view(num_layers, width)

    # Whole numbers apart from the entropy: float32 would round them, and not every device adds up float64.
    widths = {LOAD: num_experts, DROPPED: 1, TOKENS: 1}
    counts = torch.cat([everywhere(name, width, torch.int64) for name, width in widths.items()], dim=1)
    entropies = everywhere(ENTROPY, 1, torch.float32)
    for group in _groups_with_other_tokens_or_layers():
        all_reduce(counts, group, ReduceOp.SUM)
        all_reduce(entropies, group, ReduceOp.SUM)
    rows = zip(counts.tolist(), entropies.squeeze(1).tolist(), strict=True)
    return [
        Load(number, tokens, dropped, entropy / routed)
        for number, ((*tokens, dropped, routed), entropy) in enumerate(rows, start=1)
        if routed
    ]


def _groups_with_other_tokens_or_layers() -> Iterable[ProcessGroup | None]:
    if not parallel_state.model_parallel_is_initialized():
        return []
    return [
        parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ]
