"""Compare the losses of two runs.

A run is a log file with the trainer's iteration lines (Megatron's own format, so logs of other machines and
of the original work too), or a TensorBoard directory. Iterations that both runs report are compared; the
relative error of an iteration is |a - b| / |a|, with RUN_A as the reference.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.errors import ConfigError, DataError

_ITERATION = re.compile(r"\biteration +(\d+)/")
_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Comparison:
    """What is said about two runs.

    Attributes:
        iterations: compared, ascending.
        errors: relative error of each; inf where one loss is not a finite number and the other is.
        bound: an error above it is too large.
    """

    iterations: list[int]
    errors: list[float]
    bound: float

    @property
    def mean(self) -> float:
        return sum(self.errors) / len(self.errors)

    @property
    def largest(self) -> tuple[float, int]:
        """(error, iteration)"""
        return max(zip(self.errors, self.iterations, strict=True), key=lambda pair: pair[0])

    @property
    def first_beyond(self) -> int | None:
        """First iteration whose error is above the bound."""
        pairs = zip(self.iterations, self.errors, strict=True)
        return next((iteration for iteration, error in pairs if error > self.bound), None)


def read_run(path: Path, tag: str) -> dict[int, float]:
    """Losses by iteration; an iteration that occurs twice (a resumed run) counts as last reported.

    Raises:
        DataError: nothing there, or no such losses in it.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    losses = _read_tensorboard(path, tag) if path.is_dir() else _read_log(path, tag)
    if not losses:
        hint = "lines as 'iteration 1/ 10 | lm loss: 1.0E+01 |'" if path.is_file() else "TensorBoard events"
        raise DataError(f"{path}: no {tag!r} found among its {hint}; --tag names another quantity")
    return losses


def _read_log(path: Path, tag: str) -> dict[int, float]:
    losses = {}
    name, _, split = tag.rpartition(" ")
    if split in ("validation", "test"):  # the lines of evaluations, under TensorBoard's tags
        lines = re.compile(rf"\b{split} loss at iteration (\d+)\b")
        wanted = re.compile(rf"\| *{re.escape(name)} value: *([-+\w.]+)")
    else:
        lines, wanted = _ITERATION, re.compile(rf"\| *{re.escape(tag)}: *([-+\w.]+)")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        iteration, value = lines.search(line), wanted.search(line)
        if iteration and value:
            losses[int(iteration[1])] = _number(value[1], path)
    return losses


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{path}: {text!r} is no number") from None


def _read_tensorboard(path: Path, tag: str) -> dict[int, float]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    except ImportError:
        raise ConfigError(
            f"{path} is a directory: reading TensorBoard events needs tensorboard: "
            "pip install tensorboard, or give the log file"
        ) from None
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars(tag)}


def compare(reference: dict[int, float], other: dict[int, float], bound: float) -> Comparison:
    """Errors of the iterations that both have.

    Raises:
        DataError: there is none.
    """
    iterations = sorted(reference.keys() & other.keys())
    if not iterations:
        raise DataError(
            f"the runs have no iteration in common: the first reports {_span(reference)}, "
            f"the second {_span(other)}; log both with the same --log-interval"
        )
    errors = [relative_error(reference[i], other[i]) for i in iterations]
    return Comparison(iterations, errors, bound)


def _span(losses: dict[int, float]) -> str:
    return f"{len(losses)} iterations from {min(losses)} to {max(losses)}"


def relative_error(reference: float, other: float) -> float:
    """|a - b| / |a|; two losses that are both not finite, and of the same kind, agree."""
    if not (math.isfinite(reference) and math.isfinite(other)):
        same = reference == other or (math.isnan(reference) and math.isnan(other))
        return 0.0 if same else math.inf
    if reference == other:
        return 0.0
    return abs(reference - other) / abs(reference) if reference else math.inf


def report(comparison: Comparison, only_a: int, only_b: int) -> str:
    """The figures, one a line."""
    error, iteration = comparison.largest
    first = comparison.first_beyond
    lines = [
        f"iterations compared: {len(comparison.iterations)} ({comparison.iterations[0]} to "
        f"{comparison.iterations[-1]}), in one run only: {only_a} and {only_b}",
        f"mean relative error: {comparison.mean:.3e}",
        f"largest relative error: {error:.3e} at iteration {iteration}",
        f"first iteration beyond {comparison.bound:g}: {'none' if first is None else first}",
    ]
    return "\n".join(lines)


def draw(path: Path, runs: dict[str, dict[int, float]], comparison: Comparison) -> None:
    """Both losses above, their relative error below.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--output needs matplotlib: pip install matplotlib, or leave --output out"
        ) from None
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, errors = figure.subplots(2, 1, sharex=True)
    for (label, run), style in zip(runs.items(), ("-", "--"), strict=True):
        points = sorted(run.items())
        losses.plot([i for i, _ in points], [loss for _, loss in points], style, label=label, linewidth=1)
    losses.set_ylabel("loss")
    losses.legend()
    shown = [error if math.isfinite(error) else float("nan") for error in comparison.errors]
    errors.plot(comparison.iterations, shown, linewidth=1)
    errors.axhline(comparison.bound, color="tab:red", linestyle=":", label=f"bound {comparison.bound:g}")
    errors.set_yscale("symlog", linthresh=1e-6)
    errors.set_xlabel("iteration")
    errors.set_ylabel("relative error")
    errors.legend()
    figure.savefig(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_a", type=Path, metavar="RUN_A", help="log file or TensorBoard directory; the reference"
    )
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="the run to judge")
    parser.add_argument(
        "--bound", type=float, default=0.01, help="largest relative error of an iteration (0.01)"
    )
    parser.add_argument(
        "--tag", default="lm loss", help="quantity as TensorBoard names it, such as 'lm loss validation'"
    )
    parser.add_argument(
        "--output", type=Path, help="draw losses and errors into this file (.png, .svg, .pdf)"
    )
    words: Any = parser.parse_args(argv)
    if not words.bound >= 0:
        parser.error(f"--bound {words.bound}: a number that is not negative, for example 0.01")
    if words.output is not None and words.output.suffix not in _SUFFIXES:
        parser.error(f"--output {words.output}: end the name in one of {', '.join(_SUFFIXES)}")
    return words


def main(argv: list[str] | None = None) -> int:
    """Prints the comparison; 0 if every error is within the bound, 1 if not, 2 if nothing can be compared."""
    words = parse(argv)
    try:
        first, second = (read_run(path, words.tag) for path in (words.run_a, words.run_b))
        comparison = compare(first, second, words.bound)
        print(report(comparison, len(first.keys() - second.keys()), len(second.keys() - first.keys())))
        if words.output is not None:
            runs = {f"A: {words.run_a}": first, f"B: {words.run_b}": second}
            draw(words.output, runs, comparison)
            print(f"plot: {words.output}")
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if comparison.first_beyond is None else 1
