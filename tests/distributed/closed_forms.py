"""What each way of splitting a model has to send in one step: calls and bytes, as closed forms.

Every function is one reason to send, as seen by one rank. ``activation`` is the bytes of one microbatch
between layers, [s, b, h], or of this rank's part of it where context parallelism splits the sequence.
All groups are global ranks; a group of one rank has nothing to send.
"""

from tests.distributed.traffic import Traffic, add, one, times

Ranks = tuple[int, ...]
NUMBER = 4  # bytes of a float32


def _many(operation: str, ranks: Ranks, count: int, size: int) -> Traffic:
    return times(one(operation, ranks, size), count) if len(ranks) > 1 else {}


def batch(tp: Ranks, tokens: int, first: bool, last: bool) -> Traffic:
    """One microbatch from the rank that reads: tokens and positions (int64) for the first stage, labels
    (int64) and loss mask (float32) for the last, in one message; nothing for stages between.
    """
    size = tokens * ((16 if first else 0) + (12 if last else 0))
    return _many("broadcast", tp, 1 if size else 0, size)


def tensor_parallel(
    tp: Ranks, layers: int, activation: int, first: bool, last: bool, chunks: int = 1
) -> Traffic:
    """One microbatch: each layer sums the outputs of its two row-parallel matmuls in forward, and the input
    gradients of its two column-parallel ones in backward; the embedding sums in forward, the output layer in
    backward (Shoeybi et al. 2019, section 3). Matmuls may be cut into chunks, each sent by itself.
    """
    return add(
        _many("all_reduce", tp, (4 * layers + last) * chunks, activation // chunks),
        _many("all_reduce", tp, int(first), activation),
    )


def sequence_parallel(
    tp: Ranks,
    layers: int,
    activation: int,
    first: bool,
    last: bool,
    learned_positions: bool,
    chunks: int = 1,
) -> Traffic:
    """One microbatch: every sum becomes a reduce-scatter, every copy an all-gather, of the same bytes; two
    column-parallel inputs per layer, and the output layer's, are gathered again in backward instead of being
    kept (Korthikanti et al. 2022, section 4.2.2). Learned positions are added to whole sequences: there the
    embedding sums, and cuts without a message. Matmuls may be cut into chunks, which are gathered before
    them or scattered after them one by one; what backward gathers for a weight comes whole.
    """
    return add(
        _many("reduce_scatter", tp, (4 * layers + last) * chunks, activation // chunks),
        _many("reduce_scatter", tp, int(first and not learned_positions), activation),
        _many("all_gather", tp, (4 * layers + last) * chunks, activation // chunks),
        _many("all_gather", tp, 2 * layers + last + first, activation),
        _many("all_reduce", tp, int(first and learned_positions), activation),
    )


def split_vocabulary_loss(tp: Ranks, tokens: int) -> Traffic:
    """One microbatch on the last stage: the largest logit of each token; then, together, its label's logit
    and its sum of exponentials.
    """
    if len(tp) == 1:
        return {}
    return one("all_reduce", tp, tokens * NUMBER, 2 * tokens * NUMBER)


def replicated_gradients(tp: Ranks, elements: int) -> Traffic:
    """One step under sequence parallelism: gradients of what every rank applied to its part of the sequence,
    in one message.
    """
    return _many("all_reduce", tp, 1 if elements else 0, elements * NUMBER)


def pipeline(
    before: int, after: int, stage: int, stages: int, chunks: int, microbatches: int, size: int
) -> Traffic:
    """One step of pipeline rank ``stage`` of ``stages`` with ``chunks`` virtual stages each: every virtual
    stage but the last sends each microbatch's output on, every one but the first its input gradient back;
    round the ring, from the last rank to the first and back, for virtual stages. All schedules send the
    same.
    """
    forward = chunks - (stage == stages - 1)
    backward = chunks - (stage == 0)
    return add(
        times(one("send", (after,), size), forward * microbatches),
        times(one("send", (before,), size), backward * microbatches),
    )


def tied_embedding(ranks: Ranks, elements: int) -> Traffic:
    """One step: the sum of both copies' gradients, on the first and the last stage."""
    return _many("all_reduce", ranks, 1, elements * NUMBER)


def ring_attention(next_rank: int, size: int, cp: int) -> Traffic:
    """One layer, one microbatch: keys and values of this rank's part (``size`` bytes) go round the ring once
    in forward; in backward they do again, and their gradients with them.
    """
    return times(one("send", (next_rank,), size), 3 * (cp - 1))


def gathered_attention(cp: Ranks, whole: int) -> Traffic:
    """One layer, one microbatch: whole keys and values (``whole`` bytes) gathered in forward and again in
    backward; their gradients reduced and scattered.
    """
    return add(_many("all_gather", cp, 2, whole), _many("reduce_scatter", cp, 1, whole))


def head_exchange(cp: Ranks, queries: int, keys_and_values: int) -> Traffic:
    """One layer, one microbatch, all-to-all: queries, keys and values as one message, then the result; the
    same back in backward (Jacobs et al. 2023, section 3.1). Bytes are those of this rank's part.
    """
    both = add(
        _many("all_to_all", cp, 1, queries + keys_and_values),
        _many("all_to_all", cp, 1, queries),
    )
    return times(both, 2)


def exchanged_experts(
    sharing: Ranks, spread: Ranks, parts: Ranks, rows: int, hidden: int, experts: int
) -> Traffic:
    """One layer, one microbatch, all-to-all, with as many rows for every rank: all ranks that share the
    experts tell each other the rows of each expert (int64); rows and weights go to the ranks with other
    experts, and results come back; in backward the same the other way round. Ranks with parts of the same
    experts gather rows and weights, and reduce and scatter results; in backward the other operation each.
    """
    row, weight = rows * hidden * NUMBER, rows * NUMBER
    whole_row, whole_weight = row * len(parts), weight * len(parts)
    return add(
        _many("all_gather", sharing, 1, len(sharing) * experts * 8),
        _many("all_to_all", spread, 4, row),
        _many("all_to_all", spread, 2, weight),
        *(
            add(_many(operation, parts, 2, whole_row), _many(operation, parts, 1, whole_weight))
            for operation in ("all_gather", "reduce_scatter")
        ),
    )


def gathered_experts(sharing: Ranks, tokens: int, hidden: int, experts: int) -> Traffic:
    """One layer, one microbatch: tokens, weights and the choice (a byte each) of all ranks gathered, results
    reduced and scattered; in backward the other operation each, but for the choice.
    """
    whole, weights = (len(sharing) * tokens * width * NUMBER for width in (hidden, experts))
    return add(
        _many("all_gather", sharing, 2, whole),
        _many("reduce_scatter", sharing, 2, whole),
        *(_many(operation, sharing, 1, weights) for operation in ("all_gather", "reduce_scatter")),
        _many("all_gather", sharing, 1, weights // NUMBER),
    )


def experts_norm(dense: Ranks, of_experts: Ranks, sharded: bool) -> Traffic:
    """One step: the experts' part of the gradient norm, where other ranks hold different experts than hold
    different dense layers; a sharded optimizer adds both up at once.
    """
    return {} if sharded or dense == of_experts else _many("all_reduce", of_experts, 1, NUMBER)


def reported_loss(cp: Ranks, dp: Ranks) -> Traffic:
    """One microbatch on the last stage: (sum, count) over the parts of a sequence, then over replicas."""
    return add(_many("all_reduce", cp, 1, 2 * NUMBER), _many("all_reduce", dp, 1, 2 * NUMBER))


def reduced_gradients(replicas: Ranks, sizes: list[int]) -> Traffic:
    """One step: an all-reduce of every bucket (elements)."""
    return add(*(_many("all_reduce", replicas, 1, size * NUMBER) for size in sizes))


def sharded_optimizer(replicas: Ranks, sizes: list[int]) -> Traffic:
    """One step: gradients of every bucket (elements, padding included) reduced and scattered, parameters
    gathered (Rajbhandari et al. 2020, section 7.2.1): as many bytes as an all-reduce.
    """
    return add(
        *(_many("reduce_scatter", replicas, 1, size * NUMBER) for size in sizes),
        *(_many("all_gather", replicas, 1, size * NUMBER) for size in sizes),
    )


def end_of_step(model_parallel: Ranks, everybody: Ranks, sharded: bool) -> Traffic:
    """One step: the square of the gradient norm over the ranks that hold different gradients, which with a
    sharded optimizer are all; the success of the step and the norm over the ranks of one replica.
    """
    return add(
        _many("all_reduce", everybody if sharded else model_parallel, 1, NUMBER),
        _many("all_reduce", model_parallel, 2, NUMBER),
    )


def bucket_sizes(
    parameters: list[int], bucket_size: int | None, shards: int, alone: tuple[int, ...] = ()
) -> list[int]:
    """Elements of each bucket of a buffer, padding included.

    Args:
        parameters: elements of each, in the order of registration; the buffer is filled from the last.
        bucket_size: a bucket that has so many is full; None for one bucket.
        shards: ranks of a sharded optimizer, whose parameters start at multiples of 64 and whose buckets end
            at multiples of 128 and of the shards; 1 without it.
        alone: positions of parameters that get a bucket of their own (tied embeddings, if sharded).
    """
    start, end, buckets = 64 if shards > 1 else 1, 128 if shards > 1 else 1, []
    assert end % shards == 0
    filled = 0

    def close() -> None:
        nonlocal filled
        if filled:
            buckets.append(-(-filled // end) * end)
        filled = 0

    for position, size in reversed(list(enumerate(parameters))):
        if position in alone:
            close()
        filled = -(-filled // start) * start + size
        if position in alone or (bucket_size is not None and filled >= bucket_size):
            close()
    close()
    return buckets


def gpt_parameters(
    layers: int, hidden: int, vocabulary: int, positions: int, tp: int, first: bool, last: bool
) -> list[int]:
    """Elements of the parameters of a stage of a tied GPT with biases, in the order of registration."""
    h = hidden
    layer = [h, h, h * h // tp, h, 3 * h * h // tp, 3 * h // tp]
    layer += [h, h, 4 * h * h // tp, 4 * h // tp, 4 * h * h // tp, h]
    found = [vocabulary * h // tp, positions * h] if first else []
    found += layer * layers
    if last:
        found += [h, h] if first else [h, h, vocabulary * h // tp]
    return found


def moe_parameters(
    dense: int, mixed: int, hidden: int, keys: int, vocabulary: int, tp: int, first: bool, last: bool
) -> list[int]:
    """Elements of the parameters, but for routed experts, of a stage of an untied model with RMS norms, gated
    MLPs and no biases: ``dense`` layers of width 96, then ``mixed`` ones with 4 experts and, of width 32, a
    gated shared one. ``keys`` is the width of keys.
    """
    h = hidden
    attention = [h, h * h // tp, (h + 2 * keys) * h // tp, h]
    layers = [[*attention, 2 * 96 * h // tp, 96 * h // tp]] * dense
    layers += [[*attention, 4 * h, 2 * 32 * h // tp, 32 * h // tp, h]] * mixed
    ends = ([vocabulary * h // tp] if first else []), ([h, vocabulary * h // tp] if last else [])
    return [*ends[0], *(size for layer in layers for size in layer), *ends[1]]
