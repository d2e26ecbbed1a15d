"""Rules about batch sizes, the length of the run, its schedules, and where its weights come from."""

from argparse import Namespace
from collections.abc import Collection

from megatron.training.arguments.problem import Problem


def batch_divides(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The global batch is a whole number of micro-batches on every data-parallel rank."""
    micro, total = args.micro_batch_size, args.global_batch_size
    if not micro or not total or micro < 1 or total < 1:
        return []
    unit = micro * args.data_parallel_size
    if total % unit == 0 or (args.decrease_batch_size_if_needed and total >= unit):
        return []
    return [
        Problem(
            "--global-batch-size",
            total,
            f"is not a multiple of --micro-batch-size {micro} x data-parallel size {args.data_parallel_size}",
            f"use --global-batch-size {max(unit, total - total % unit)}",
        )
    ]


def one_measure_of_length(args: Namespace, given: Collection[str]) -> list[Problem]:
    """A run is measured in iterations or in samples, and so is everything about it."""
    if args.train_iters and args.train_samples:
        return [Problem("--train-samples", args.train_samples, "excludes --train-iters", "keep one of them")]
    if args.train_iters:
        measure, foreign = "--train-iters", ("lr_decay_samples", "lr_warmup_samples", "rampup_batch_size")
    elif args.train_samples:
        measure, foreign = "--train-samples", ("lr_decay_iters", "lr_warmup_iters")
    else:
        return _unmeasured(args)
    problems = []
    for name in foreign:
        asked = getattr(args, name)
        if asked:
            flag = "--" + name.replace("_", "-")
            works = (
                flag.replace("samples", "iters")
                if measure == "--train-iters"
                else flag.replace("iters", "samples")
            )
            remedy = "use --train-samples" if name == "rampup_batch_size" else f"use {works}"
            problems.append(Problem(flag, asked, f"does not go with {measure}", remedy))
    return problems


def _unmeasured(args: Namespace) -> list[Problem]:
    """No length: an error only where training is clearly meant, because tools share these arguments."""
    if args.lr is None or args.skip_train or args.train_iters == 0 or args.train_samples == 0:
        return []
    return [
        Problem("--train-iters", None, "or --train-samples is required", "for example --train-iters 1000")
    ]


def ramp_up(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Three whole numbers: the first size, the increment, the samples over which the size grows."""
    ramp, total = args.rampup_batch_size, args.global_batch_size
    if not ramp:
        return []
    if len(ramp) != 3 or not all(isinstance(number, int) for number in ramp):
        rule = "takes three whole numbers: start size, increment, samples"
        return [Problem("--rampup-batch-size", ramp, rule, "for example --rampup-batch-size 32 32 100000")]
    start, step, samples = ramp
    problems = []
    if start < 1 or step < 1 or samples < 1:
        rule = "its numbers must be positive"
        problems.append(
            Problem("--rampup-batch-size", ramp, rule, "for example --rampup-batch-size 32 32 100000")
        )
    elif total and total > 0 and (start >= total or (total - start) % step):
        start = start if start < total else max(1, total - step)
        works = next(d for d in range(min(step, total - start) or 1, 0, -1) if (total - start) % d == 0)
        problems.append(
            Problem(
                "--rampup-batch-size",
                ramp,
                f"does not reach --global-batch-size {total} in whole steps",
                f"use --rampup-batch-size {start} {works} {samples}",
            )
        )
    problems += _ramp_divides(args, start, step)
    return problems


def _ramp_divides(args: Namespace, start: int, step: int) -> list[Problem]:
    """Every size on the way is a whole number of micro-batches."""
    unit = (args.micro_batch_size or 1) * args.data_parallel_size
    if unit < 1 or args.decrease_batch_size_if_needed or (start % unit == 0 and step % unit == 0):
        return []
    rule = f"start size and increment must be multiples of {unit} (micro-batch size x data-parallel size)"
    remedy = "choose such numbers, or add --decrease-batch-size-if-needed"
    return [Problem("--rampup-batch-size", args.rampup_batch_size, rule, remedy)]


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


def weights_have_a_source(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Weights that are not drawn are loaded."""
    if args.perform_initialization or args.load is not None or args.pretrained_checkpoint is not None:
        return []
    rule = "leaves the weights as the memory happens to be, so it needs --load"
    return [Problem("--no-initialization", None, rule, "add --load DIR, or leave it out")]


RULES = (
    batch_divides,
    one_measure_of_length,
    ramp_up,
    rate_is_given,
    rates_are_ordered,
    warmup_ends_before_decay,
    cool_down_is_given,
    weight_decay_grows,
    weights_have_a_source,
)
