"""Rules about the schedules of the learning rate and of the weight decay."""

from argparse import Namespace
from collections.abc import Collection

from megatron.training.arguments.problem import Problem


def rate_is_given(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Training needs a learning rate."""
    if args.lr is None and (args.train_iters or args.train_samples) and not args.skip_train:
        return [Problem("--lr", None, "is required for training", "for example --lr 3e-4")]
    return []


def rates_are_ordered(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The floor and the first rate do not exceed the peak."""
    problems = []
    peaks = (("--lr", args.lr, (("--min-lr", args.min_lr), ("--lr-warmup-init", args.lr_warmup_init))),)
    if args.decoupled_lr is not None:
        floor = args.decoupled_min_lr
        peaks += (("--decoupled-lr", args.decoupled_lr, (("--decoupled-min-lr", floor),)),)
    for peak_flag, peak, floors in peaks:
        for flag, floor in floors:
            if peak is not None and floor is not None and floor > peak:
                rule = f"is above {peak_flag} {peak:g}"
                problems.append(Problem(flag, f"{floor:g}", rule, f"use {flag} {peak / 10:g}"))
    return problems


def warmup_ends_before_decay(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Warm-up is given once and is shorter than the span over which the rate decays."""
    if not (args.train_iters or args.train_samples):
        return []
    unit = "iters" if args.train_iters else "samples"
    flag = f"--lr-warmup-{unit}"
    warmup = getattr(args, f"lr_warmup_{unit}")
    span = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    if args.lr_warmup_fraction is not None and warmup:
        rule = f"excludes {flag} {warmup}"
        return [Problem("--lr-warmup-fraction", args.lr_warmup_fraction, rule, "keep one of them")]
    if warmup and span > 0 and warmup >= span:
        rule = f"is not below the {span} {'iterations' if unit == 'iters' else unit} of the decay"
        return [Problem(flag, warmup, rule, f"use {flag} {span // 10} or a longer --lr-decay-{unit}")]
    return []


def cool_down_is_given(args: Namespace, given: Collection[str]) -> list[Problem]:
    """WSD needs the length of its last part."""
    unit = "samples" if args.train_samples else "iters"
    if args.lr_decay_style != "WSD" or getattr(args, f"lr_wsd_decay_{unit}") is not None:
        return []
    flag = f"--lr-wsd-decay-{unit}"
    length = (args.train_samples or args.train_iters or 1000) // 10
    return [Problem("--lr-decay-style", "WSD", f"needs {flag}", f"for example {flag} {max(1, length)}")]


def weight_decay_grows(args: Namespace, given: Collection[str]) -> list[Problem]:
    """A constant weight decay has no ends; a growing one has both, in order."""
    start, end, style = args.start_weight_decay, args.end_weight_decay, args.weight_decay_incr_style
    flags = {"--start-weight-decay": start, "--end-weight-decay": end}
    if style == "constant":
        rule = "has no meaning with a constant weight decay"
        remedy = "use --weight-decay, or --weight-decay-incr-style linear"
        return [
            Problem(flag, number, rule, remedy)
            for flag, number in flags.items()
            if number is not None and number != args.weight_decay
        ]
    missing = [flag for flag, number in flags.items() if number is None]
    if missing:
        return [
            Problem(
                flag, None, f"is required with --weight-decay-incr-style {style}", f"for example {flag} 0.1"
            )
            for flag in missing
        ]
    if end < start:
        rule = f"is below --start-weight-decay {start:g}"
        return [Problem("--end-weight-decay", end, rule, f"use --end-weight-decay {start:g} or more")]
    return []


RULES = (rate_is_given, rates_are_ordered, warmup_ends_before_decay, cool_down_is_given, weight_decay_grows)
