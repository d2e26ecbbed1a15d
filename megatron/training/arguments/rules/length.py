"""Rules about batch sizes and the length of the run."""

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


RULES = (batch_divides, one_measure_of_length, ramp_up)
