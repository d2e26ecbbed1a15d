"""Bytes that one attention sends between context-parallel ranks: closed forms."""

from dataclasses import dataclass

from megatron.core.context_parallel.attention import A2A, A2A_P2P, ALL_GATHER
from megatron.core.context_parallel.plan import ring_hops
from megatron.core.fusions.attention_masks import Band


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one layer and micro-batch."""

    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class SplitSizes:
    """Sizes on one rank.

    Attributes:
        tokens: s/CP * b.
        heads: query heads (of this tensor-parallel rank).
        groups: query groups.
        width: of a query/key head.
        value_width: of a value head.
        element_bytes: of the operands' type.
    """

    tokens: int
    heads: int
    groups: int
    width: int
    value_width: int
    element_bytes: int

    def query_bytes(self) -> int:
        """Queries of this rank."""
        return self.tokens * self.heads * self.width * self.element_bytes

    def output_bytes(self) -> int:
        """Results of this rank."""
        return self.tokens * self.heads * self.value_width * self.element_bytes

    def key_value_bytes(self, groups: int | None = None) -> int:
        """Keys and values of this rank, unexpanded unless ``groups`` says otherwise."""
        count = self.groups if groups is None else groups
        return self.tokens * count * (self.width + self.value_width) * self.element_bytes


def attention_traffic(
    kind: str, sizes: SplitSizes, ranks: int, *, local_length: int, band: Band, inner: int = 1
) -> Traffic:
    """What one rank sends, without attention masks.

    With KV the bytes of keys and values of a rank, H the hops they travel (``ranks - 1``, fewer with a
    window) and S the bytes of queries, keys, values and results, keys copied where there are fewer groups
    than ranks:

    * p2p: H*KV forward, 2*H*KV backward (keys again, and their gradients);
    * all_gather: (ranks - 1)*KV forward, twice that backward (gather, reduce-scatter);
    * a2a: S*(ranks - 1)/ranks either way;
    * a2a+p2p: a2a inside, and p2p between with the keys of its inner heads.

    Args:
        kind: exchange.
        sizes: of one rank.
        ranks: context-parallel size.
        local_length: s/CP.
        band: visible part of the score matrix.
        inner: size of an inner group, for ``a2a+p2p``.
    """
    if kind == A2A:
        return _heads_traffic(sizes, ranks)
    if kind == A2A_P2P:
        outside = _ring_traffic(
            sizes.key_value_bytes(max(sizes.groups, inner)), ranks // inner, local_length * inner, band
        )
        inside = _heads_traffic(sizes, inner)
        return Traffic(
            inside.forward_bytes + outside.forward_bytes, inside.backward_bytes + outside.backward_bytes
        )
    if kind == ALL_GATHER:
        once = (ranks - 1) * sizes.key_value_bytes()
        return Traffic(once, 2 * once)
    return _ring_traffic(sizes.key_value_bytes(), ranks, local_length, band)


def _heads_traffic(sizes: SplitSizes, ranks: int) -> Traffic:
    groups = max(sizes.groups, ranks)
    exchanged = sizes.query_bytes() + sizes.key_value_bytes(groups) + sizes.output_bytes()
    once = exchanged * (ranks - 1) // ranks
    return Traffic(once, once)


def _ring_traffic(key_value_bytes: int, ranks: int, local_length: int, band: Band) -> Traffic:
    once = sum(ring_hops(ranks, local_length, band)) * key_value_bytes
    return Traffic(once, 2 * once)
