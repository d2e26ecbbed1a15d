"""Draw the timeline of a pipeline schedule and print how long its ranks stand idle.

For example: -p 4 -m 8 --schedule interleaved -v 2 --output timeline.svg
"""

import argparse
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.actions import PassKind
from megatron.core.pipeline_parallel.checker import check_schedules
from megatron.core.pipeline_parallel.planning import SCHEDULES, make_schedules
from megatron.core.pipeline_parallel.timeline import Durations, Timeline, make_timeline

SUFFIXES = (".svg", ".png")
COLOURS = {
    PassKind.FORWARD: ("forward", "#8ecae6"),
    PassKind.BACKWARD: ("backward", "#ffb703"),
    PassKind.INPUT_GRADIENT: ("backward, input gradient", "#fb8500"),
    PassKind.WEIGHT_GRADIENT: ("backward, weight gradient", "#90be6d"),
}
# Most boxes that still carry the number of their micro-batch.
MOST_LABELS = 2000


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-p", "--pipeline-model-parallel-size", type=int, required=True, help="pipeline ranks")
    add("-m", "--num-microbatches", type=int, required=True, help="micro-batches per step")
    add("-v", "--num-virtual-stages-per-pipeline-rank", type=int, default=1, help="model chunks per rank")
    add("--schedule", choices=SCHEDULES, help="default: interleaved with virtual stages, 1f1b without")
    add("--microbatch-group-size-per-virtual-pipeline-stage", type=int, help="default: the pipeline ranks")
    add("--forward-only", action="store_true", help="an evaluation step")
    add("--forward-time", type=float, default=1.0, help="of one micro-batch on one rank, in any unit")
    add("--backward-time", type=float, default=2.0, help="likewise, weight gradients included")
    add("--weight-time", type=float, default=1.0, help="the part of it that zb-h1 puts off")
    add("--output", help="file to draw, .svg or .png; without it only the figures are printed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the figures of a schedule, and draw it if asked.

    Raises:
        ConfigError: numbers no schedule exists for, or a file that cannot be written.
    """
    args = parse(argv)
    p, m, v = (
        args.pipeline_model_parallel_size,
        args.num_microbatches,
        args.num_virtual_stages_per_pipeline_rank,
    )
    if args.output and not args.output.endswith(SUFFIXES):
        raise ConfigError(f"--output {args.output}: end the name in {' or '.join(SUFFIXES)}")
    times = args.forward_time, args.backward_time, args.weight_time
    if not (args.forward_time > 0 and 0 <= args.weight_time <= args.backward_time > 0):
        raise ConfigError(f"times {times}: forward and backward must be positive, weight a part of backward")
    name = args.schedule or ("interleaved" if v > 1 else "1f1b")
    group = args.microbatch_group_size_per_virtual_pipeline_stage if name == "interleaved" else None
    schedules = make_schedules(name, p, m, v, group, args.forward_only)
    report = check_schedules(schedules, m, v)
    durations = Durations(times[0], times[1] - times[2], times[2])
    timeline = make_timeline(schedules, v, durations)
    title = f"{name}, {p} stages" + (f" x {v} chunks" if v > 1 else "") + f", {m} micro-batches"
    print(title)
    print(f"bubble fraction (idle / computing time): {timeline.bubble_fraction:.4f}")
    if not args.forward_only:
        print(f"published formula:                       {formula(name, p, m, v, durations):.4f}")
    print(f"idle share of the step:                  {timeline.idle_share:.4f}")
    print(f"time of the step:                        {timeline.makespan:g}")
    print(f"transfers between ranks:                 {report.num_messages}")
    print(f"most chunks' activations held, by rank:  {report.peak_activations}")
    if args.output:
        draw(timeline, v, title, args.output)
        print(f"drawn to {args.output}")


def formula(name: str, p: int, m: int, v: int, times: Durations) -> float:
    """The bubble fraction of the papers, for at least as many micro-batches as stages (see ``timeline``)."""
    if name != "zb-h1":
        return (p - 1) / (v * m)
    forward, inputs, weights = times.forward, times.input_gradient, times.weight_gradient
    return (p - 1) * (forward + inputs - weights) / (m * (forward + inputs + weights))


def draw(timeline: Timeline, num_chunks: int, title: str, path: str) -> None:
    """One row of boxes per rank, numbered by micro-batch; later chunks are darker."""
    figure_class, patches = _matplotlib()
    width = min(4 + 0.3 * sum(len(spans) for spans in timeline.ranks) / len(timeline.ranks), 60)
    figure = figure_class(figsize=(width, 1.2 + 0.45 * len(timeline.ranks)), layout="constrained")
    axes = figure.add_subplot()
    labelled = sum(len(spans) for spans in timeline.ranks) <= MOST_LABELS
    for rank, spans in enumerate(timeline.ranks):
        for span in spans:
            alpha = 0.45 + 0.55 * (span.compute.chunk + 1) / num_chunks if num_chunks > 1 else 1.0
            axes.broken_barh(
                [(span.start, span.end - span.start)],
                (rank - 0.45, 0.9),
                facecolor=COLOURS[span.compute.kind][1],
                alpha=min(alpha, 1.0),
                edgecolor="white",
                linewidth=0.5,
            )
            if labelled:
                middle = (span.start + span.end) / 2
                axes.text(middle, rank, str(span.compute.microbatch), ha="center", va="center", fontsize=7)
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(len(timeline.ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(timeline.ranks)))
    axes.set(xlabel="time", ylabel="pipeline rank")
    axes.set_title(f"{title}: bubble fraction {timeline.bubble_fraction:.3f}")
    used = {span.compute.kind for spans in timeline.ranks for span in spans}
    legend = [words for kind, words in COLOURS.items() if kind in used]
    handles = [patches.Patch(color=colour, label=label) for label, colour in legend]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error


def _matplotlib() -> tuple[Any, Any]:
    """What draws, without a display."""
    try:
        from matplotlib import patches
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--output needs matplotlib: pip install matplotlib, or leave --output out"
        ) from error
    return Figure, patches
