"""What a run should need on its fullest device, from the arguments alone.

The counts are estimates, to two digits or so, of the model's family (``megatron.core.models.family``); this
module divides them among ranks.
"""

from argparse import Namespace
from dataclasses import dataclass

from megatron.training.model_family import memory_estimate

MEBIBYTE = 2**20
# Name, size, and the smallest number that is printed in it: 0.01 billion is, as in the original.
_UNITS = (("billions", 1e9, 1e7), ("millions", 1e6, 1e5), ("thousands", 1e3, 0))
# Mixed precision: 2 weight + 4 main weight + 4 main gradient + 8 Adam moments; the last 12 (main weight and
# moments) can be spread over data-parallel ranks.
BYTES_PER_PARAMETER = 18
REPLICATED_BYTES_PER_PARAMETER = 6
SHARDABLE_BYTES_PER_PARAMETER = 12


@dataclass(frozen=True)
class ParameterEstimate:
    """Numbers of parameters.

    Attributes:
        block: all transformer layers and the final norm.
        further: layers that predict further tokens.
        embedding: word embeddings, with an untied output layer.
        most_loaded_shard: on the fullest (tensor, pipeline) rank.
        other_shards: on a rank of a stage without embeddings.
        experts: those of both kinds of shards that belong to experts.
    """

    block: float
    further: float
    embedding: float
    most_loaded_shard: float
    other_shards: float
    experts: float = 0.0


def estimate_parameters(args: Namespace) -> ParameterEstimate:
    """Numbers of parameters that the arguments imply."""
    estimate = memory_estimate(args)
    block, table, further = estimate.block_parameters, estimate.table_parameters, estimate.mtp_parameters
    stages, tensor_ranks = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    untied = args.untie_embeddings_and_output_weights
    of_experts = estimate.expert_parameters
    dense = (block - of_experts) / stages
    expert_ranks = _expert_ranks(args) if of_experts else 1
    experts = of_experts / stages / expert_ranks
    of_further = estimate.mtp_expert_parameters
    most_experts = experts + of_further / expert_ranks
    # As the original counts: the embedding and what predicts further tokens as if on one stage.
    fullest = dense + further - of_further + table
    if untied and stages == 1:
        fullest += table
    return ParameterEstimate(
        block=block,
        further=further,
        embedding=2 * table if untied else table,
        most_loaded_shard=fullest / tensor_ranks + most_experts,
        other_shards=dense / tensor_ranks + experts,
        experts=most_experts,
    )


def _expert_ranks(args: Namespace) -> int:
    """Ranks that share the experts of a layer."""
    return args.expert_model_parallel_size * args.expert_tensor_parallel_size


def _print_parameters(count: ParameterEstimate, has_other_shards: bool) -> None:
    """A line for each part, in billions, or in a smaller unit where that would be 0.00."""
    parts = [
        ("Number of parameters in transformer block", count.block, 2),
        *([("Number of parameters in mtp block", count.further, 2)] if count.further else []),
        ("Number of parameters in embedding layers", count.embedding, 2),
        ("Total number of parameters", count.block + count.further + count.embedding, 2),
        ("Number of parameters in most loaded shard", count.most_loaded_shard, 4),
    ]
    if has_other_shards:
        parts.append(("Number of parameters in other shards", count.other_shards, 4))
    for label, number, digits in parts:
        unit, size, _ = next(unit for unit in _UNITS if number >= unit[2])
        # The lines of blocks have two blanks in the original; readers of logs may count on them.
        blanks = "  " if label.endswith("block") else " "
        print(f"{label} in {unit}:{blanks}{number / size:.{digits}f}", flush=True)


def compute_weight_and_optimizer_memory(args: Namespace, verbose: bool = False) -> float:
    """Bytes of weights, gradients and optimizer state on the fullest rank.

    Args:
        args: validated arguments.
        verbose: print the parameter counts.
    """
    count = estimate_parameters(args)
    if verbose:
        _print_parameters(count, has_other_shards=args.pipeline_model_parallel_size > 1)
    if not args.use_distributed_optimizer:
        return count.most_loaded_shard * BYTES_PER_PARAMETER
    replicas = args.data_parallel_size
    total = (count.most_loaded_shard - count.experts) * _bytes_each(replicas)
    if count.experts:
        stage = args.data_parallel_size * args.context_parallel_size * args.tensor_model_parallel_size
        total += count.experts * _bytes_each(stage / _expert_ranks(args))
    return total


def _bytes_each(replicas: float) -> float:
    """Bytes of a parameter whose optimizer state is shared by so many ranks."""
    return REPLICATED_BYTES_PER_PARAMETER + SHARDABLE_BYTES_PER_PARAMETER / replicas


def compute_activation_memory(args: Namespace, num_microbatches: int | None, verbose: bool = False) -> float:
    """Bytes of activations kept on the first stage, with selective recompute and sequence parallelism.

    Args:
        args: validated arguments.
        num_microbatches: micro-batches of an iteration; None assumes that they fill the pipeline.
        verbose: print the parts.
    """
    stages, tensor_ranks = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    estimate = memory_estimate(args)
    per_layer = estimate.layer_activations
    # The embedding keeps its inputs for every micro-batch in flight.
    total = per_layer * args.num_layers + estimate.input_activations * stages

    virtual_stages = args.virtual_pipeline_model_parallel_size
    if virtual_stages is not None:
        in_flight = 1 + (stages - 1) / (stages * virtual_stages)
        note = f"Memory penalty from interleaved schedule: {in_flight:.2f}"
    else:
        in_flight = 1.0 if num_microbatches is None else min(1.0, num_microbatches / stages)
        note = f"Number of in-flight microbatches: {in_flight * stages:g}"
    total *= in_flight
    if stages == 1:
        total += estimate.output_activations
    if verbose:
        print(
            "Activation memory footprint per transformer layer: "
            f"{per_layer / MEBIBYTE / tensor_ranks:.1f} MB\n{note}",
            flush=True,
        )
    return total / tensor_ranks


def report_theoretical_memory(
    args: Namespace, num_microbatches: int | None = None, verbose: bool = False
) -> None:
    """Print what the fullest device should need.

    Activations are part of the report where their formula holds: with sequence parallelism and selective
    recompute.
    """
    weights = compute_weight_and_optimizer_memory(args, verbose=verbose) / MEBIBYTE
    if not (args.sequence_parallel and args.recompute_granularity == "selective"):
        print(f"Theoretical memory footprints: weight and optimizer={weights:.2f} MB", flush=True)
        return
    activations = compute_activation_memory(args, num_microbatches, verbose=verbose) / MEBIBYTE
    print(
        f"Theoretical memory footprints: weight and optimizer={weights:.2f} MB, "
        f"activation={activations:.2f} MB, total={weights + activations:.2f} MB",
        flush=True,
    )
