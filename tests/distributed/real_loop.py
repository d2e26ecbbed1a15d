"""The real ``pretrain_gpt.py`` on a rank of the pool, watched from outside.

Nothing of the loop is replaced: the optimizer's ``step`` is wrapped where the loop receives its optimizer,
so gradients are read after ``finalize_model_grads`` and before anything scales or clips them.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.distributed.full_tensors import Experts, Piece, global_names, piece_of


@dataclass
class Record:
    """What a rank saw.

    Attributes:
        sizes: ranks per axis, as the library says.
        losses: loss of each step; None on ranks that do not compute it.
        grad_norms: norm of each step, as the loop logs it.
        gradients: for each step, name in the whole model -> this rank's piece of the reduced gradient.
        output: what the rank printed.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    losses: list[float | None] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Piece]] = field(default_factory=list)
    output: str = ""


def train(argv: list[str], with_gradients: bool = True) -> Record:
    """Run ``pretrain_gpt.py argv`` on this rank; its output is part of the error if it fails."""
    import pretrain_gpt

    record, output = Record(), io.StringIO()
    sys.argv = ["pretrain_gpt.py", *argv]
    os.environ["MEGATRON_DEVICE"] = "cpu"
    try:
        with contextlib.redirect_stdout(output), _watch(record, with_gradients):
            pretrain_gpt.main()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == 0:  # told to stop early, and did
            record.output = output.getvalue()
            return record
        raise AssertionError(f"{type(error).__name__}: {error}\n{output.getvalue()[-3000:]}") from error
    record.output = output.getvalue()
    return record


@contextlib.contextmanager
def _watch(record: Record, with_gradients: bool) -> Iterator[None]:
    from megatron.training import training

    set_up, step = training.setup_model_and_optimizer, training.train_step

    def watched_set_up(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = set_up(*args, **kwargs)
        record.sizes.update(_sizes())
        inner = optimizer.step

        def watched_optimizer_step() -> Any:
            if with_gradients:
                record.gradients.append(gradients(model))
            return inner()

        optimizer.step = watched_optimizer_step
        return model, optimizer, scheduler

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        losses = result[0]
        record.losses.append(float(losses["lm loss"]) if losses else None)
        record.grad_norms.append(float(result[5]))
        return result

    with (
        mock.patch.object(training, "setup_model_and_optimizer", watched_set_up),
        mock.patch.object(training, "train_step", watched_step),
    ):
        yield


def _sizes() -> dict[str, int]:
    from megatron.core import parallel_state as ps

    return {
        "tp": ps.get_tensor_model_parallel_world_size(),
        "pp": ps.get_pipeline_model_parallel_world_size(),
        "vpp": ps.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": ps.get_context_parallel_world_size(),
        "dp": ps.get_data_parallel_world_size(),
    }


def gradients(model: list[torch.nn.Module]) -> dict[str, Piece]:
    """Reduced gradients of all chunks of this rank, by the name in the whole model."""
    from megatron.core import parallel_state as ps
    from megatron.training import get_args

    args = get_args()
    tied = not args.untie_embeddings_and_output_weights
    experts = Experts(
        ps.get_expert_model_parallel_rank(),
        ps.get_expert_model_parallel_world_size(),
        ps.get_expert_tensor_parallel_rank(),
        ps.get_expert_tensor_parallel_world_size(),
        args.num_experts or 0,
        args.swiglu,
    )
    found: dict[str, Piece] = {}
    for chunk in model:
        reduced = _gathered(chunk) if chunk.ddp_config.use_distributed_optimizer else {}
        module = chunk.module
        while hasattr(module, "module"):
            module = module.module
        names = global_names(module, tied)
        for name, param in module.named_parameters():
            value = reduced.get(param, param.main_grad).detach().clone()
            of_experts = experts.pieces(names[name], param, value)
            if of_experts is not None:
                found.update(of_experts)
                continue
            piece = piece_of(
                param,
                value,
                ps.get_tensor_model_parallel_rank(),
                ps.get_tensor_model_parallel_world_size(),
            )
            if names[name] in found:  # both copies of a tied embedding, in two chunks of one rank
                torch.testing.assert_close(found[names[name]].tensor, value, rtol=0, atol=0)
            found[names[name]] = piece
    return found


def _gathered(chunk: torch.nn.Module) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Gradients put together from the shards that data-parallel ranks hold of each bucket."""
    whole = {}
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
        grad_data = buffer.grad_data.clone()
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // group.size()
            mine = bucket.grad_data[group.rank() * size :][:size].clone()
            everything = grad_data[bucket.offset : bucket.offset + bucket.grad_data.numel()]
            dist.all_gather(list(everything.chunk(group.size())), mine, group=group)
        for param, (start, end, _) in buffer.param_index_map.items():
            whole[param] = grad_data[start:end].view(param.shape)
    return whole
