"""Memory and speed of a layer of experts.

    python benchmarks/experts.py [--precision fp32 bf16] [--tokens 2048] [--hidden 512] [--rounds 9]

It prints, for forward and backward of one layer:

* the peak of what torch allocates in a grouped layer of 64 experts, 6 a token, over the sum of the tensors
  that the formulas need at once (on a CPU only, whose allocator tells of every block);
* tokens/s of grouped experts and of sequential ones, 2 a token, by number of experts;
* tokens/s of 2 of 8 experts, and of a dense layer with as many multiplications.

In brackets are the ratios to the last of a line. Speeds of one line are medians of runs in turns, so that a
noisy machine slows all of them.
"""

import argparse
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from sys import path
from typing import Any

path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.train import DTYPES, initialize, seconds
from megatron.core import accelerator
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils.tensors import mark

# Kind of layer -> whether its experts are grouped, and in parameters with TransformerEngine's names
KINDS = {
    "grouped": (True, False),
    "te-grouped": (True, True),
    "sequential": (False, False),
    "dense": (False, False),
}


def parse_args() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=512, help="inner width of one expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=9, help="runs of each kind, in turns")
    return parser.parse_args()


def make_layer(
    args: Namespace, dtype: torch.dtype, kind: str, experts: int | None = None, topk: int = 2
) -> nn.Module:
    """A layer of gated experts of one of ``KINDS``; a dense one is as wide as the experts of a token."""
    grouped, use_te = KINDS[kind]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden,
        num_attention_heads=4,
        ffn_hidden_size=topk * args.width,
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_ffn_hidden_size=args.width if experts else None,
        moe_grouped_gemm=grouped,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        gradient_accumulation_fusion=True,
    )
    if kind == "dense":
        return MLP(config, MLPSubmodules(ColumnParallelLinear, RowParallelLinear))
    spec = get_moe_module_spec(use_te=use_te, num_experts=experts, moe_grouped_gemm=grouped)
    return build_module(spec, config)


def make_pass(layer: nn.Module, args: Namespace, dtype: torch.dtype) -> Callable[[], None]:
    """A function that runs forward and backward, and adds the weights' gradients to those of before."""
    for weight in layer.parameters():
        # As the data-parallel wrapper and its hooks have it in training.
        mark(weight, main_grad=torch.zeros_like(weight))
        weight.register_post_accumulate_grad_hook(_add_to_main_grad)
    shape = args.tokens, 1, args.hidden
    x, grad = (torch.randn(shape, device=accelerator.current_device()).to(dtype) for _ in range(2))
    x.requires_grad_()

    def one_pass() -> None:
        layer(x)[0].backward(grad)
        x.grad = None

    return one_pass


@torch.no_grad()
def _add_to_main_grad(weight: Any) -> None:
    if not getattr(weight, "grad_added_to_main_grad", False):
        weight.main_grad.add_(weight.grad)
    weight.grad = None


def peak_bytes(function: Callable[[], None]) -> int:
    """Most bytes that a call holds at a time, over those that were held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None, "it has run"
    held = peak = 0
    blocks = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for block in sorted(blocks, key=lambda event: event.start_ns()):
        held += block.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak


def needed_bytes(args: Namespace, dtype: torch.dtype, experts: int, topk: int) -> dict[str, int]:
    """Tensors of the formulas that exist at once at the fullest moment of a pass, in bytes.

    Backward has the inputs of both matmuls, [r, h] and [r, f], and of the activation, [r, 2f]. The second
    matmul adds the gradients of its output, [r, h], and input; its input is gone when the activation gives
    the gradient of its own.
    """
    size, hidden, width = dtype.itemsize, args.hidden, args.width
    weights = 3 * experts * hidden * width * size
    of_a_row = max(2 * hidden + 4 * width, hidden + 5 * width)
    return {
        "weights": weights,
        "their gradients": weights,
        "input, output, their gradients": 4 * args.tokens * hidden * size,
        "rows": args.tokens * topk * of_a_row * size,
        # Weights, their gradient and that of the logits, and the map.
        "routing": args.tokens * experts * (3 * size + 1),
    }


def report_memory(args: Namespace, dtype: torch.dtype, experts: int = 64, topk: int = 6) -> None:
    """Prints the peak of grouped layers and its parts."""
    parts = needed_bytes(args, dtype, experts, topk)
    needed = sum(parts.values())
    print("  MiB that the formulas need:", ", ".join(f"{name} {n / 2**20:.1f}" for name, n in parts.items()))
    for kind in ("grouped", "te-grouped"):
        layer = make_layer(args, dtype, kind, experts, topk)
        one_pass = make_pass(layer, args, dtype)
        one_pass()
        # A pass starts with weights and their gradients, its input and the output's gradient in memory.
        before = 2 * sum(t.nbytes for t in layer.parameters())
        before += 2 * args.tokens * args.hidden * dtype.itemsize
        peak = before + peak_bytes(one_pass)
        print(
            f"  {kind}, {topk} of {experts} experts: peak {peak / 2**20:.1f} MiB, "
            f"{peak / needed:.2f} x {needed / 2**20:.1f} MiB",
            flush=True,
        )


def report_speed(args: Namespace, dtype: torch.dtype, experts: int, kinds: list[str]) -> None:
    """Prints tokens/s of layers of some kinds, medians of runs in turns, and the ratios to the last one's."""
    passes = [make_pass(make_layer(args, dtype, kind, experts), args, dtype) for kind in kinds]
    for one_pass in passes:
        one_pass()
    times = [[seconds(one_pass) for one_pass in passes] for _ in range(args.rounds)]
    columns = [statistics.median(column) for column in zip(*times, strict=True)]
    cells = [
        f"{kind} {args.tokens / time:.0f} ({columns[-1] / time:.2f})"
        for kind, time in zip(kinds, columns, strict=True)
    ]
    print(f"  2 of {experts:3} experts, tokens/s: {', '.join(cells)}", flush=True)


def main() -> None:
    args = parse_args()
    initialize()
    print(f"torch {torch.__version__}, {accelerator.device_name()}, {torch.get_num_threads()} threads")
    print(f"{args.tokens} tokens, hidden {args.hidden}, experts' inner width {args.width}, gated")
    for name in args.precision:
        dtype = DTYPES[name]
        print(f"{name}:")
        if not accelerator.is_accelerated():
            report_memory(args, dtype)
        for experts in args.experts:
            report_speed(args, dtype, experts, ["grouped", "te-grouped", "sequential"])
        report_speed(args, dtype, 8, ["grouped", "dense"])


if __name__ == "__main__":
    main()
