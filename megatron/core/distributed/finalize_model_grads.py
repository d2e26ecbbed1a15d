"""The last word on gradients, between backward and the optimizer's step."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron import unbuilt
from megatron.core import accelerator, parallel_state
from megatron.core.errors import NotBuiltYetError, UsageError
from megatron.core.timers import timed
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

__getattr__ = unbuilt.names_of(__name__)

# Norms of single heads: replicated, but every tensor-parallel rank applies them to heads of its own.
_HEAD_NORMS = ("q_layernorm", "k_layernorm")


def finalize_model_grads(model: list[torch.nn.Module], num_tokens: Tensor | None = None) -> None:
    """Finishes the reduction of every chunk's gradients and, with ``num_tokens``, makes them a mean per
    token.

    In order: data-parallel reduction; sums over tensor-parallel ranks of what each of them computed from a
    part of the sequence, or from its heads; sums over the copies of tied embeddings; the biases of
    experts; division by tokens.

    Args:
        model: DDP-wrapped chunks of this rank.
        num_tokens: tokens that count in the loss of this rank's micro-batches (one integer, of all its
            context-parallel ranks together, as the loss function reports them), right on the last pipeline
            stage; or None if gradients are averaged already.

    Raises:
        TrainingError: NaN or Inf among the gradients, if the chunks check for that.
        UsageError: a chunk that is not wrapped, whose gradients nobody reduces.
    """
    for number, chunk in enumerate(model):
        if not hasattr(chunk, "finish_grad_sync"):
            raise UsageError(
                f"chunk {number}, a {type(chunk).__name__}, cannot reduce its gradients: wrap it in "
                "DistributedDataParallel, or leave finalize_model_grads out of the config"
            )
    wrapped: list[Any] = model
    config = get_model_config(model[0])
    with timed(config, "all-grads-sync"):
        for chunk in wrapped:
            chunk.finish_grad_sync()
    if parallel_state.model_parallel_is_initialized():
        with timed(config, "conditional-embedder-grads-all-reduce"):
            _allreduce_conditional_embedding_grads(model, config)
        with timed(config, "layernorm-grads-all-reduce"):
            _allreduce_layernorm_grads(model, config)
        with timed(config, "embedding-grads-all-reduce"):
            _allreduce_word_embedding_grads(model, config)
            _allreduce_position_embedding_grads(model, config)
    if config.moe_router_enable_expert_bias:
        _update_router_expert_bias(model, config)
    if num_tokens is not None:
        # Without any token the gradients are zero, and stay so.
        mean = 1.0 / _sum_tokens(num_tokens).clamp(min=1).float()
        for chunk in wrapped:
            chunk.scale_gradients(mean)


def _allreduce_layernorm_grads(model: list[torch.nn.Module], config: TransformerConfig) -> None:
    """Sums over tensor-parallel ranks, as one message, gradients that each computed from other activations.

    Those of parameters marked ``sequence_parallel`` (norms and biases behind a split sequence), and of the
    norms of single heads.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group is None or group.size() == 1:
        return
    grads = [
        getattr(param, _get_main_grad_attr(param))
        for chunk in model
        for name, param in chunk.named_parameters()
        if param.requires_grad
        and (
            getattr(param, "sequence_parallel", False)
            or (config.qk_layernorm and any(part in _HEAD_NORMS for part in name.split(".")))
        )
    ]
    # Without a buffer there is none of what no loss has reached, on any rank alike.
    grads = [grad for grad in grads if grad is not None]
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        members = [grad for grad in grads if grad.dtype == dtype]
        # Flat, because a model has many of them and each is tiny.
        flat = torch.cat([grad.view(-1) for grad in members])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([grad.numel() for grad in members])
        torch._foreach_copy_(members, [p.view_as(g) for p, g in zip(pieces, members, strict=True)])


def _update_router_expert_bias(model: list[torch.nn.Module], config: TransformerConfig) -> None:
    """Moves the bias of every expert towards an even load, by the tokens of this step on all ranks."""
    routers = [
        module
        for chunk in model
        for module in chunk.modules()
        if isinstance(module, TopKRouter) and module.expert_bias is not None
    ]
    if not routers:
        return
    counts, biases = (
        torch.stack([getattr(router, name) for router in routers])
        for name in ("local_tokens_per_expert", "expert_bias")
    )
    updated = get_updated_expert_bias(counts, biases, config.moe_router_bias_update_rate)
    for router, bias in zip(routers, updated, strict=True):
        router.move_bias(bias)


def _allreduce_conditional_embedding_grads(model: list[torch.nn.Module], config: TransformerConfig) -> None:
    """Sums the gradients of conditional embedders, which every pipeline stage and chunk has a copy of.

    They are the parameters marked ``pipeline_parallel``, in models whose config says ``has_cond_embedder``.
    Copies are told by their names; every rank must hold the same.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1 or not getattr(config, "has_cond_embedder", False):
        return
    copies: dict[str, list[Tensor]] = {}
    for chunk in model:
        for name, param in chunk.named_parameters():
            if param.requires_grad and getattr(param, "pipeline_parallel", False):
                copies.setdefault(name, []).append(getattr(param, _get_main_grad_attr(param)))
    for grads in copies.values():
        total = torch.stack(grads).sum(dim=0)
        dist.all_reduce(total, group=group)
        for grad in grads:
            grad.copy_(total)


def _get_main_grad_attr(param: torch.nn.Parameter, use_custom_fsdp: bool = False) -> str:
    """Name of the attribute that holds the gradient to reduce: ``main_grad`` where there is a buffer."""
    if use_custom_fsdp:
        raise NotBuiltYetError("fully sharded data parallelism", "use_custom_fsdp", "Pass False.")
    return "main_grad" if hasattr(param, "main_grad") else "grad"


def _allreduce_word_embedding_grads(model: list[torch.nn.Module], config: TransformerConfig) -> None:
    """Sums the gradients of an embedding's copies on the first and the last stage.

    There are two where it is tied to the output layer, or where further tokens are predicted.
    """
    if not parallel_state.is_rank_in_embedding_group(ignore_virtual=True):
        return
    group = parallel_state.get_embedding_group()
    if group.size() == 1:
        return
    is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    chunk = model[-1] if is_last and not is_first else model[0]
    model_itself = _innermost(chunk)
    tied = getattr(model_itself, "share_embeddings_and_output_weights", False)
    if tied or getattr(config, "mtp_num_layers", None):
        weight = model_itself.shared_embedding_or_output_weight()
        dist.all_reduce(getattr(weight, _get_main_grad_attr(weight)), group=group)


def _allreduce_position_embedding_grads(model: list[torch.nn.Module], config: TransformerConfig) -> None:
    """Sums the gradients of position embeddings that several stages hold."""
    if not parallel_state.is_rank_in_position_embedding_group():
        return
    group = parallel_state.get_position_embedding_group()
    if group.size() == 1:
        return
    table = getattr(getattr(_innermost(model[0]), "embedding", None), "position_embeddings", None)
    if table is not None:
        dist.all_reduce(getattr(table.weight, _get_main_grad_attr(table.weight)), group=group)


def _innermost(chunk: Any) -> Any:
    """The model inside all wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _sum_tokens(num_tokens: Tensor) -> Tensor:
    """``num_tokens`` of all data-parallel ranks together, 0-dim on the device.

    Not summed over context-parallel ranks: the loss function has done that.
    """
    total = num_tokens.detach().to(accelerator.current_device(), torch.int64, copy=True).reshape(())
    if parallel_state.model_parallel_is_initialized():
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        if pipeline.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(total, src=last, group=pipeline)
        data = parallel_state.get_data_parallel_group()
        if data.size() > 1:
            dist.all_reduce(total, group=data)
    return total


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _unshard_if_dtensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor; any other tensor as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def _reshard_if_dtensor(tensor_to_shard: Tensor, reference_tensor: Tensor) -> Tensor:
    """``tensor_to_shard`` spread like ``reference_tensor`` where that is a DTensor; else as it is."""
    mesh = getattr(reference_tensor, "device_mesh", None)
    if mesh is None:
        return tensor_to_shard
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor_to_shard, mesh, cast(Any, reference_tensor).placements)
