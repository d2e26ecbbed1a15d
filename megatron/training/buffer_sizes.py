"""Sizes of communication buffers by process group: those asked for, and one that follows from the model."""

from argparse import Namespace

from megatron.core.parallel_state.groups import GROUP_LABELS

_MB = 1 << 20


def _entries(text: str) -> list[tuple[str, str]]:
    """``"dp:400; tp:300"`` -> ``[("dp", "400"), ("tp", "300")]``, unchecked."""
    pairs = [entry.partition(":") for entry in text.split(";") if entry.strip()]
    return [(name.strip().replace("-", "_"), size.strip()) for name, _, size in pairs]


def buffer_size_problem(text: str) -> str | None:
    """What is wrong with a value of ``--hccl-group-buffer``; None if nothing is."""
    for name, size in _entries(text):
        if name not in GROUP_LABELS:
            return f"names no group with {name!r}; there are {', '.join(sorted(GROUP_LABELS))}"
        if not size.isdigit() or int(size) < 1:
            return f"gives {name} no whole number of MB"
    return None


def communicator_buffers(args: Namespace) -> dict[str, int]:
    """MB by group, for ``initialize_model_parallel``: the user's, and for stages the size of one message."""
    sizes = {name: int(size) for name, size in _entries(args.hccl_group_buffer or "")}
    if args.pipeline_model_parallel_size > 1:
        sizes.setdefault("pp", -(-_stage_message_bytes(args) // _MB))
    return sizes


def _stage_message_bytes(args: Namespace) -> int:
    """Bytes of the activations that one stage hands to the next: [s/cp(/tp), b, h] in ``params_dtype``."""
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    if args.sequence_parallel:
        tokens //= args.tensor_model_parallel_size
    element = 4 if args.fp32_residual_connection else args.params_dtype.itemsize
    return tokens * args.hidden_size * element
