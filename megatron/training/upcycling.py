"""Starting a model with experts from the checkpoint of a dense one (``--moe-use-upcycling``)."""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError
from megatron.core.transformer.moe.upcycling_utils import load_and_upcycle_model
from megatron.training.checkpointing import checkpoint_exists, load_checkpoint, save_checkpoint
from megatron.training.utils import print_rank_0

# What a dense checkpoint is read by: no experts, nothing of a run that goes on.
DENSE = {
    "num_experts": None,
    "expert_model_parallel_size": 1,
    "moe_layer_freq": 1,
    "finetune": True,
    "no_load_optim": True,
    "no_load_rng": True,
}


def check_upcycling(args: Namespace) -> None:
    """Refuses, before anything is built, a source that holds nothing and a destination that holds something.

    Raises:
        CheckpointError: with what to type instead.
    """
    source = args.load or args.pretrained_checkpoint
    if not checkpoint_exists(source):
        raise CheckpointError(
            f"--moe-use-upcycling: there is no checkpoint in {source}: give --load the directory of a dense "
            "model's"
        )
    if checkpoint_exists(args.save):
        raise CheckpointError(
            f"--moe-use-upcycling: --save {args.save} holds a checkpoint already: to go on from it, give "
            f"--load {args.save} without --moe-use-upcycling; to begin again, give --save another directory"
        )


def upcycle(args: Namespace, model: list[torch.nn.Module], optimizer: Any, build_dense: Callable) -> None:
    """Fills ``model`` from the dense checkpoint of ``--load``, and saves it as iteration 1 of ``--save``.

    Args:
        args: validated arguments.
        model: chunks with experts of this rank, whose other weights are as they were drawn.
        optimizer: whose copies of the weights are made anew; or None.
        build_dense: makes this rank's chunks of the model that the arguments then describe.
    """
    with _as_dense(args):
        dense = build_dense()
        load_and_upcycle_model(
            load_checkpoint,
            model,
            dense,
            load_kwargs={"ddp_model": dense, "optimizer": None, "opt_param_scheduler": None},
        )
    if optimizer is not None:
        optimizer.reload_model_params()
    save_checkpoint(1, model, None, None, 0.0)
    print_rank_0(f"weights of the dense model are in every expert; saved to {args.save} as iteration 1")


@contextlib.contextmanager
def _as_dense(args: Namespace) -> Iterator[None]:
    """The arguments, and this rank's place among experts, of a model without any."""
    before = {name: getattr(args, name) for name in DENSE}
    vars(args).update(DENSE)
    for set_size, set_rank in _EXPERT_PLACES:
        set_size(1)
        set_rank(0)
    try:
        yield
    finally:
        for setters in _EXPERT_PLACES:
            for setter in setters:
                setter(None)
        vars(args).update(before)


_EXPERT_PLACES = (
    (
        parallel_state.set_expert_model_parallel_world_size,
        parallel_state.set_expert_model_parallel_rank,
    ),
    (
        parallel_state.set_expert_tensor_parallel_world_size,
        parallel_state.set_expert_tensor_parallel_rank,
    ),
)
