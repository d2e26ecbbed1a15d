"""What a memory saver that is accepted but not built here would have saved on one rank.

Sizes come from the formulas of the model's family; this module divides them among ranks.
"""

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron.training.arguments.flag import Saving

if TYPE_CHECKING:
    from megatron.core.models.family import MemoryEstimate

MEBIBYTE = 2**20


def lost_saving(saving: Saving | None, args: Namespace) -> str:
    """The end of the notice of a memory saver: the memory that this run does not save; or nothing.

    Args:
        saving: what the flag would save; None for flags that are no memory savers.
        args: completed arguments; sizes that are missing or make no sense give no estimate.
    """
    if saving is None:
        return ""
    sizes = (args.num_layers, args.hidden_size, args.num_attention_heads, args.seq_length)
    sizes += (args.micro_batch_size, args.ffn_hidden_size, args.kv_channels)
    if any(size is None or size < 1 for size in sizes) or min(_parallel_sizes(args)) < 1:
        return ""
    return f"; not saved: about {saving.estimate(args) / MEBIBYTE:.3g} MiB per rank ({saving.what})"


def _parallel_sizes(args: Namespace) -> tuple[int, int, int]:
    return (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)


def _estimate(args: Namespace) -> "MemoryEstimate":
    from megatron.training.model_family import memory_estimate  # with torch, which other tools do not need

    return memory_estimate(args)


def _layers(args: Namespace) -> float:
    """One tensor-parallel rank's part of the layers of one pipeline stage."""
    return args.num_layers / args.pipeline_model_parallel_size / args.tensor_model_parallel_size


def _weights(args: Namespace) -> float:
    """Weights of the linear layers of a rank."""
    return _estimate(args).layer_weights * _layers(args)


def _activations(args: Namespace, elements_of_layer: float) -> float:
    """Elements of a rank, of a micro-batch that has so many in one layer of the whole model.

    What is whole on each tensor-parallel rank unless sequence parallelism splits it counts as split, so that
    the estimate errs on the low side.
    """
    return elements_of_layer * _layers(args) / args.context_parallel_size


def _bytes(args: Namespace) -> int:
    return 2 if args.fp16 or args.bf16 else 4


WEIGHT_COPY = Saving("the bf16 copy of the weights of the layers", lambda args: 2 * _weights(args))
ATTENTION_ACTIVATIONS = Saving(
    "queries, keys, values and outputs of attention",
    lambda args: _activations(args, _estimate(args).attention_tensors) * _bytes(args),
)
ACTIVATION_OUTPUTS = Saving(
    "outputs of the MLP's activation function",
    lambda args: _activations(args, _estimate(args).mlp_activations) * _bytes(args),
)
# Kept for backward in one byte per element instead of two or four.
FP8_INPUTS = Saving(
    "inputs of linear layers in one byte per element",
    lambda args: _activations(args, _estimate(args).linear_inputs) * (_bytes(args) - 1),
)
FP8_WEIGHTS = Saving(
    "weights of the layers in one byte per element", lambda args: _weights(args) * (_bytes(args) - 1)
)
