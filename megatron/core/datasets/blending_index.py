"""Which member of a blend each sample comes from, and which of that member's samples it is.

The rule is a greedy one, in double precision: at step ``s`` take the member whose error
``weight[k] * max(s, 1) - taken[k]`` is largest, the first one on ties. Each choice depends on all
choices before it, yet the whole list can be computed in parallel:

* what follows step ``s`` depends on nothing but ``s`` and the counts taken so far;
* two runs that start from different counts soon agree, because the rule always pulls every member
  towards its share.

So the steps are cut into lanes. Every lane starts from a guess of its counts (each member's share,
rounded) and all lanes advance together, one NumPy operation for all of them. Afterwards each lane's
start is compared with the end of the lane before it. Where they differ the lane is replayed from the
true counts, only until it meets its first attempt. The result is the same, bit for bit, as stepping
through the samples one by one; that plain walk is also what is done when lanes do not come to agree.
"""

import numpy as np

# Below this many steps the plain walk is as fast as the lanes.
_WALK_LIMIT = 4096
# Batches of more lanes than this go through the members one by one.
_WIDE = 512
# Lanes advanced together: enough to hide the cost of a NumPy call, small enough for the cache.
_MAX_LANES = 4096
# With fewer lanes the plain walk is faster.
_MIN_LANES = 24
# A lane should be long enough that the least weighted member is drawn in it this many times.
_DRAWS_PER_LANE = 2
# Replays tried before the rest is walked.
_MAX_ROUNDS = 6


def greedy_choices(weights: np.ndarray, size: int, capacity: np.ndarray | None = None) -> np.ndarray:
    """Member chosen at each of ``size`` steps.

    Args:
        weights: float64 [members], sum 1.
        size: number of steps.
        capacity: int64 [members], how often each member may be chosen; None for no limit.

    Returns:
        int16 [size].
    """
    weights = np.ascontiguousarray(weights, dtype=np.float64)
    lane_length = _lane_length(weights, size)
    if size <= _WALK_LIMIT or lane_length * _MIN_LANES > size:
        choices = np.empty(size, dtype=np.int16)
        _walk(weights, capacity, np.zeros(len(weights), dtype=np.int64), 0, choices)
        return choices
    return _lanes(weights, size, capacity, lane_length)


def sample_numbers(choices: np.ndarray, members: int) -> np.ndarray:
    """For each entry, how many earlier entries hold the same member. int16 [n] -> int64 [n]."""
    order = np.argsort(choices, kind="stable")  # a radix sort for 16-bit integers
    counts = np.bincount(choices, minlength=members)
    numbers = np.empty(len(choices), dtype=np.int64)
    first = 0
    for count in counts:
        numbers[order[first : first + count]] = np.arange(count)
        first += count
    return numbers


def _lane_length(weights: np.ndarray, size: int) -> int:
    """Steps per lane."""
    positive = weights[weights > 0]
    for_merging = _DRAWS_PER_LANE / positive.min() if len(positive) else size
    for_balance = max(size / _MAX_LANES, np.sqrt(size) / 2, 64)
    return int(np.ceil(min(max(for_merging, for_balance), size)))


def _walk(
    weights: np.ndarray, capacity: np.ndarray | None, counts: np.ndarray, start: int, out: np.ndarray
) -> None:
    """Fill ``out`` with the choices of steps start ... start + len(out) - 1, one by one."""
    members = range(len(weights))
    weight, taken = weights.tolist(), counts.tolist()
    limit = [start + len(out) + 1] * len(weight) if capacity is None else capacity.tolist()
    choices = []
    for step in range(start, start + len(out)):
        scale = float(step or 1)
        best, largest = -1, float("-inf")
        for k in members:
            error = weight[k] * scale - taken[k]
            if error > largest and taken[k] < limit[k]:
                best, largest = k, error
        taken[best] += 1
        choices.append(best)
    out[:] = choices


def _guess_counts(weights: np.ndarray, steps: np.ndarray, capacity: np.ndarray | None) -> np.ndarray:
    """Plausible counts after the given numbers of steps: shares rounded by largest remainder.

    Args:
        weights: [members]
        steps: int64 [lanes]

    Returns:
        float64 [members, lanes], whole numbers; each column sums to its number of steps.
    """
    share = weights[:, None] * steps
    counts = np.floor(share)
    missing = steps - counts.sum(axis=0)
    rank = np.argsort(np.argsort(counts - share, axis=0, kind="stable"), axis=0, kind="stable")
    counts += rank < missing
    if capacity is not None:
        np.minimum(counts, capacity[:, None], out=counts)
    return counts


class _LaneBatch:
    """Lanes that advance together: their step numbers, counts and the error of each member."""

    def __init__(
        self, weights: np.ndarray, capacity: np.ndarray | None, starts: np.ndarray, counts: np.ndarray
    ):
        self.weights = weights
        self.capacity = None if capacity is None else capacity.astype(np.float64)
        self.steps = starts.astype(np.float64)  # [lanes]
        self.counts = counts  # [members, lanes]; float64, exact below 2**53

    def advance(self) -> np.ndarray:
        """Take one step in every lane; returns the members chosen, int16 [lanes]."""
        scale = np.maximum(self.steps, 1.0)
        lanes = len(scale)
        best = self._best_of_few(scale) if lanes > _WIDE else self._best_of_many(scale)
        self.counts[best, np.arange(lanes)] += 1.0
        self.steps += 1.0
        return best

    def _best_of_many(self, scale: np.ndarray) -> np.ndarray:
        """All members in one table: for narrow batches, where the cost is that of the calls."""
        error = self.weights[:, None] * scale
        error -= self.counts
        if self.capacity is not None:
            error[self.counts >= self.capacity[:, None]] = -np.inf
        return error.argmax(axis=0).astype(np.int16)

    def _best_of_few(self, scale: np.ndarray) -> np.ndarray:
        """One member after the other: for wide batches, where argmax over a short axis is slow."""
        best = np.zeros(len(scale), dtype=np.int16)
        largest = np.full(len(scale), -np.inf)
        for k, weight in enumerate(self.weights):
            error = weight * scale - self.counts[k]
            if self.capacity is not None:
                error[self.counts[k] >= self.capacity[k]] = -np.inf
            best[error > largest] = k
            np.maximum(largest, error, out=largest)
        return best

    def keep(self, kept: np.ndarray) -> None:
        """Drop the lanes where ``kept`` (bool [lanes]) is False."""
        self.steps, self.counts = self.steps[kept], self.counts[:, kept]


def _lanes(weights: np.ndarray, size: int, capacity: np.ndarray | None, lane_length: int) -> np.ndarray:
    """:func:`greedy_choices` in lanes of ``lane_length`` steps."""
    starts = np.arange(0, size, lane_length)
    begin = _guess_counts(weights, starts, capacity)
    choices = np.empty((lane_length, len(starts)), dtype=np.int16)  # [step in lane, lane]
    batch = _LaneBatch(weights, capacity, starts, begin.copy())
    for row in choices:
        row[:] = batch.advance()
    end = batch.counts

    for _ in range(_MAX_ROUNDS):
        wrong = 1 + np.flatnonzero((begin[:, 1:] != end[:, :-1]).any(axis=0))
        if len(wrong) == 0:
            break
        _replay(weights, capacity, starts, wrong, begin, end, choices)

    flat = np.ascontiguousarray(choices.T).reshape(-1)[:size]  # [lane_length, lanes] -> [size]
    wrong = 1 + np.flatnonzero((begin[:, 1:] != end[:, :-1]).any(axis=0))
    if len(wrong):
        first = wrong[0]
        _walk(
            weights, capacity, end[:, first - 1].astype(np.int64), int(starts[first]), flat[starts[first] :]
        )
    return flat


def _replay(
    weights: np.ndarray,
    capacity: np.ndarray | None,
    starts: np.ndarray,
    wrong: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    choices: np.ndarray,
) -> None:
    """Run the lanes ``wrong`` again from the end of their predecessors; updates the last three in place.

    ``gap`` holds how far the new counts are from those of the first attempt. When it reaches zero the
    two runs are the same from there on, so the lane is done and its end stays as it was.
    """
    truth = end[:, wrong - 1]
    gap = truth - begin[:, wrong]  # [members, lanes]
    begin[:, wrong] = truth
    lanes = wrong
    batch = _LaneBatch(weights, capacity, starts[lanes], truth.copy())
    for step, row in enumerate(choices):
        new, old = batch.advance(), row[lanes]
        differ = np.flatnonzero(new != old)
        gap[new[differ], differ] += 1.0
        gap[old[differ], differ] -= 1.0
        row[lanes] = new
        if step % 32 == 31:
            apart = np.asarray(gap.any(axis=0))
            if not apart.any():
                return
            if not apart.all():
                batch.keep(apart)
                lanes, gap = lanes[apart], gap[:, apart]
    end[:, lanes] += gap
