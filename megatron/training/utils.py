"""Small helpers of the training application: printing on one rank, model statistics, batches."""

import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import torch

from megatron import unbuilt
from megatron.core import accelerator, parallel_state
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.distributed import DistributedDataParallel
from megatron.core.errors import ConfigError, DataError
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module, param_is_not_shared
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training.data.batch import get_batch_on_this_tp_rank
from megatron.training.global_vars import get_args

__getattr__ = unbuilt.names_of(__name__)

__all__ = [
    "append_to_progress_log",
    "average_losses_across_data_parallel_group",
    "calc_params_l2_norm",
    "get_batch_on_this_cp_rank",
    "get_batch_on_this_tp_rank",
    "get_blend_and_blend_per_split",
    "get_device_arch_version",
    "get_ltor_masks_and_position_ids",
    "is_last_rank",
    "is_rank0",
    "logical_and_across_model_parallel_group",
    "print_params_min_max_norm",
    "print_rank_0",
    "print_rank_last",
    "reduce_max_stat_across_model_parallel_group",
    "report_memory",
    "rounded",
    "unwrap_model",
    "update_use_dist_ckpt",
]


def _rank_and_world_size() -> tuple[int, int]:
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def is_rank0() -> bool:
    """True on global rank 0, and in a run without torch.distributed."""
    return _rank_and_world_size()[0] == 0


def is_last_rank() -> bool:
    """True on the last global rank, the one that prints losses."""
    rank, world_size = _rank_and_world_size()
    return rank == world_size - 1


def print_rank_0(message: str) -> None:
    """Print on global rank 0, flushed."""
    if is_rank0():
        print(message, flush=True)


def print_rank_last(message: str) -> None:
    """Print on the last global rank, flushed."""
    if is_last_rank():
        print(message, flush=True)


def print_datetime(string: str) -> None:
    """Wait for every rank, then print ``[string] datetime: ...`` on rank 0."""
    if _rank_and_world_size()[1] > 1:
        torch.distributed.barrier()
    print_rank_0(f"[{string}] datetime: {datetime.now():%Y-%m-%d %H:%M:%S} ")


def rounded(value: float, decimals: int) -> str:
    """``value`` with ``decimals`` decimals, or with as many as show two digits of a small one."""
    if value != 0.0 and math.isfinite(value):
        decimals = max(decimals, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


# Wrappers that hold the model in ``.module``.
ALL_MODULE_WRAPPER_CLASSNAMES = (DistributedDataParallel, Float16Module)


def unwrap_model(
    model: Any, module_instances: tuple[type, ...] | None = ALL_MODULE_WRAPPER_CLASSNAMES
) -> Any:
    """Strip wrappers that keep the model in ``.module`` (DDP, Float16Module); lists are unwrapped itemwise.

    Args:
        model: a module or a list of modules.
        module_instances: wrapper classes to strip; None strips everything that has ``.module``.
    """
    if isinstance(model, list):
        return [unwrap_model(chunk, module_instances) for chunk in model]
    while hasattr(model, "module") and (module_instances is None or isinstance(model, module_instances)):
        model = model.module
    return model


def calc_params_l2_norm(model: Any, force_create_fp32_copy: bool = False) -> float:
    """Global L2 norm of the parameters, each counted once.

    Half-precision parameters count by their fp32 main copy where the optimizer keeps one, whole or sharded.
    All ranks call this together.

    Args:
        model: model chunk or list of them.
        force_create_fp32_copy: ignore main copies and cast the parameters instead.
    """
    chunks = model if isinstance(model, list) else [model]
    whole: list[torch.Tensor] = []
    shards: list[torch.Tensor] = []
    for param in (param for chunk in chunks for param in chunk.parameters()):
        if not (param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)):
            continue
        if not force_create_fp32_copy and getattr(param, "main_param_sharded", False):
            if param.main_param is not None:
                shards.append(param.main_param.detach())
            continue
        main_copy = None if force_create_fp32_copy else getattr(param, "main_param", None)
        whole.append((param if main_copy is None else main_copy).detach().float())
    if not torch.distributed.is_initialized():
        return _norm(whole)
    # Ranks of one data-parallel group hold the same whole parameters, and each another part of the sharded.
    squares = torch.tensor([_norm(whole) ** 2, _norm(shards) ** 2], device=accelerator.current_device())
    torch.distributed.all_reduce(
        squares[1:], group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    total = squares.sum()
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return total.sqrt().item()


def _norm(tensors: list[torch.Tensor]) -> float:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).item() if tensors else 0.0


def _reduce_over_model_parallel_group(value: float, operation: torch.distributed.ReduceOp.RedOpType) -> float:
    group = parallel_state.get_model_parallel_group()
    if torch.distributed.get_world_size(group) == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float32, device=accelerator.current_device())
    torch.distributed.all_reduce(tensor, op=operation, group=group)
    return tensor.item()


def reduce_max_stat_across_model_parallel_group(stat: float | None) -> float | None:
    """Maximum over the tensor x pipeline group; None when no rank has a value."""
    reduced = _reduce_over_model_parallel_group(
        -1.0 if stat is None else float(stat), torch.distributed.ReduceOp.MAX
    )
    return None if reduced == -1.0 else reduced


def logical_and_across_model_parallel_group(input: bool) -> bool:
    """True when every rank of the tensor x pipeline group says True."""
    return bool(_reduce_over_model_parallel_group(float(input), torch.distributed.ReduceOp.MIN))


def report_memory(name: str) -> None:
    """Print allocator figures in MiB on data-parallel rank 0."""
    if parallel_state.get_data_parallel_rank() != 0:
        return
    report = accelerator.memory_report()
    figures = " | ".join(
        f"{label}: {report[key] / 2**20:.1f}"
        for label, key in (
            ("allocated", "allocated"),
            ("max allocated", "max_allocated"),
            ("reserved", "reserved"),
            ("max reserved", "max_reserved"),
        )
    )
    print(f"[Rank {_rank_and_world_size()[0]}] {name} memory (MB) | {figures}", flush=True)


def append_to_progress_log(string: str, barrier: bool = True) -> None:
    """Add a time-stamped line to ``<save>/progress.txt`` on rank 0.

    Args:
        string: tab-separated text of the line.
        barrier: wait for every rank first.
    """
    args = get_args()
    if args.save is None:
        return
    rank, world_size = _rank_and_world_size()
    if barrier and world_size > 1:
        torch.distributed.barrier()
    if rank != 0:
        return
    os.makedirs(args.save, exist_ok=True)
    job_id = os.environ.get("SLURM_JOB_ID", "")
    with open(os.path.join(args.save, "progress.txt"), "a") as progress:
        progress.write(
            f"{datetime.now():%Y-%m-%d %H:%M:%S}\tJob ID: {job_id}\t# GPUs: {world_size}\t{string}\n"
        )


def get_blend_and_blend_per_split(args: Namespace) -> tuple[Any, Any]:
    """Data blends from the data path arguments.

    Returns:
        ``(blend, blend_per_split)``; at most one is not None. A blend is (prefixes, weights or None).
    """
    words = args.data_path
    if args.data_args_path is not None:
        words = _text_of("--data-args-path", args.data_args_path).split()
        if not words:
            raise DataError(f"--data-args-path {args.data_args_path}: names no data set")
    if words:
        return get_blend_from_list(words), None
    if args.per_split_data_args_path is not None:
        return None, _blend_per_split_from_file(args.per_split_data_args_path)
    per_split = (args.train_data_path, args.valid_data_path, args.test_data_path)
    if any(path is not None for path in per_split):
        return None, [get_blend_from_list(path) for path in per_split]
    return None, None


@contextmanager
def naming_source_of_data(args: Namespace) -> Iterator[None]:
    """Context in which errors about a data set, or a blend of them, name the flags that it was given by."""
    flags = ("--data-path", "--data-args-path", "--per-split-data-args-path")
    flags += ("--train-data-path", "--valid-data-path", "--test-data-path")
    given = [flag for flag in flags if getattr(args, flag[2:].replace("-", "_")) is not None]
    try:
        yield
    except DataError as error:
        text = str(error)
        if given and re.search(r"\b(no data set|blend)\b", text) and not any(flag in text for flag in given):
            error.args = (f"{text} ({' or '.join(given)})", *error.args[1:])
        raise


def _text_of(flag: str, path: str) -> str:
    """What the file that a flag names holds."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise DataError(f"{flag} {path!r}: cannot be read: {error}") from error


def _blend_per_split_from_file(path: str) -> list[Any]:
    import json

    try:
        table = json.loads(_text_of("--per-split-data-args-path", path))
    except json.JSONDecodeError as exc:
        raise DataError(f"--per-split-data-args-path {path}: not a JSON file ({exc})") from exc
    if not isinstance(table, dict):
        raise DataError(f"--per-split-data-args-path {path}: holds no table of splits")
    missing = [split for split in ("train", "valid", "test") if split not in table]
    if missing:
        raise ConfigError(
            f"--per-split-data-args-path {path}: key(s) {', '.join(missing)} missing; the file needs "
            '{"train": [...], "valid": [...], "test": [...]}, null where a split is not used'
        )
    blends = []
    for split in ("train", "valid", "test"):
        words = table[split]
        blends.append(get_blend_from_list(words.split() if isinstance(words, str) else words))
    return blends


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def average_losses_across_data_parallel_group(losses: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the data-parallel ranks of each scalar loss; [len(losses)]."""
    stacked = torch.stack([loss.detach().clone().view(()) for loss in losses])
    group = parallel_state.get_data_parallel_group()
    world_size = parallel_state.get_data_parallel_world_size()
    if world_size > 1:
        torch.distributed.all_reduce(stacked, group=group)
        stacked /= world_size
    return stacked


def get_device_arch_version() -> int:
    """First number of the device's architecture (9 for a Hopper GPU); 0 where devices have no such number."""
    return accelerator.architecture()[0]


def print_params_min_max_norm(optimizer: Any, iteration: int) -> None:
    """Print a line for every parameter of the optimizer: smallest and largest value, and norm.

    A line names the iteration, the rank, the number of the parameter and whether it is split over the
    tensor-parallel ranks. Each rank prints its own.
    """
    rank = _rank_and_world_size()[0]
    lines = ["iteration, rank, index, tensor-model-parallel, min, max, norm"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params, 1):
        values = param.detach().float()
        split = int(getattr(param, "tensor_model_parallel", False))
        low, high, norm = values.min().item(), values.max().item(), values.norm().item()
        lines.append(f"{iteration:7d}, {rank:4d}, {index:4d}, {split:2d}, {low:.6E}, {high:.6E}, {norm:.6E}")
    print("\n".join(lines), flush=True)


def update_use_dist_ckpt(args: Namespace) -> None:
    """Set ``args.use_dist_ckpt``: every format but ``torch`` is a distributed one."""
    args.use_dist_ckpt = args.ckpt_format != "torch"


def get_ltor_masks_and_position_ids(
    data: torch.Tensor,
    eod_token: int,
    reset_position_ids: bool,
    reset_attention_mask: bool,
    eod_mask_loss: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal mask, loss mask and positions for a batch of token ids.

    For scripts written for Megatron-LM: training here takes them from the samples of ``GPTDataset``.

    Args:
        data: [b, s] token ids.
        eod_token: id of the end-of-document token.
        reset_position_ids: restart positions after each end of document.
        reset_attention_mask: mask earlier documents.
        eod_mask_loss: no loss where the input is an end-of-document token (for what follows it).

    Returns:
        attention mask [b or 1, 1, s, s] bool, True = masked; loss mask [b, s] float32;
        position ids [b, s] int64.
    """
    b, s = data.shape
    is_eod = data == eod_token
    loss_mask = torch.ones(b, s, dtype=torch.float32, device=data.device)
    if eod_mask_loss:
        loss_mask[is_eod] = 0.0

    # The document a token belongs to: the number of documents that ended before it.
    document = is_eod.cumsum(dim=1) - is_eod.long()  # [b, s]
    positions = torch.arange(s, device=data.device).expand(b, s)
    if reset_position_ids:
        starts = torch.where(
            torch.nn.functional.pad(is_eod[:, :-1], (1, 0)), positions, torch.zeros_like(positions)
        )
        positions = positions - starts.cummax(dim=1).values
    else:
        positions = positions.clone()

    masked = torch.ones(1, 1, s, s, dtype=torch.bool, device=data.device).triu(1)
    if reset_attention_mask:
        other_document = document[:, None, :, None] != document[:, None, None, :]  # [b, 1, s, s]
        masked = masked | other_document
    return masked, loss_mask, positions
