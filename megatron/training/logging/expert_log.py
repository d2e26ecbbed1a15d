"""What the log says of experts: auxiliary losses of every step, and on request the loads of each layer."""

from argparse import Namespace
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.router import tracked_losses
from megatron.core.transformer.moe.tracker import Load, take_loads, track_moe_metrics
from megatron.core.transformer.transformer_config import TransformerConfig, moe_layer_pattern
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import print_rank_last

# An expert starves when no token has come to it for so many log lines in a row.
STARVING_LINES = 5
# Curves of single experts; more of them than this would drown the others.
MOST_CURVES_OF_EXPERTS = 16


def log_auxiliary_losses(
    config: TransformerConfig, iteration: int, totals: dict[str, Any] | None, per_layer: bool
) -> None:
    """Writes the step's losses of routers, and adds them to the sums of the line; on all ranks together.

    Args:
        config: of the model.
        iteration: of the step.
        totals: sums of the line; None for a step that was skipped.
        per_layer: write a point for every layer too.
    """
    names = tracked_losses(config)
    if not names:
        return
    pattern = [int(has_experts) for has_experts in moe_layer_pattern(config)]
    further = config.mtp_num_layers or 0
    # Layers that predict further tokens are like the last one.
    pattern += pattern[-1:] * further
    track_moe_metrics(
        1.0 / get_num_microbatches(),
        iteration,
        get_tensorboard_writer(),
        get_wandb_writer(),
        totals,
        per_layer,
        force_initialize=True,
        track_names=names,
        num_layers=len(pattern),
        moe_layer_freq=pattern,
    )


class LoadLog:
    """Prints and writes how tokens were spread over experts since the last line, and warns of starvation."""

    def __init__(self) -> None:
        # (layer, expert) -> lines in a row without a token
        self._empty_lines: dict[tuple[int, int], int] = {}

    def write(self, args: Namespace, config: TransformerConfig, iteration: int) -> None:
        """Takes the loads of all ranks, which call this together."""
        assert config.num_moe_experts is not None
        loads = take_loads(config.num_layers + (config.mtp_num_layers or 0), config.num_moe_experts)
        for load in loads:
            print_rank_last(_line(load))
            self._write_points(load, iteration)
        self._warn(loads, args.log_interval)

    def _write_points(self, load: Load, iteration: int) -> None:
        points = {
            "load_largest_over_mean": load.largest_over_mean,
            "dropped_tokens": float(load.dropped),
            "router_entropy": load.entropy,
            "experts_without_tokens": float(len(load.starving)),
        }
        if len(load.tokens) <= MOST_CURVES_OF_EXPERTS:
            points |= {f"tokens_expert_{expert}": float(count) for expert, count in enumerate(load.tokens)}
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        # Layers count from 0 in curves, as those of losses do.
        named = {f"moe/{name}_layer_{load.layer - 1}": value for name, value in points.items()}
        if writer is not None:
            for tag, value in named.items():
                writer.add_scalar(tag, value, iteration)
        if wandb is not None:
            wandb.log(named, iteration)

    def _warn(self, loads: list[Load], log_interval: int) -> None:
        """Once for each time that an expert begins to starve."""
        for load in loads:
            empty = set(load.starving)
            for expert in range(len(load.tokens)):
                key = (load.layer, expert)
                self._empty_lines[key] = self._empty_lines.get(key, 0) + 1 if expert in empty else 0
            begun = [
                str(expert)
                for expert in sorted(empty)
                if self._empty_lines[load.layer, expert] == STARVING_LINES
            ]
            if begun:
                print_rank_last(
                    f"WARNING: layer {load.layer}: no token has reached expert {', '.join(begun)} for "
                    f"{STARVING_LINES * log_interval} iterations; raise --moe-aux-loss-coeff, or balance by "
                    "--moe-router-enable-expert-bias"
                )


def _line(load: Load) -> str:
    total = max(sum(load.tokens), 1)
    mean = total / len(load.tokens)
    return (
        f" experts of layer {load.layer:3d} | largest load over mean: {load.largest_over_mean:.3f} | "
        f"smallest load over mean: {min(load.tokens) / mean:.3f} | experts without tokens: "
        f"{len(load.starving)} | dropped tokens: {load.dropped} | router entropy: {load.entropy:.4f} |"
    )
