"""In which order one pipeline rank computes: 1F1B, interleaved 1F1B and ZB-H1.

Orders say nothing of transfers; these follow from the orders of all ranks (see :mod:`planning`).

Sources: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", section 2.2 (1F1B and interleaving); Qi et al. 2023, "Zero Bubble Pipeline Parallelism",
section 2 (ZB-H1).
"""

from collections.abc import Callable

from megatron.core.pipeline_parallel.actions import Compute, PassKind


def schedule_table(num_microbatches: int, num_chunks: int, group_size: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of all forward passes of a rank, in order.

    Groups of ``group_size`` micro-batches (fewer in the last one) pass through one chunk after another.
    Backward passes take the same order with the chunks counted from the last.
    """
    return [
        (microbatch, chunk)
        for first in range(0, num_microbatches, group_size)
        for chunk in range(num_chunks)
        for microbatch in range(first, min(first + group_size, num_microbatches))
    ]


def num_warmup(
    num_stages: int,
    rank: int,
    num_microbatches: int,
    num_chunks: int | None,
    group_size: int,
    forward_only: bool = False,
) -> int:
    """Forward passes of a rank before its first pair of one forward and one backward pass.

    Without virtual stages (``num_chunks`` None) one per later stage. With them, two per later stage, which
    leaves every transfer the time of one computation, after all groups but the last chunk's.
    """
    total = num_microbatches * (num_chunks or 1)
    if forward_only:
        return total
    later_stages = num_stages - rank - 1
    if num_chunks is None:
        return min(later_stages, total)
    return min(2 * later_stages + (num_chunks - 1) * group_size, total)


def one_forward_one_backward(
    num_stages: int,
    rank: int,
    num_microbatches: int,
    num_chunks: int | None = None,
    group_size: int | None = None,
    forward_only: bool = False,
) -> list[Compute]:
    """1F1B, interleaved if ``num_chunks`` is not None: warm-up, pairs, then the backward passes left over.

    With ``forward_only`` the forward passes alone.
    """
    group_size = group_size or num_stages
    chunks = num_chunks or 1
    table = schedule_table(num_microbatches, chunks, group_size)
    forwards = [Compute(PassKind.FORWARD, microbatch, chunk) for microbatch, chunk in table]
    if forward_only:
        return forwards
    backwards = [Compute(PassKind.BACKWARD, microbatch, chunks - 1 - chunk) for microbatch, chunk in table]
    warmup = num_warmup(num_stages, rank, num_microbatches, num_chunks, group_size)
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += (forward, backward)
    return order + backwards[len(forwards) - warmup :]


def zero_bubble_h1(num_stages: int, rank: int, num_microbatches: int) -> list[Compute]:
    """ZB-H1: 1F1B whose weight gradients wait until they fill gaps.

    Rank ``r`` keeps ``r`` weight gradients back. In flight (forward done, weight gradient not) are then at
    most ``p`` micro-batches on every rank, as many as on the first rank of 1F1B.
    """
    forward = [Compute(PassKind.FORWARD, k, 0) for k in range(num_microbatches)]
    weight = [Compute(PassKind.WEIGHT_GRADIENT, k, 0) for k in range(num_microbatches)]
    warmup = min(num_stages - rank - 1, num_microbatches)
    order = forward[:warmup]
    for k in range(num_microbatches):
        order += forward[warmup + k : warmup + k + 1]
        order.append(Compute(PassKind.INPUT_GRADIENT, k, 0))
        if k >= rank:
            order.append(weight[k - rank])
    return order + weight[max(num_microbatches - rank, 0) :]


# Schedules with one model chunk per rank: name -> order of (number of stages, rank, number of micro-batches).
ONE_CHUNK_ORDERS: dict[str, Callable[[int, int, int], list[Compute]]] = {
    "1f1b": one_forward_one_backward,
    "zb-h1": zero_bubble_h1,
}
SCHEDULES = tuple(sorted([*ONE_CHUNK_ORDERS, "interleaved"]))
