"""Refuses sizes that no memory of this machine can hold, before anything of them is allocated.

Every estimate is a lower bound by closed form: a run that is refused would have ended for want of memory.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable, Collection
from copy import copy

from megatron.core import accelerator
from megatron.core.errors import ConfigError
from megatron.training.data.batch import sends_attention_mask
from megatron.training.global_vars import get_unread_flags
from megatron.training.model_family import batch_shape, memory_estimate, model_family

GIB = 2**30
# Bytes per sample of a built index: its position in the shuffled order, and the start of its tokens.
_INDEX_BYTES_PER_SAMPLE = 12
# Flags whose values multiply into memory, and the arguments they set.
_SIZES = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--kv-channels": "kv_channels",
    "--max-position-embeddings": "max_position_embeddings",
    "--vocab-size": "padded_vocab_size",
    "--make-vocab-size-divisible-by": "padded_vocab_size",
    "--seq-length": "seq_length",
    "--micro-batch-size": "micro_batch_size",
    "--global-batch-size": "global_batch_size",
    "--train-iters": "train_iters",
    "--train-samples": "train_samples",
    "--eval-iters": "eval_iters",
}


def check_memory(args: Namespace) -> None:
    """Compare a lower bound of what this rank needs with the memory of its device and of its host.

    Raises:
        ConfigError: it needs more. The message names the flag whose value weighs most.
    """
    record = get_unread_flags()
    given = _SIZES if record is None else record.given
    args = Namespace(**vars(args))
    for memory, estimate, total in (
        (accelerator.device_name(), _device_bytes, accelerator.total_memory()),
        ("this host", _host_bytes, _host_memory()),
    ):
        needed = estimate(args)
        if total and needed > total:
            flag, value = _heaviest(args, given, estimate)
            raise ConfigError(
                f"{flag} {value}: this run needs at least {_gib(needed)} GiB of memory on each rank, and "
                f"{memory} has {_gib(total)} GiB; use a smaller {flag}"
            )


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _device_bytes(args: Namespace) -> float:
    """Parameters with gradients and optimizer state, and the largest tensor of a forward pass."""
    return _parameters(args) * _bytes_per_parameter(args) + _largest_activation(args)


def _parameters(args: Namespace) -> float:
    """Weights of linear layers and embeddings of the first pipeline stage, on one tensor-parallel rank."""
    estimate = memory_estimate(args)
    layers = args.num_layers // args.pipeline_model_parallel_size
    split = layers * estimate.layer_weights + estimate.table_parameters
    table = args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0
    experts = 0.0
    if estimate.expert_parameters:
        shares = args.expert_model_parallel_size * args.expert_tensor_parallel_size
        # Some stage has at least as many as the stages have on average.
        experts = estimate.expert_parameters / args.pipeline_model_parallel_size / shares
    return split / args.tensor_model_parallel_size + args.hidden_size * table + experts


def _bytes_per_parameter(args: Namespace) -> float:
    """Weight and gradient; master weight and two moments of Adam, where a step is to be made."""
    element = 2 if args.fp16 or args.bf16 else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else element
    if args.skip_train or args.optimizer != "adam":
        return element + gradient
    state = 12 if element == 2 else 8
    shards = args.data_parallel_size * args.context_parallel_size if args.use_distributed_optimizer else 1
    return element + gradient + state / shards


def _largest_activation(args: Namespace) -> float:
    """Bytes of the largest among residual stream, MLP activations, logits and a micro-batch's tensors."""
    estimate, split = memory_estimate(args), args.tensor_model_parallel_size
    computed = [
        estimate.residual_stream / (split if args.sequence_parallel else 1),
        estimate.mlp_activations / split,
    ]
    if args.pipeline_model_parallel_size == 1:
        computed.append(estimate.logits / split)
    element = 2 if args.fp16 or args.bf16 else 4
    return max(max(computed) * element / args.context_parallel_size, _largest_batch_tensor(args))


def _largest_batch_tensor(args: Namespace) -> float:
    """Bytes of the largest tensor of a micro-batch, which every rank reads or receives whole."""
    shape, with_mask = batch_shape(args, args.micro_batch_size), sends_attention_mask(args)
    return max(
        math.prod(tensor.shape(shape)) * tensor.dtype.itemsize
        for tensor in model_family(args).batch.values()
        if with_mask or not tensor.is_attention_mask
    )


def _host_bytes(args: Namespace) -> float:
    """Indices of the samples that are asked of the data sets, one sample of tokens, and what a CPU holds."""
    samples = 0 if args.skip_train else args.train_samples or 0
    if args.train_iters and not args.train_samples and not args.skip_train:
        samples = args.train_iters * args.global_batch_size
    samples += args.eval_iters * args.global_batch_size
    own = _INDEX_BYTES_PER_SAMPLE * samples + 8 * args.seq_length
    return own if accelerator.is_accelerated() else own + _device_bytes(args)


def _host_memory() -> float:
    """Bytes of memory and swap of this host; 0 where that is unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kib = dict(line.split()[:2] for line in file)
        return (int(kib["MemTotal:"]) + int(kib["SwapTotal:"])) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _heaviest(
    args: Namespace, given: Collection[str], estimate: Callable[[Namespace], float]
) -> tuple[str, int]:
    """The flag among ``given`` whose value, if it were 1, would lower the need the most."""

    def without(flag: str) -> float:
        lighter = copy(args)
        setattr(lighter, _SIZES[flag], 1)
        return estimate(lighter)

    used = {flag: value for flag in _SIZES if flag in given and (value := getattr(args, _dest(flag), None))}
    flag = min(used, key=lambda name: (without(name), -used[name]))
    return flag, used[flag]


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
