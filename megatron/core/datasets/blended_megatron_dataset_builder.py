"""From settings to the train, valid and test data sets, on the ranks that need them."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Union, cast

import numpy as np
import torch

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import Blend, BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import LowLevelDataset, MegatronDataset
from megatron.core.datasets.storage_domains import check_equal_copies, elect_builders
from megatron.core.datasets.utils import Split, normalize
from megatron.core.errors import ConfigError, DataError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

MidLevelDataset = MegatronDataset
TopLevelDataset = Union[BlendedDataset, MidLevelDataset]  # noqa: UP007
DistributedDataset = Union[TopLevelDataset, MidLevelDataset, LowLevelDataset, torch.utils.data.Dataset]  # noqa: UP007

_SplitMatrix = list[tuple[float, float] | None]
_Sizes = list[int | None]

# A member of a blend is built with this much more than its share, since shares are rounded.
_MEMBER_MARGIN_PERCENT = 0.5
_WHOLE = (0.0, 1.0)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class BlendedMegatronDatasetBuilder:
    """Builds the three splits of one data set, of a blend, or of a blend per split.

    With torch.distributed, one rank of every storage domain builds first and fills the cache; the other
    ranks on which the data is needed follow after a barrier and load it.

    Args:
        cls: class of the (member) data sets.
        sizes: samples wanted of train, valid and test; None for one pass over the data.
        is_built_on_rank: called without arguments: is the data needed on this rank?
        config: settings.
    """

    def __init__(
        self,
        cls: type[MidLevelDataset],
        sizes: list[int | None],
        is_built_on_rank: Callable[[], bool],
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        if len(sizes) != len(Split):
            raise ConfigError(f"sizes needs {len(Split)} entries (train, valid, test), it has {len(sizes)}.")
        self.cls = cls
        self.sizes = sizes
        self.is_built_on_rank = is_built_on_rank
        self.config = config
        data = "mock data" if config.mock else ", ".join(config.data_prefixes())
        log_single_rank(
            logger,
            logging.INFO,
            f"building {cls.__name__} splits of at least {', '.join(map(str, sizes))} samples "
            f"({'split ' + config.split if config.split else 'a blend for each split'}) from {data}",
        )

    def build(self) -> list[TopLevelDataset | None]:
        """Train, valid and test; None for an empty split and on ranks that need no data.

        All ranks call this together.

        Raises:
            DataError: a data set is missing, damaged, too small for what is asked of it, or different on
                hosts that share no storage.
        """
        election = elect_builders(self.config.storage_domain, self.is_built_on_rank())
        self.config.builds_index = election.builds
        check_equal_copies(self.config.data_prefixes(), election)
        datasets: list[TopLevelDataset | None]
        if self.config.blend is not None:
            datasets = self._build_blend(self.config.blend, self._matrix(), self.sizes)
        elif self.config.mock:
            datasets = [*self._build_one(None, self._matrix(), self.sizes, synchronize_ranks=True)]
        else:
            datasets = [self._build_own_split(split) for split in Split]
        for dataset in datasets:
            if isinstance(dataset, BlendedDataset) and _built_anew(dataset):
                dataset.check_member_sizes()
        return datasets

    def _matrix(self) -> _SplitMatrix:
        matrix = self.config.split_matrix
        assert matrix is not None, "set with the split, which one blend and mock data have"
        return matrix

    def _build_own_split(self, split: Split) -> TopLevelDataset | None:
        """One split from the data sets named for it alone, which are used whole."""
        blends = self.config.blend_per_split
        assert blends is not None, "there is neither one blend nor mock data"
        blend = blends[split.value]
        if blend is None:
            return None
        matrix: _SplitMatrix = [_WHOLE if other is split else None for other in Split]
        sizes = [self.sizes[split.value] if other is split else 0 for other in Split]
        prefixes, _ = blend
        if len(prefixes) == 1:  # a weight would change nothing
            blend = (prefixes, None)
        return self._build_blend(blend, matrix, sizes)[split.value]

    def _build_blend(self, blend: Blend, matrix: _SplitMatrix, sizes: _Sizes) -> list[TopLevelDataset | None]:
        prefixes, weights = blend
        if weights is None and len(prefixes) == 1:
            return [*self._build_one(prefixes[0], matrix, sizes, synchronize_ranks=True)]
        if weights is None:
            members = self._build_members(prefixes, matrix, [[None] * len(Split)] * len(prefixes))
            return [self._blend_by_length(_column(members, split), matrix, split, sizes) for split in Split]
        return self._blend_by_weight(prefixes, normalize(weights), matrix, sizes)

    def _blend_by_weight(
        self, prefixes: list[str], weights: list[float], matrix: _SplitMatrix, sizes: _Sizes
    ) -> list[TopLevelDataset | None]:
        for split, interval, size in zip(Split, matrix, sizes, strict=True):
            if interval is not None and size is None:
                raise ConfigError(f"weights are given, so the number of {split.name} samples is needed too.")
        planned = [[math.ceil((size or 0) * weight) for size in sizes] for weight in weights]
        margin = 1 + _MEMBER_MARGIN_PERCENT / 100
        built: list[_Sizes] = [[math.ceil(size * margin) for size in row] for row in planned]
        members = self._build_members(prefixes, matrix, built)
        blends: list[TopLevelDataset | None] = []
        for split in Split:
            datasets = _column(members, split)
            # A member without elements for this split is left out of it, and what it would have given.
            sizes_of_split = [row[split.value] for row in planned]
            size = sum(n for n, dataset in zip(sizes_of_split, datasets, strict=True) if dataset is not None)
            blends.append(self._blend(datasets, weights, size, matrix[split.value]))
        return blends

    def _blend_by_length(
        self, datasets: list[MidLevelDataset | None], matrix: _SplitMatrix, split: Split, sizes: _Sizes
    ) -> TopLevelDataset | None:
        """Members weighted by their number of samples, each sample used at most once."""
        lengths = [0 if dataset is None else len(dataset) for dataset in datasets]
        wanted = sizes[split.value]
        size = None if wanted is None else min(wanted, sum(lengths))
        return self._blend(datasets, lengths, size, matrix[split.value])

    def _blend(
        self,
        datasets: list[MidLevelDataset | None],
        weights: Sequence[int | float],
        size: int | None,
        interval: tuple[float, float] | None,
    ) -> TopLevelDataset | None:
        """None where all members are None: a split without elements, or a rank without data."""
        if interval is None:
            return None
        present = [(data, weight) for data, weight in zip(datasets, weights, strict=True) if data is not None]
        cls: Any = BlendedDataset if present else _nothing
        members, shares = [data for data, _ in present], [weight for _, weight in present]
        dataset = self.build_generic_dataset(
            cls, self.is_built_on_rank, True, members, shares, size, self.config
        )
        return cast("BlendedDataset | None", dataset)

    def _build_members(
        self, prefixes: list[str], matrix: _SplitMatrix, sizes: list[_Sizes]
    ) -> list[list[MidLevelDataset | None]]:
        """All splits of every member, several members at a time; [member][split]."""

        def build_all() -> list[list[MidLevelDataset | None]]:
            with ThreadPoolExecutor(max_workers=self._threads()) as pool:
                tasks = [
                    pool.submit(self._build_one, prefix, matrix, row, synchronize_ranks=False)
                    for prefix, row in zip(prefixes, sizes, strict=True)
                ]
                try:
                    return [task.result() for task in tasks]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

        if not _distributed():
            return build_all()
        members = build_all() if self.config.writes_index() else None
        torch.distributed.barrier()
        return build_all() if members is None else members

    def _threads(self) -> int:
        """A builder's neighbours wait for it, so it may use their cores too."""
        threads = self.config.num_dataset_builder_threads
        if threads > 1 and _distributed() and self.config.writes_index():
            from megatron.core import accelerator

            threads *= min(2, max(1, accelerator.device_count()))
        return threads

    def _build_one(
        self, prefix: str | None, matrix: _SplitMatrix, sizes: _Sizes, synchronize_ranks: bool
    ) -> list[MidLevelDataset | None]:
        """The splits of one data set."""
        if _distributed() and not self.is_built_on_rank():
            if synchronize_ranks:
                for interval in matrix:
                    if interval is not None:
                        torch.distributed.barrier()
            return [None] * len(Split)
        low_level = self.cls.build_low_level_dataset(prefix, self.config)
        elements = self.cls.numel_low_level_dataset(low_level)
        datasets: list[MidLevelDataset | None] = []
        for split, interval, size in zip(Split, matrix, sizes, strict=True):
            dataset = None
            if interval is not None:
                indices = self._elements_of(prefix, elements, split, interval, size)
                empty = len(indices) == 0
                cls: Any = _nothing if empty else self.cls
                dataset = self.build_generic_dataset(
                    cls,
                    self.is_built_on_rank,
                    synchronize_ranks,
                    low_level,
                    prefix,
                    indices,
                    size,
                    split,
                    self.config,
                )
            datasets.append(cast("MidLevelDataset | None", dataset))
        return datasets

    def _elements_of(
        self, prefix: str | None, elements: int, split: Split, interval: tuple[float, float], size: int | None
    ) -> np.ndarray:
        """int32 indices of a split; one for evaluation may be empty, which costs that evaluation alone."""
        begin, end = (round(bound * elements) for bound in interval)
        if begin >= end and size != 0:
            if elements == 0:
                raise DataError(
                    f"{prefix} is empty: it holds no sequence. Check the input of tools/preprocess_data.py."
                )
            fact = (
                f"the {split.name} split of {prefix} is empty: split {self.config.split} gives it the "
                f"interval {interval[0]:g} to {interval[1]:g} of {elements} sequences, which rounds to none"
            )
            remedy = "give it a larger share, or use more data"
            if split is Split.train:
                raise DataError(f"{fact}; {remedy}")
            log_single_rank(logger, logging.WARNING, f"{fact}: it is left out; to have it, {remedy}")
        return np.arange(begin, end, dtype=np.int32)

    @staticmethod
    def build_generic_dataset(
        cls: type[DistributedDataset] | Callable[..., Any],  # noqa: PLW0211 -- a public name
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> DistributedDataset | Iterable | None:
        """``cls(*args)`` on builders first, then, after a barrier, on the other ranks that need it.

        The last of ``args`` is the config, which knows the builders; without one, rank 0 is the builder.

        Returns:
            None on ranks that do not need it.
        """
        if not _distributed():
            return cls(*args)
        config = args[-1] if args else None
        known = isinstance(config, BlendedMegatronDatasetConfig)
        builds = config.writes_index() if known else torch.distributed.get_rank() == 0
        dataset = cls(*args) if builds and is_built_on_rank() else None
        if synchronize_ranks:
            torch.distributed.barrier()
        if not builds and is_built_on_rank():
            dataset = cls(*args)
        return dataset


def _column(members: list[list[MidLevelDataset | None]], split: Split) -> list[MidLevelDataset | None]:
    return [row[split.value] for row in members]


def _nothing(*_: Any) -> None:
    """Stands for the data set of a split that has no elements."""


def _built_anew(blend: BlendedDataset) -> bool:
    return blend.built_anew_on_cache_miss or any(member.built_anew_on_cache_miss for member in blend.datasets)
