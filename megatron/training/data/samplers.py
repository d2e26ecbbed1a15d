"""Samplers: which samples each data-parallel rank reads, and in which order."""

import random
from collections.abc import Iterator, Sized
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from megatron.core.errors import ConfigError, DataError
from megatron.training.processes.workers import follow_only_the_rank, starting_workers

__all__ = [
    "MegatronPretrainingRandomSampler",
    "MegatronPretrainingSampler",
    "RandomSeedDataset",
    "build_pretraining_data_loader",
]


def build_pretraining_data_loader(dataset: Dataset | None, consumed_samples: int) -> Any:
    """Loader of this data-parallel rank's microbatches, starting after ``consumed_samples`` samples.

    Args:
        dataset: None or an empty one gives None; with ``--dataloader-type external`` it is handed back.
        consumed_samples: samples all ranks together have already read.

    Raises:
        ConfigError: an external data set of single samples.
        DataError: fewer samples left than one step needs. (The training loop iterates validation data
            for ever; a loader without a batch would hang it.)
    """
    from megatron.core import accelerator, parallel_state
    from megatron.training.global_vars import get_args

    if dataset is None:
        return None
    args = get_args()
    if args.dataloader_type == "external":
        return _external_loader(dataset)
    size = len(cast(Sized, dataset))
    if size == 0:  # only possible where no sample was asked for
        return None
    share = {
        "total_samples": size,
        "consumed_samples": consumed_samples,
        "micro_batch_size": args.micro_batch_size,
        "data_parallel_rank": parallel_state.get_data_parallel_rank(),
        # 0 without torch.distributed
        "data_parallel_size": max(1, parallel_state.get_data_parallel_world_size()),
    }
    if args.dataloader_type == "single":
        sampler = MegatronPretrainingSampler(**share)
        _check_step_left(sampler)
    elif args.dataloader_type == "cyclic":
        sampler = MegatronPretrainingRandomSampler(dataset, data_sharding=args.data_sharding, **share)
    else:
        raise ConfigError(f"--dataloader-type {args.dataloader_type}: type single, cyclic or external.")
    return _PretrainingLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=accelerator.is_accelerated(),
        persistent_workers=args.num_workers > 0,
        worker_init_fn=follow_only_the_rank,
        # One of its own: otherwise making an iterator would draw from the generator that dropout uses,
        # and a resumed run would no longer repeat the uninterrupted one.
        generator=torch.Generator().manual_seed(args.seed),
    )


def _external_loader(loader: Any) -> Any:
    """The user's own loader or iterator; workers of a loader end with this rank."""
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ConfigError(
            "--dataloader-type external: the function that provides data has to return loaders or "
            f"iterators of batches, not a {type(loader).__name__} of single samples; use "
            "--dataloader-type single or cyclic"
        )
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = partial(follow_only_the_rank, further=loader.worker_init_fn)
    return loader


class _PretrainingLoader(DataLoader):
    """A loader whose errors are those of the data set, without the worker's traceback around them."""

    def __iter__(self) -> Iterator[Any]:
        with starting_workers():
            batches = super().__iter__()
        return _with_plain_errors(batches)


def _with_plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except DataError as error:
        # Workers send "Caught DataError in DataLoader worker process 0. <traceback> DataError: <message>".
        _, _, message = str(error).rpartition("DataError: ")
        raise DataError(message.strip()) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and ("exited" in str(error) or "killed" in str(error)):
            raise DataError(
                f"a data loading process died ({str(error).splitlines()[0]}). It was killed, perhaps for "
                "lack of memory; try --num-workers 0 or 1, or --no-mmap-bin-files."
            ) from error
        raise


def _check_step_left(sampler: "MegatronPretrainingSampler") -> None:
    left = sampler.total_samples - sampler.consumed_samples
    step = sampler.micro_batch_times_data_parallel_size
    if left < step:
        raise DataError(
            f"{left} of {sampler.total_samples} samples are left, fewer than the {step} of one step of all "
            "ranks. Use more data or a smaller --micro-batch-size."
        )


def _check_share(
    total_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> None:
    if total_samples <= 0:
        raise DataError(f"the data set has no samples ({total_samples}).")
    if micro_batch_size <= 0 or data_parallel_size <= 0:
        raise ConfigError(
            f"micro batch size {micro_batch_size} and data-parallel size {data_parallel_size} must be > 0."
        )
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ConfigError(
            f"data-parallel rank {data_parallel_rank} is not below the size {data_parallel_size}."
        )


class MegatronPretrainingSampler:
    """Samples in order, once: each step takes the next ``micro_batch_size * data_parallel_size`` samples,
    and this rank its share of them.

    Args:
        total_samples: length of the data set.
        consumed_samples: where to start.
        micro_batch_size: samples per step of one rank.
        data_parallel_rank: this rank.
        data_parallel_size: ranks that share the samples.
        drop_last: leave out a last, incomplete step.

    Raises:
        DataError: nothing left to read.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool = True,
    ) -> None:
        _check_share(total_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        if consumed_samples >= total_samples:
            raise DataError(
                f"no samples left to consume: {consumed_samples} of {total_samples} were read before. "
                "Train for fewer iterations, or forget what the checkpoint has consumed (--finetune)."
            )
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        return self.total_samples

    def get_start_end_idx(self) -> tuple[int, int]:
        """This rank's slice of a step."""
        start = self.data_parallel_rank * self.micro_batch_size
        return start, start + self.micro_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro_batch_times_data_parallel_size
        begin, end = self.get_start_end_idx()
        for first in range(self.consumed_samples, self.total_samples, step):
            last = min(first + step, self.total_samples)
            if self.drop_last and last - first < step:
                return
            yield list(range(min(first + begin, last), min(first + end, last)))


class RandomSeedDataset(Dataset):
    """Seeds torch, ``random`` and NumPy before each sample is read, from the run's seed, epoch and index.

    For data sets that draw random numbers per sample: what a sample is no longer depends on which
    worker reads it.
    """

    def __init__(self, dataset: Dataset) -> None:
        from megatron.training.global_vars import get_args

        self.base_seed = get_args().seed
        self.curr_seed = self.base_seed
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def set_epoch(self, epoch: int) -> None:
        """Use other numbers in the next pass."""
        self.curr_seed = self.base_seed + epoch

    def __getitem__(self, idx: int) -> Any:
        seed = idx + self.curr_seed
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        return self.dataset[idx]


class MegatronPretrainingRandomSampler:
    """Shuffled samples, pass after pass: each pass has its own order, drawn from a generator seeded with
    the number of the pass.

    Every iteration over the sampler starts after ``consumed_samples`` and runs to the end of that pass.

    Args:
        dataset: gets the number of the pass if it is a :class:`RandomSeedDataset`.
        total_samples: length of the data set; what does not fill a step of all ranks is left out.
        consumed_samples: where to start, counted over all passes.
        micro_batch_size: samples per step of one rank.
        data_parallel_rank: this rank.
        data_parallel_size: ranks that share the samples.
        data_sharding: each rank shuffles a contiguous part of its own; else one order is dealt out.

    Raises:
        DataError: fewer samples than one step needs.
    """

    def __init__(
        self,
        dataset: Dataset,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        data_sharding: bool,
    ) -> None:
        _check_share(total_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        step = micro_batch_size * data_parallel_size
        if total_samples < step:
            raise DataError(
                f"there are {total_samples} samples, fewer than the {step} of one step (micro batch "
                f"size {micro_batch_size} x data-parallel size {data_parallel_size}). Lower the former."
            )
        self.dataset = dataset
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.data_sharding = data_sharding
        self.micro_batch_times_data_parallel_size = step
        self.last_batch_size = total_samples % step

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro_batch_times_data_parallel_size
        active = self.total_samples - self.last_batch_size
        self.epoch, consumed = divmod(self.consumed_samples, active)
        if consumed % step:
            raise ConfigError(
                f"{self.consumed_samples} consumed samples do not end on a step of {step}: the micro batch "
                "size or the data-parallel size was changed. Keep both, or use --dataloader-type single."
            )
        if isinstance(self.dataset, RandomSeedDataset):
            self.dataset.set_epoch(self.epoch)
        order = self._order_of_rank(consumed, active)
        size = self.micro_batch_size
        for first in range(0, len(order) - size + 1, size):
            self.consumed_samples += step
            yield order[first : first + size]

    def _order_of_rank(self, consumed: int, active: int) -> list[int]:
        """This rank's samples in what is left of the pass."""
        generator = torch.Generator().manual_seed(self.epoch)
        if self.data_sharding:
            bucket = active // self.data_parallel_size
            shuffled = torch.randperm(bucket, generator=generator)[consumed // self.data_parallel_size :]
            return (shuffled + self.data_parallel_rank * bucket).tolist()
        full = self.total_samples // self.micro_batch_size * self.micro_batch_size
        shuffled = torch.randperm(full, generator=generator)
        # Up to ``active`` only, so that no rank has a step more than another.
        return shuffled[consumed + self.data_parallel_rank : active : self.data_parallel_size].tolist()
