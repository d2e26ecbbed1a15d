"""Where parameters lie in a flat buffer, and where it is cut into buckets.

The layout is also that of ``distrib_optim.pt``: it must stay as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Elements; whole cache lines and whole vectors for every parameter and every shard.
_PARAM_ALIGNMENT = 64
_SHARD_ALIGNMENT = 128
# Messages of this many elements reach the full bandwidth of a ring.
_HIGH_BANDWIDTH_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class Alignment:
    """Multiples of elements at which parameters start and buckets end."""

    param: int = 1
    bucket: int = 1


def sharded_alignment(ranks: int, for_high_bandwidth: bool = False) -> Alignment:
    """Alignment for buckets that ``ranks`` ranks share in equal slices."""
    bucket = math.lcm(ranks, _SHARD_ALIGNMENT)
    if for_high_bandwidth:
        bucket = math.lcm(bucket, _HIGH_BANDWIDTH_ALIGNMENT)
    return Alignment(_PARAM_ALIGNMENT, bucket)


@dataclass(frozen=True)
class BucketPlace:
    """Elements [start, end) of the buffer; ``numel_unpadded`` of them up to the end of the last parameter."""

    start: int
    end: int
    numel_unpadded: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class BufferLayout:
    """Places of all parameters, in the order they were given, and of all buckets."""

    params: tuple[tuple[int, int, int], ...]
    """(start, end, number of the bucket)"""
    buckets: tuple[BucketPlace, ...]

    @property
    def numel(self) -> int:
        """Elements of the buffer."""
        return self.buckets[-1].end

    @property
    def numel_unpadded(self) -> int:
        """Elements without the padding at the ends of buckets."""
        return sum(bucket.numel_unpadded for bucket in self.buckets)


def lay_out(
    sizes: Sequence[int],
    stands_alone: Sequence[bool],
    bucket_size: int | None,
    alignment: Alignment,
) -> BufferLayout:
    """Places parameters one behind the other.

    A bucket is closed once it holds ``bucket_size`` elements, padding inside it counted; never, with None.

    Args:
        sizes: elements of each parameter, in the order of the buffer; one or more.
        stands_alone: whether a parameter gets a bucket for itself.
    """
    params: list[tuple[int, int, int]] = []
    buckets: list[BucketPlace] = []
    opened = end = 0  # first element of the bucket being filled, and end of its last parameter
    members: list[int] = []

    def close() -> None:
        nonlocal opened, end, members
        padded = _round_up(end, alignment.bucket)
        buckets.append(BucketPlace(opened, padded, end - opened, tuple(members)))
        opened, end, members = padded, padded, []

    for index, (size, alone) in enumerate(zip(sizes, stands_alone, strict=True)):
        if alone and members:
            close()
        start = _round_up(end, alignment.param)
        end = start + size
        params.append((start, end, len(buckets)))
        members.append(index)
        if alone or (bucket_size is not None and end - opened >= bucket_size):
            close()
    if members:
        close()
    return BufferLayout(tuple(params), tuple(buckets))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
