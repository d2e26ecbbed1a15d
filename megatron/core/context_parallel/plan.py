"""Which blocks of the score matrix a rank computes, and how far keys must travel for it.

Pure functions of sizes: every rank can work out what any other does.
"""

import functools
from typing import NamedTuple

from megatron.core.context_parallel.zigzag import chunks_of_rank
from megatron.core.fusions.attention_masks import Band


class Segment(NamedTuple):
    """Neighbouring positions: where they lie in a tensor, and in the sequence."""

    start: int
    position: int
    length: int


class Task(NamedTuple):
    """One block: slices of the local queries and of the keys at hand, and what is visible between them.

    ``query_position`` and ``key_position`` are the places of the first of each in the sequence.
    """

    queries: slice
    keys: slice
    band: Band
    query_position: int
    key_position: int


Segments = tuple[Segment, ...]


def local_segments(rank: int, size: int, local_length: int) -> Segments:
    """The two chunks a rank holds, in ``local_length`` rows."""
    half = local_length // 2
    first, second = chunks_of_rank(rank, size)
    return Segment(0, first * half, half), Segment(half, second * half, half)


def all_segments(size: int, local_length: int) -> Segments:
    """All chunks of a sequence that lies whole and in order."""
    half = local_length // 2
    return tuple(Segment(number * half, number * half, half) for number in range(2 * size))


def visible_band(causal: bool, window: tuple[int, int] | None) -> Band:
    """The whole score matrix's band from causality and a (left, right) window with -1 for no limit."""
    left, right = (None if side < 0 else side for side in window or (-1, -1))
    return Band(left, 0 if causal else right)


@functools.lru_cache(maxsize=4096)
def plan_blocks(queries: Segments, keys: Segments, band: Band, joined: bool = True) -> tuple[Task, ...]:
    """Blocks that cover everything visible, in a fixed order.

    Args:
        queries, keys: what lies in the two tensors.
        band: what is visible in the whole score matrix.
        joined: join blocks where this makes fewer and larger ones; off where positions of the keys of a
            block must follow each other, because a mask is cut the same way.
    """
    if joined and queries == keys and _is_one_triangle(queries, band):
        whole = slice(0, queries[-1].start + queries[-1].length)
        return (Task(whole, whole, band, queries[0].position, keys[0].position),)
    rows = [_row(query, keys, band, joined) for query in queries]
    tasks: list[Task] = []
    for number, row in enumerate(rows):
        above = rows[number - 1] if number else []
        if joined and _can_grow(queries[number - 1], queries[number], above, row):
            grown = slice(tasks[-1].queries.start, row[0].queries.stop)
            tasks[-1] = tasks[-1]._replace(queries=grown)
        else:
            tasks.extend(row)
    return tuple(tasks)


def _is_one_triangle(segments: Segments, band: Band) -> bool:
    """Rows in ascending order of positions: a triangle in positions is one in rows."""
    span = segments[-1].position + segments[-1].length - segments[0].position
    return band.right == 0 and (band.left is None or band.left >= span - 1)


def _row(query: Segment, keys: Segments, band: Band, joined: bool) -> list[Task]:
    """The blocks of one query segment."""
    row: list[Task] = []
    rows = slice(query.start, query.start + query.length)
    for key in keys:
        local = band.moved(query.position, key.position)
        if local.masks_all(query.length, key.length):
            continue
        local = local.trimmed(query.length, key.length)
        columns = slice(key.start, key.start + key.length)
        if joined and row and row[-1].band == local == Band() and row[-1].keys.stop == key.start:
            row[-1] = row[-1]._replace(keys=slice(row[-1].keys.start, columns.stop))
        else:
            row.append(Task(rows, columns, local, query.position, key.position))
    return row


def _can_grow(upper: Segment, lower: Segment, above: list[Task], row: list[Task]) -> bool:
    """True if two neighbouring rows are both one fully visible block over the same keys."""
    if len(above) != 1 or len(row) != 1 or upper.start + upper.length != lower.start:
        return False
    return above[0].band == row[0].band == Band() and above[0].keys == row[0].keys


@functools.lru_cache(maxsize=256)
def ring_hops(size: int, local_length: int, band: Band) -> tuple[int, int]:
    """How many ranks a rank's keys travel upwards, and how many downwards, to reach all who see them.

    (size - 1, 0) unless a window leaves ranks in the middle that see nothing of each other.
    """
    parts = [local_segments(rank, size, local_length) for rank in range(size)]
    needed = {
        distance
        for distance in range(1, size)
        for rank in range(size)
        if plan_blocks(parts[rank], parts[(rank - distance) % size], band)
    }

    def downwards(up: int) -> int:
        return max((size - distance for distance in needed if distance > up), default=0)

    # Of equal sums the one that goes one way only.
    up = min(range(size), key=lambda up: (up + downwards(up), -up))
    return up, downwards(up)
