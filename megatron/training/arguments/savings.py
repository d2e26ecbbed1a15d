"""What a memory saver that is accepted but not built here would have saved on one rank, by closed forms."""

from argparse import Namespace

from megatron.training.arguments.flag import Saving

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


def _share(args: Namespace) -> float:
    """One tensor-parallel rank's part of the layers of one pipeline stage."""
    return args.num_layers / args.pipeline_model_parallel_size / args.tensor_model_parallel_size


def _weights(args: Namespace) -> float:
    """Weights of the linear layers of a rank: queries, keys, values, projection, and the MLP."""
    heads, groups = args.num_attention_heads, args.num_attention_heads
    if args.group_query_attention:
        groups = args.num_query_groups
    attention = args.hidden_size * args.kv_channels * 2 * (heads + groups)
    gate = 3 if args.swiglu or args.is_x_model else 2
    return _share(args) * (attention + gate * args.hidden_size * args.ffn_hidden_size)


def _positions(args: Namespace) -> float:
    """Positions of one micro-batch on a rank, in all its layers."""
    tokens = args.seq_length * args.micro_batch_size / args.context_parallel_size
    return tokens * _share(args)


def _bytes(args: Namespace) -> int:
    return 2 if args.fp16 or args.bf16 else 4


def _attention_activations(args: Namespace) -> float:
    """Queries, keys, values and the output of attention, which backward needs."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    width = (2 * args.num_attention_heads + 2 * groups) * args.kv_channels
    return _positions(args) * width * _bytes(args)


def _activation_outputs(args: Namespace) -> float:
    """The output of the MLP's activation function, the input of its second projection."""
    return _positions(args) * args.ffn_hidden_size * _bytes(args)


def _linear_inputs_in_fp8(args: Namespace) -> float:
    """Inputs of the four linear layers, kept for backward in one byte per element instead of two or four.

    The first and third are whole on each tensor-parallel rank unless sequence parallelism splits them; here
    they count as split, so that the estimate errs on the low side.
    """
    attention_width = args.num_attention_heads * args.kv_channels
    width = 2 * args.hidden_size + attention_width + args.ffn_hidden_size
    return _positions(args) * width * (_bytes(args) - 1)


WEIGHT_COPY = Saving("the bf16 copy of the weights of the layers", lambda args: 2 * _weights(args))
ATTENTION_ACTIVATIONS = Saving("queries, keys, values and outputs of attention", _attention_activations)
ACTIVATION_OUTPUTS = Saving("outputs of the MLP's activation function", _activation_outputs)
FP8_INPUTS = Saving("inputs of linear layers in one byte per element", _linear_inputs_in_fp8)
FP8_WEIGHTS = Saving(
    "weights of the layers in one byte per element", lambda args: _weights(args) * (_bytes(args) - 1)
)
