"""Draws the pictures of these pages from the code: ``python docs/draw.py`` writes ``docs/drawings/*.svg``.

Ranks come from the rank grid, times from the schedules that training runs, places of parameters from the
layout of a real model's gradient buffer. A test compares the files with what this script makes.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.cli.draw_schedule import COLOURS
from megatron.core.distributed.buffer_layout import BufferLayout, lay_out, sharded_alignment
from megatron.core.pipeline_parallel.planning import make_schedules
from megatron.core.pipeline_parallel.timeline import Durations, Timeline, make_timeline
from megatron.core.rank_grid import make_grids

INK, GREY = "#333333", "#d9d9d9"
AXIS_COLOURS = {"tp": "#fb8500", "cp": "#219ebc", "dp": "#588157", "pp": "#b5179e"}
STAGE_COLOURS = ("#e8f1f8", "#fdf3dc")


@dataclass
class Picture:
    """An SVG that grows; lengths in pixels, the origin at the top left."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, fill: str, **more: object) -> None:
        """A rectangle; ``more`` are further attributes, with ``_`` for ``-``."""
        attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{attributes}/>'
        )

    def text(
        self, x: float, y: float, words: str, size: int = 12, anchor: str = "middle", fill: str = INK
    ) -> None:
        """Words whose baseline is at ``y``."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">'
            f"{escape(words)}</text>"
        )

    def write(self, path: Path) -> None:
        """The file, on a white ground, so that it can be read on a dark page too."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" font-family="sans-serif">'
        )
        ground = f'<rect width="{self.width:g}" height="{self.height:g}" fill="white"/>'
        path.write_text("\n".join([head, ground, *self.parts, "</svg>"]) + "\n", encoding="utf-8")


def legend(picture: Picture, x: float, y: float, entries: Iterable[tuple[str, str]]) -> None:
    """Coloured squares in one line, each with its words."""
    for words, colour in entries:
        picture.box(x, y - 11, 13, 13, colour)
        picture.text(x + 19, y, words, anchor="start")
        x += 37 + 6.4 * len(words)


def rank_grid(path: Path) -> None:
    """Sixteen ranks, two along each axis, and the groups of rank 0."""
    tp = cp = dp = pp = 2
    grid = make_grids(
        world_size=tp * cp * dp * pp, tp=tp, pp=pp, cp=cp, ep=1, expert_tp=1, order="tp-cp-ep-dp-pp"
    )["dense"]
    side, gap = 44, 6
    picture = Picture(700, 300)
    places: dict[int, tuple[float, float]] = {}
    for stage, ranks in enumerate(grid.get_ranks("tp-cp-dp")):
        top = 30 + stage * 120
        picture.box(10, top, 448, 100, STAGE_COLOURS[stage], rx=6)
        picture.text(20, top + 18, f"pipeline stage {stage}", anchor="start")
        for number, rank in enumerate(ranks):
            # Ranks are listed tp fastest, then cp, then dp: gaps grow with the axis.
            x = 24 + number * (side + gap) + number // tp * 6 + number // (tp * cp) * 12
            places[rank] = x, top + 36
    for rank, (x, y) in places.items():
        picture.box(x, y, side, side, "white", stroke=INK, rx=4)
        picture.text(x + side / 2, y + 28, str(rank), 15)
    picture.text(470, 48, "groups of rank 0", anchor="start")
    names = {"tp": "tensor", "cp": "context", "dp": "data", "pp": "pipeline"}
    for number, (axis, colour) in enumerate(AXIS_COLOURS.items()):
        group = grid.get_group(axis, 0)
        for rank in group:
            x, y = places[rank]
            picture.box(x + 4 + 10 * number, y + 4, 7, 7, colour)
        words = f"{names[axis]} ({axis}): {' '.join(map(str, group))}"
        picture.box(470, 62 + 24 * number, 12, 12, colour)
        picture.text(488, 73 + 24 * number, words, anchor="start")
    both = " ".join(map(str, grid.get_group("dp-cp", 0)))
    picture.text(470, 180, "gradients are averaged over", anchor="start")
    picture.text(470, 198, f"data x context: {both}", anchor="start")
    picture.text(470, 222, "a model copy is held by", anchor="start")
    picture.text(
        470, 240, f"tensor x pipeline: {' '.join(map(str, grid.get_group('tp-pp', 0)))}", anchor="start"
    )
    picture.text(
        10,
        284,
        f"16 ranks = tensor {tp} x context {cp} x data {dp} x pipeline {pp}, order {grid.order}",
        anchor="start",
    )
    picture.write(path)


def timeline_of(name: str, stages: int, microbatches: int, chunks: int) -> Timeline:
    """What ``tools/draw_schedule.py`` draws, with passes of one unit each (backward is two of them)."""
    schedules = make_schedules(name, stages, microbatches, chunks, None, False)
    return make_timeline(schedules, chunks, Durations())


def schedule(path: Path, name: str, chunks: int = 1, stages: int = 4, microbatches: int = 8) -> None:
    """One row of boxes per pipeline rank, numbered by micro-batch; later chunks are darker."""
    timeline = timeline_of(name, stages, microbatches, chunks)
    unit, row, left, top = 21.0, 26, 62, 34
    picture = Picture(left + unit * 36, top + row * stages + 40)
    share = f"bubble fraction {timeline.bubble_fraction:.4f}"
    words = f"{name}, {stages} stages" + (f" x {chunks} chunks" if chunks > 1 else "")
    picture.text(10, 20, f"{words}, {microbatches} micro-batches: {share}", 13, "start")
    for rank, spans in enumerate(timeline.ranks):
        y = top + row * rank
        picture.text(10, y + 17, f"rank {rank}", anchor="start")
        picture.box(left, y, unit * timeline.makespan, row - 2, GREY, opacity=0.5)
        for span in spans:
            opacity = 0.45 + 0.55 * (span.compute.chunk + 1) / chunks if chunks > 1 else 1
            x, width = left + unit * span.start, unit * (span.end - span.start)
            colour = COLOURS[span.compute.kind][1]
            picture.box(x, y, width, row - 2, colour, opacity=f"{opacity:g}", stroke="white", stroke_width=1)
            picture.text(x + width / 2, y + 16, str(span.compute.microbatch), 9 if chunks > 1 else 11)
    used = {span.compute.kind for spans in timeline.ranks for span in spans}
    entries = [words for kind, words in COLOURS.items() if kind in used]
    legend(picture, left, top + row * stages + 24, [*entries, ("idle", GREY)])
    picture.write(path)


def parameters_of_a_model() -> list[tuple[str, int]]:
    """Names and elements of a one-layer GPT's parameters, in the order of the gradient buffer."""
    import torch

    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=64,
        max_sequence_length=32,
        share_embeddings_and_output_weights=True,
    )
    parameters = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    # Backward reaches the last layer first, so the buffer begins with it.
    return parameters[::-1]


def buckets(path: Path, ranks: int = 4, bucket_size: int = 1500) -> None:
    """The gradient buffer of a tiny model: parameters, buckets, and the shard of each rank."""
    parameters = parameters_of_a_model()
    sizes = [size for _, size in parameters]
    layout = lay_out(sizes, [False] * len(sizes), bucket_size, sharded_alignment(ranks))
    scale, left, top = 860 / layout.numel, 20, 70
    colours = ("#8ecae6", "#90be6d", "#ffb703", "#f4a3c0")
    picture = Picture(900, 236)
    picture.text(
        left,
        22,
        f"gradient buffer of a one-layer GPT: {layout.numel} elements, "
        f"{len(layout.buckets)} buckets, each closed at {bucket_size} elements",
        13,
        "start",
    )
    picture.text(
        left,
        42,
        "numbers count parameters in the order in which backward reaches them; grey is padding",
        12,
        "start",
    )
    picture.box(left, top, scale * layout.numel, 40, GREY)
    for number, (start, end, bucket) in enumerate(layout.params):
        picture.box(
            left + scale * start,
            top,
            scale * (end - start),
            40,
            colours[bucket % len(colours)],
            stroke="white",
            stroke_width=1,
        )
        if scale * (end - start) > 14:
            picture.text(left + scale * (start + end) / 2, top + 25, str(number), 11)
    draw_shards(picture, layout, ranks, scale, left, top)
    widest = sorted(range(len(sizes)), key=lambda number: -sizes[number])[:5]
    words = ", ".join(
        f"{number} {'.'.join(parameters[number][0].split('.')[-3:])}" for number in sorted(widest)
    )
    picture.text(left, top + 150, f"the largest: {words}", 11, "start")
    picture.write(path)


def draw_shards(
    picture: Picture, layout: BufferLayout, ranks: int, scale: float, left: float, top: float
) -> None:
    """Below the buffer: each bucket in equal parts, one for each data-parallel rank."""
    for number, bucket in enumerate(layout.buckets):
        x, width = left + scale * bucket.start, scale * (bucket.end - bucket.start)
        picture.box(x, top - 6, width, 52, "none", stroke=INK, stroke_width=1.5)
        picture.text(x + width / 2, top + 64, f"bucket {number}", 12)
        for rank in range(ranks):
            shade = "#f5f5f5" if rank % 2 else "#e9e9e9"
            picture.box(
                x + width / ranks * rank, top + 76, width / ranks, 28, shade, stroke=INK, stroke_width=0.5
            )
            picture.text(x + width / ranks * (rank + 0.5), top + 94, f"rank {rank}", 10)
    picture.text(
        left,
        top + 124,
        f"with the distributed optimizer, each of {ranks} data-parallel ranks updates its shard of a bucket",
        12,
        "start",
    )


def main(directory: Path) -> None:
    """Write every picture."""
    directory.mkdir(exist_ok=True)
    rank_grid(directory / "rank_grid.svg")
    schedule(directory / "1f1b.svg", "1f1b")
    schedule(directory / "interleaved.svg", "interleaved", chunks=2)
    schedule(directory / "zb_h1.svg", "zb-h1")
    buckets(directory / "buckets.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "drawings")
