"""Set-up of the process groups of one rank in worlds of 8 to 16,384 ranks, under torch's fake backend.

    python benchmarks/process_groups.py [--largest 16384] [--repeats 3]

For every world and layout it prints the seconds that ``initialize_model_parallel`` takes, the groups it
creates, the places in them, and the seconds of listing all groups of the world with the public
``RankGenerator`` instead. The fake backend connects to nobody, so that what is left is the part that could
grow with the world. Torch keeps a table of the members of every group, so the seconds follow the places, of
which the data-parallel groups have the most.

Exit status 1 when the number of groups grows with the world.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.core import parallel_state
from megatron.core.parallel_state.groups import GROUP_AXES
from megatron.core.rank_grid import make_grids

LAYOUTS = {
    "dp": dict(tp=1, pp=1, cp=1, ep=1, expert_tp=1),
    "tp 8": dict(tp=8, pp=1, cp=1, ep=1, expert_tp=8),
    "tp 4 pp 2": dict(tp=4, pp=2, cp=1, ep=1, expert_tp=4),
    "tp 2 pp 2 cp 2": dict(tp=2, pp=2, cp=2, ep=1, expert_tp=2),
    "tp 8 pp 8 cp 2": dict(tp=8, pp=8, cp=2, ep=1, expert_tp=8),
    "tp 2 pp 4 ep 8": dict(tp=2, pp=4, cp=1, ep=8, expert_tp=1),
}
ORDER = "tp-cp-ep-dp-pp"


def measure(world: int, layout: dict[str, int]) -> tuple[float, int, int]:
    """Seconds of the set-up of a rank in the middle of the world, its groups and their places."""
    dist.init_process_group("fake", store=FakeStore(), rank=world // 2, world_size=world)
    try:
        started = time.perf_counter()
        parallel_state.initialize_model_parallel(
            layout["tp"],
            layout["pp"],
            context_parallel_size=layout["cp"],
            expert_model_parallel_size=layout["ep"],
            expert_tensor_parallel_size=layout["expert_tp"],
            order=ORDER,
            create_gloo_process_groups=False,
        )
        seconds = time.perf_counter() - started
        state = parallel_state.state.STATE
        sizes = {id(group): len(state.ranks[name]) for name, group in state.groups.items()}
        return seconds, len(sizes), sum(sizes.values())
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def seconds_of_listing(world: int, layout: dict[str, int]) -> float:
    """Seconds of listing the ranks of every group of the world."""
    grids = make_grids(world, order=ORDER, **layout)
    started = time.perf_counter()
    for grid, axes, _ in GROUP_AXES.values():
        grids[grid].get_ranks(axes)
    return time.perf_counter() - started


def fits(world: int, layout: dict[str, int]) -> bool:
    """Whether the world divides into models of this layout."""
    dense = layout["tp"] * layout["pp"] * layout["cp"]
    return world % dense == 0 and world % (layout["expert_tp"] * layout["ep"] * layout["pp"]) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--largest", type=int, default=16384, help="largest world, a power of 2")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many is printed")
    options = parser.parse_args()
    print(f"{'layout':>16} {'world':>6} {'seconds':>9} {'groups':>6} {'places':>7} {'listing all, s':>15}")
    grows = False
    for name, layout in LAYOUTS.items():
        world, counts = 8, set()
        while world <= options.largest:
            if fits(world, layout):
                runs = [measure(world, layout) for _ in range(options.repeats)]
                seconds, groups, places = min(runs)
                listing = seconds_of_listing(world, layout)
                counts.add(groups)
                line = f"{name:>16} {world:>6} {seconds:>9.4f} {groups:>6} {places:>7} {listing:>15.4f}"
                print(line, flush=True)
            world *= 2
        # Small worlds have fewer groups: those of one rank, or with equal members, are one.
        grows |= max(counts, default=0) > len(GROUP_AXES) + 2
    return int(grows)


if __name__ == "__main__":
    sys.exit(main())
