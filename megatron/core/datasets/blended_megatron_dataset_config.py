"""Settings every data set has, and the reading of ``split``."""

import logging
import re
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.datasets.utils import Split, normalize
from megatron.core.errors import ConfigError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

Blend = tuple[list[str], list[float] | None]
_MOCK_SPLIT = "1,1,1"
_SPLIT_REMEDY = "Give up to three shares for train, valid and test, such as 969,30,1 or 90,10."


@dataclass
class BlendedMegatronDatasetConfig:
    """Common data set settings.

    Args:
        random_seed: seed of all shuffling.
        sequence_length: tokens per sample.
        blend: (prefixes, weights or None), divided by ``split``.
        blend_per_split: one such pair, or None, for each of train, valid and test; used whole.
        split: shares of train, valid and test; needed with ``blend`` and only there.
        num_dataset_builder_threads: members of a blend built at the same time.
        path_to_cache: directory of built indices; None for one beside each data set.
        mmap_bin_files: map .bin files into memory, else read request by request.
        tokenizer: identifies the data; also gives special ids.
        storage_domain: equal on ranks that see the same files; one rank of each domain writes caches.
        builds_index: whether this rank does; set by the builder, None without one.

    Without either blend, ``mock`` is set and the split becomes ``1,1,1``. ``split_matrix`` holds the
    interval of each split, or None where it is empty.
    """

    random_seed: int
    sequence_length: int
    blend: Blend | None = None
    blend_per_split: list[Blend | None] | None = None
    split: str | None = None
    split_matrix: list[tuple[float, float] | None] | None = field(init=False, default=None)
    num_dataset_builder_threads: int = 1
    path_to_cache: str | None = None
    mmap_bin_files: bool = True
    mock: bool = field(init=False, default=False)
    tokenizer: MegatronTokenizer | None = None
    storage_domain: int = field(default=0, repr=False, kw_only=True)
    builds_index: bool | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.blend is not None and self.blend_per_split is not None:
            raise ConfigError("both blend and blend_per_split are given: keep one of them.")
        if self.blend_per_split is not None and any(self.blend_per_split):
            self._check_per_split()
            return
        if self.blend is not None:
            _check_blend(self.blend)
        else:
            self.mock = True
            self.split = _MOCK_SPLIT
            log_single_rank(logger, logging.INFO, f"no data given: mock data, split {self.split}")
        if self.split is None:
            raise ConfigError("a blend needs a split. " + _SPLIT_REMEDY)
        self.split_matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(self.split))
        log_single_rank(logger, logging.DEBUG, f"split_matrix = {self.split_matrix}")

    def writes_index(self) -> bool:
        """Whether this rank builds indices and writes them to the cache; without a builder, rank 0 does."""
        if self.builds_index is not None:
            return self.builds_index
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        return alone or torch.distributed.get_rank() == 0

    def data_prefixes(self) -> list[str]:
        """Every data set named, each once."""
        blends = [self.blend] if self.blend is not None else self.blend_per_split or []
        return list(dict.fromkeys(prefix for blend in blends if blend for prefix in blend[0]))

    def _check_per_split(self) -> None:
        if self.split is not None:
            raise ConfigError(
                f"split {self.split} is given together with blend_per_split, whose data is used whole. "
                "Drop the split, or give one blend."
            )
        blends = self.blend_per_split or []
        if len(blends) != len(Split):
            raise ConfigError(f"blend_per_split needs {len(Split)} entries, it has {len(blends)}.")
        for blend in blends:
            if blend is not None:
                _check_blend(blend)


def _check_blend(blend: Blend) -> None:
    prefixes, weights = blend
    if not prefixes:
        raise ConfigError("a blend names no data set.")
    if weights is None:
        return
    if len(prefixes) != len(weights):
        raise ConfigError(f"{len(prefixes)} data sets but {len(weights)} weights: {prefixes}, {weights}.")
    for prefix, weight in zip(prefixes, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise ConfigError(f"the weight of {prefix} is {weight}; weights must be greater than 0.")


def parse_and_normalize_split(split: str) -> list[float]:
    """``"969, 30, 1"`` -> [0.969, 0.03, 0.001]; missing shares are 0. Anything may separate the numbers.

    Raises:
        ConfigError: no number, an unreadable or negative one, more than three, or sum 0.
    """
    words = re.findall(r"[.0-9]+", split)
    negative = re.search(r"(?:^|[^\w.])-\s*[.\d]", split)
    if re.search(r"[^\W\d_]", split) or not words:
        raise ConfigError(f"split {split!r} is not a list of numbers. {_SPLIT_REMEDY}")
    if negative:
        raise ConfigError(f"split {split!r} holds a negative share. {_SPLIT_REMEDY}")
    try:
        shares = [float(word) for word in words]
    except ValueError as error:
        raise ConfigError(f"split {split!r}: {error}. {_SPLIT_REMEDY}") from error
    if len(shares) > len(Split):
        raise ConfigError(f"split {split!r} has {len(shares)} shares. {_SPLIT_REMEDY}")
    if sum(shares) == 0:
        raise ConfigError(f"split {split!r}: all shares are 0. {_SPLIT_REMEDY}")
    return normalize(shares + [0.0] * (len(Split) - len(shares)))


def _intervals(shares: list[float]) -> list[tuple[float, float] | None]:
    """Neighbouring intervals of the given widths, None for an empty one."""
    bounds = [0, *accumulate(shares)]
    return [None if begin == end else (begin, end) for begin, end in pairwise(bounds)]


def convert_split_vector_to_split_matrix(
    vector_a: list[float], vector_b: list[float] | None = None
) -> list[tuple[float, float] | None]:
    """Shares -> interval of each split, None where it is empty.

    With two vectors, each split gets what its two intervals have in common.
    """
    matrix = _intervals(vector_a)
    if vector_b is None:
        return matrix
    return [_overlap(a, b) for a, b in zip(matrix, _intervals(vector_b), strict=True)]


def _overlap(a: tuple[float, float] | None, b: tuple[float, float] | None) -> tuple[float, float] | None:
    if a is None or b is None:
        return None
    begin, end = max(a[0], b[0]), min(a[1], b[1])
    return (begin, end) if begin < end else None
