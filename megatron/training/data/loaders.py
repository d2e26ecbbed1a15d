"""Building the data iterators of the training loop from a provider of data sets."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training.agreement import any_rank_each, failing_together
from megatron.training.data.samplers import build_pretraining_data_loader
from megatron.training.global_vars import get_args
from megatron.training.processes.workers import starting_workers
from megatron.training.utils import print_rank_0


def cyclic_iter(iter: Any) -> Iterator:
    """Go through ``iter``, which is anything to iterate over, again and again."""
    while True:
        yield from iter


def get_train_valid_test_num_samples() -> tuple[int, int, int]:
    """Number of samples that a run needs of each split.

    Validation runs every ``eval_interval`` iterations and once at the end; an interval of 0 means only
    at the end.
    """
    args = get_args()
    train = args.train_samples or args.train_iters * args.global_batch_size
    evaluations = args.train_iters // args.eval_interval + 1 if args.eval_interval else 1
    per_evaluation = args.eval_iters * args.global_batch_size
    return train, evaluations * per_evaluation, per_evaluation


def build_train_valid_test_datasets(
    build_train_valid_test_datasets_provider: Callable,
) -> tuple[Any, Any, Any]:
    """Call the datasets provider with the sizes of this run and print them."""
    sizes = get_train_valid_test_num_samples()
    print_rank_0(" > datasets target sizes (minimum size):")
    for label, size in zip(("train:     ", "validation:", "test:      "), sizes, strict=True):
        print_rank_0(f"    {label} {size}")
    return build_train_valid_test_datasets_provider(sizes)


def _restore_consumed_samples(args: Namespace) -> None:
    """Checkpoints from before sample counting hold an iteration but no counts."""
    if args.iteration == 0 or args.train_samples is not None:
        return
    if args.consumed_train_samples == 0:
        args.consumed_train_samples = args.iteration * args.global_batch_size
    if args.consumed_valid_samples == 0 and args.eval_interval:
        evaluations = args.iteration // args.eval_interval
        args.consumed_valid_samples = evaluations * args.eval_iters * args.global_batch_size


def _valid_samples_to_skip(args: Namespace, valid: Any) -> int:
    """Samples that validation skips: those it has consumed before.

    None are skipped when those left would not fill one step.
    """
    if valid is None or args.skip_train or args.dataloader_type == "external":
        return 0
    step = args.micro_batch_size * args.data_parallel_size
    return args.consumed_valid_samples if args.consumed_valid_samples + step <= len(valid) else 0


def build_train_valid_test_data_loaders(
    build_train_valid_test_datasets_provider: Callable,
) -> tuple[Any, Any, Any]:
    """Loaders of the three splits on the ranks that read them, None elsewhere. All ranks call this together.

    Sets ``args.do_train``, ``do_valid`` and ``do_test`` where any rank has a loader. A provider with the
    attribute ``is_distributed = True`` is called on every rank, any other on tensor-parallel rank 0.
    """
    args = get_args()
    print_rank_0("> building train, validation, and test datasets ...")
    _restore_consumed_samples(args)
    loaders: tuple[Any, Any, Any] = (None, None, None)
    provider = build_train_valid_test_datasets_provider
    is_distributed = getattr(provider, "is_distributed", False)
    reads = is_distributed or parallel_state.get_tensor_model_parallel_rank() == 0
    train, valid, test = build_train_valid_test_datasets(provider) if reads else (None, None, None)
    with failing_together():
        # A finished run that is started again has consumed all its samples; it only evaluates.
        nothing_to_train = args.skip_train or args.iteration >= args.train_iters
        loaders = (
            None if nothing_to_train else build_pretraining_data_loader(train, args.consumed_train_samples),
            build_pretraining_data_loader(valid, _valid_samples_to_skip(args, valid)),
            build_pretraining_data_loader(test, 0),
        )
    # Ranks that read nothing take part in this, too.
    has_train, has_valid, has_test = any_rank_each([loader is not None for loader in loaders])
    args.do_train = has_train
    args.do_valid = has_valid and args.eval_iters > 0
    args.do_test = has_test and args.eval_iters > 0
    return loaders


def build_data_iterators_of_chunks(provider: Callable, chunks: int) -> tuple[Any, Any, Any]:
    """Iterators of the three splits for all model chunks of this rank.

    Returns:
        What :func:`build_train_valid_test_data_iterators` does; with several chunks a list per split, one
        iterator or None per chunk; each reads all samples.
    """
    if chunks == 1:
        return build_train_valid_test_data_iterators(provider)
    args = get_args()
    by_chunk, wanted = [], []
    for virtual_rank in range(chunks):
        parallel_state.set_virtual_pipeline_model_parallel_rank(virtual_rank)
        by_chunk.append(build_train_valid_test_data_iterators(provider))
        wanted.append((args.do_train, args.do_valid, args.do_test))
    parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    # A chunk in the middle of the model reads nothing on any rank.
    args.do_train, args.do_valid, args.do_test = (any(column) for column in zip(*wanted, strict=True))
    train, valid, test = (list(column) for column in zip(*by_chunk, strict=True))
    return train, valid, test


def build_train_valid_test_data_iterators(
    build_train_valid_test_datasets_provider: Callable,
) -> tuple[Any, Any, Any]:
    """Iterators of the three splits, None where a split has no data or this rank reads none.

    A single-pass training loader ends when its samples do. Validation and test start again from where
    they began, so that an evaluation can always run.
    """
    args = get_args()
    loaders = build_train_valid_test_data_loaders(build_train_valid_test_datasets_provider)

    def iterator(loader: Any, single_pass: bool) -> RerunDataIterator | None:
        if loader is None:
            return None
        if args.dataloader_type == "external":
            with starting_workers():
                return RerunDataIterator(iter(loader) if not hasattr(loader, "__next__") else loader)
        return RerunDataIterator(iter(loader if single_pass else cyclic_iter(loader)))

    return (
        iterator(loaders[0], args.dataloader_type == "single"),
        iterator(loaders[1], False),
        iterator(loaders[2], False),
    )
