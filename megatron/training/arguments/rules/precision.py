"""Rules about number formats."""

from argparse import Namespace
from collections.abc import Collection

from megatron.training.arguments.problem import Problem


def one_precision(args: Namespace, given: Collection[str]) -> list[Problem]:
    """One 16-bit format at most."""
    if args.fp16 and args.bf16:
        return [Problem("--fp16", None, "excludes --bf16", "keep one of them")]
    return []


def sixteen_bit_options(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Options that only exist in one 16-bit format."""
    wanted = (
        ("--fp16-lm-cross-entropy", args.fp16_lm_cross_entropy, args.fp16, "--fp16"),
        (
            "--fp32-residual-connection",
            args.fp32_residual_connection,
            args.fp16 or args.bf16,
            "--fp16 or --bf16",
        ),
        ("--reuse-fp32-param", args.reuse_fp32_param, args.bf16, "--bf16"),
    )
    return [
        Problem(flag, None, f"needs {needs}", f"add {needs}, or leave it out")
        for flag, on, met, needs in wanted
        if on and not met
    ]


def deterministic_kernels(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Kernels without a deterministic form."""
    if "--deterministic-mode" not in given:
        return []
    asked = {
        "--use-flash-attn": args.use_flash_attn,
        "--cross-entropy-loss-fusion": args.cross_entropy_loss_fusion,
    }
    return [
        Problem(flag, None, "has no deterministic form", "leave it out, or leave out --deterministic-mode")
        for flag, on in asked.items()
        if on
    ]


def loss_scale_has_room(args: Namespace, given: Collection[str]) -> list[Problem]:
    """A scale that is searched for begins at its floor or above."""
    first, floor = args.initial_loss_scale, args.min_loss_scale
    if not args.fp16 or args.loss_scale is not None or first >= floor:
        return []
    rule = f"is below --min-loss-scale {floor:g}"
    return [
        Problem("--initial-loss-scale", f"{first:g}", rule, f"use --initial-loss-scale {floor:g} or more")
    ]


RULES = (one_precision, sixteen_bit_options, deterministic_kernels, loss_scale_has_room)
