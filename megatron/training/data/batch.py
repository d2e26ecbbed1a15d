"""Broadcasting a microbatch from the rank that read it to its tensor-parallel group.

A pipeline stage gets only the tensors that it uses, as the family of the model lists them. One broadcast
carries all tensors; every rank knows its size from the arguments.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from megatron.core import accelerator, parallel_state
from megatron.core.errors import DataError
from megatron.core.models.family import Stages
from megatron.training.global_vars import get_args
from megatron.training.model_family import batch_shape, model_family

Batch = dict[str, torch.Tensor | None]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def sends_attention_mask(args: Namespace) -> bool:
    """True where samples carry a mask of their own; a plain causal one is made by the attention."""
    return bool(args.reset_attention_mask and args.create_attention_mask_in_dataloader)


def stage_needs_data(args: Namespace) -> bool:
    """Whether the pipeline stage (virtual one, if there are several) reads samples."""
    return bool(stage_tensors(args))


def stage_tensors(args: Namespace) -> Layout:
    """Types and shapes of the tensors that this stage needs, in the order of the broadcast."""
    stage, with_mask = _current_stage(), sends_attention_mask(args)
    further = bool(stage & Stages.LAST and getattr(args, "mtp_num_layers", None))
    shape = batch_shape(args, args.micro_batch_size)
    wanted = {
        key: (tensor.dtype, tensor.shape(shape))
        for key, tensor in model_family(args).batch.items()
        if (tensor.stages & stage or (further and tensor.embeds_further_tokens))
        and (with_mask or not tensor.is_attention_mask)
    }
    # Long elements first: each tensor then starts at a multiple of its own element size in the message.
    return dict(sorted(wanted.items(), key=lambda entry: -entry[1][0].itemsize))


def _current_stage() -> Stages:
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    stage = (Stages.FIRST if first else Stages(0)) | (Stages.LAST if last else Stages(0))
    return stage or Stages.MIDDLE


def next_sample(data_iterator: Iterator | None) -> dict[str, Any]:
    """The next microbatch as the data set returns it.

    Raises:
        DataError: there is none.
    """
    assert data_iterator is not None, "a rank that reads is given samples"
    try:
        return next(data_iterator)
    except StopIteration:
        raise DataError(
            "the data set is used up before the run is: use more data, or train for fewer samples "
            "(--train-iters, --train-samples)"
        ) from None


def get_batch_on_this_tp_rank(data_iterator: Iterator | None) -> Batch:
    """Next micro-batch on the device of every tensor-parallel rank; only the first of them reads.

    Args:
        data_iterator: samples, on tensor-parallel rank 0 of a stage that needs them.

    Returns:
        Every key of the family's batch, with the type and shape that the family says; None where this stage
        needs none. Of a GPT: tokens, labels, position_ids [b, s] int64, loss_mask [b, s] float32,
        attention_mask [b, 1, s, s] bool.

    Raises:
        DataError: a sample is not what the arguments announce, or there is none left.
    """
    args = get_args()
    layout = stage_tensors(args)
    tensors = model_family(args).batch
    masks = [key for key, tensor in tensors.items() if tensor.is_attention_mask]
    batch: Batch = dict.fromkeys(tensors)
    if not layout:
        return batch
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        sample, device = next_sample(data_iterator), accelerator.current_device()
        # A mask that the flags did not announce is used all the same: here it needs no broadcast.
        wanted = [key for key in tensors if key in layout or key in masks]
        batch |= {
            key: sample[key].to(device, non_blocking=True) for key in wanted if sample.get(key) is not None
        }
        return batch
    sample = None
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        sample = next_sample(data_iterator)
        _check_sample(sample, layout, masks)
    return batch | _broadcast(sample, layout)


def _broadcast(sample: dict[str, Any] | None, layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors of ``layout`` from tensor-parallel rank 0, as views of one broadcast buffer of bytes."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in layout.values()]
    device = accelerator.current_device()
    if sample is None:
        message = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    else:
        # To the device one by one: from the loader's pinned memory, which a joined copy would not be in.
        parts = [sample[key].to(device, non_blocking=True).contiguous().view(-1) for key in layout]
        message = torch.cat([part.view(torch.uint8) for part in parts])
    torch.distributed.broadcast(
        message,
        src=parallel_state.get_tensor_model_parallel_src_rank(),
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    views = message.split(sizes)
    return {
        key: view.view(dtype).view(shape)
        for view, (key, (dtype, shape)) in zip(views, layout.items(), strict=True)
    }


def _check_sample(sample: dict[str, Any], layout: Layout, masks: list[str]) -> None:
    """Compare a sample with what every rank will receive; ``masks`` are the keys of attention masks."""
    for key, (dtype, shape) in layout.items():
        found = sample.get(key)
        if found is None:
            raise DataError(f"the data set gives no {key!r}; it gives {', '.join(map(str, sample))}")
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise DataError(
                f"the data set gives {key!r} as {found.dtype} of shape {list(found.shape)}; the arguments "
                f"announce {dtype} of shape {list(shape)} (--micro-batch-size, --seq-length)"
            )
    for key in masks:
        mask = sample.get(key)
        if mask is not None and key not in layout and not _is_causal(mask):
            raise DataError(
                "the data set makes attention masks of its own, which tensor-parallel ranks expect only with "
                "--reset-attention-mask: add it, or let the data set leave the mask out"
            )


def _is_causal(mask: torch.Tensor) -> bool:
    """True for a [b, 1, s, s] mask that masks exactly the later positions."""
    s = mask.shape[-1]
    return bool((mask == torch.ones(s, s, dtype=torch.bool, device=mask.device).triu(1)).all())
