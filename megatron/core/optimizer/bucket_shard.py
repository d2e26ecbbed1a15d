"""One rank's slice of one bucket: which parts of which parameters, and where their fp32 values live."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket, _ParamAndGradBuffer


@dataclass(frozen=True)
class Range:
    """Elements ``start`` to ``end``, the end excluded."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.end - self.start

    def normalize(self, start: int = 0) -> "Range":
        """A range of the same size that begins at ``start``."""
        return Range(start, start + self.size)

    def __len__(self) -> int:
        return self.size


class BucketShard:
    """A data-parallel rank's slice of a bucket.

    Args:
        buffer: the bucket's buffer.
        bucket: cut into ``ranks`` equal slices, padding included; this is number ``rank``.

    Attributes:
        model_data, grad_data: [numel / ranks] views of the bucket's parameters and gradients.
        main_data: the parameters in fp32: ``model_data`` itself if that is fp32, else a copy.
        ranges: where the parts of parameters lie that fall into the slice.
    """

    def __init__(self, buffer: "_ParamAndGradBuffer", bucket: "_ParamAndGradBucket", rank: int, ranks: int):
        self.bucket = bucket
        size = bucket.grad_data.numel() // ranks
        first = bucket.offset + rank * size
        self.model_data = bucket.param_data[rank * size : (rank + 1) * size]
        self.grad_data = bucket.grad_data[rank * size : (rank + 1) * size]
        self.main_data = self.model_data.float()  # no copy of fp32
        self.ranges: dict[torch.nn.Parameter, Range] = {}
        for param in bucket.params_list:
            start, end, _ = buffer.param_index_map[param]
            start, end = max(start - first, 0), min(end - first, size)
            if start < end:
                self.ranges[param] = Range(start, end)

    @property
    def is_copy(self) -> bool:
        """True where parameters are in half precision and ``main_data`` is a copy."""
        return self.main_data is not self.model_data

    def part(self, flat: Tensor, param: torch.nn.Parameter) -> Tensor:
        """The elements of ``param`` in a tensor of the slice's layout: a view."""
        where = self.ranges[param]
        return flat[where.start : where.end]
