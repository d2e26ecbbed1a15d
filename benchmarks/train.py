"""Tokens per second of a training step, and its share of this machine's matmul peak.

The peak is measured in the same process, alternating with the training steps, so that a noisy machine
slows both. Run: python benchmarks/train.py [--precision fp32 bf16 fp16] [--hidden 256 ...]
"""

import argparse
import statistics
import time
from argparse import Namespace
from pathlib import Path
from sys import path

path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron.core import accelerator, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.logging.step_log import num_floating_point_operations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=8, help="training steps and matmul runs, in turns")
    return parser.parse_args()


def initialize() -> None:
    """A world of one process."""
    accelerator.set_device(0)
    torch.distributed.init_process_group(
        accelerator.collective_backend("nccl"), store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


def make_step(args: Namespace, dtype: torch.dtype):
    """A function that runs one full training step: forward, backward, clip, update."""
    half = dtype is not torch.float32
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,
        gradient_accumulation_fusion=True,
        fp16=dtype is torch.float16,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=args.vocab,
        max_sequence_length=args.seq,
        share_embeddings_and_output_weights=True,
    ).to(accelerator.current_device())
    if half:
        model = Float16Module(config, model)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=half), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-4, fp16=config.fp16, bf16=config.bf16, params_dtype=dtype, loss_scale=128.0),
        [model],
    )
    device = accelerator.current_device()
    tokens = torch.randint(args.vocab, (args.batch, args.seq), device=device)
    positions = torch.arange(args.seq, device=device).expand_as(tokens)

    def step() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, positions, None, labels=tokens.roll(-1, 1)).float().mean()
        optimizer.scale_loss(loss).backward()
        finalize_model_grads([model])
        optimizer.step()

    return step


def make_matmul(dtype: torch.dtype):
    """A large square product, the fastest thing this machine can do: returns (function, operations)."""
    size = 8192 if accelerator.is_accelerated() else 2048
    left, right = (torch.randn(size, size, device=accelerator.current_device()).to(dtype) for _ in range(2))
    return (lambda: torch.mm(left, right)), 2.0 * size**3


def seconds(function) -> float:
    """Wall time of one call, the device's work included."""
    accelerator.synchronize()
    started = time.perf_counter()
    function()
    accelerator.synchronize()
    return time.perf_counter() - started


def main() -> None:
    args = parse_args()
    initialize()
    shape = Namespace(
        seq_length=args.seq,
        hidden_size=args.hidden,
        num_layers=args.layers,
        num_attention_heads=args.heads,
        kv_channels=args.hidden // args.heads,
        group_query_attention=False,
        swiglu=False,
        glu_gate_last=False,
        ffn_hidden_size=4 * args.hidden,
        padded_vocab_size=args.vocab,
    )
    operations = num_floating_point_operations(shape, args.batch)
    tokens = args.batch * args.seq
    print(f"torch {torch.__version__}, {accelerator.device_name()}, {torch.get_num_threads()} threads")
    print(f"{'':>5} {'step ms':>9} {'tokens/s':>10} {'GFLOP/s':>9} {'matmul peak':>12} {'share':>6}")
    for name in args.precision:
        step = make_step(args, DTYPES[name])
        # What the machine can reach: half precision may be computed in a faster type.
        compute_dtype = accelerator.matmul_compute_dtype(DTYPES[name])
        matmul, matmul_operations = make_matmul(compute_dtype)
        for function in (step, step, matmul):
            function()
        pairs = [(seconds(step), seconds(matmul)) for _ in range(args.rounds)]
        step_s, matmul_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        achieved, peak = operations / step_s / 1e9, matmul_operations / matmul_s / 1e9
        label = str(compute_dtype).removeprefix("torch.")
        print(
            f"{name:>5} {step_s * 1e3:9.1f} {tokens / step_s:10.0f} {achieved:9.1f} "
            f"{peak:12.1f} {achieved / peak:6.1%}  (products in {label})"
        )


if __name__ == "__main__":
    main()
