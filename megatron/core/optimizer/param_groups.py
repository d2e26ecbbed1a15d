"""Which parameters share a learning rate and a weight decay."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron.core.optimizer.optimizer_config import OptimizerConfig

# (name, parameter) -> bool
ParamCondition = Callable[[str, torch.nn.Parameter], bool]


@dataclass(frozen=True)
class _Kind:
    """What the parameters of a group have in common."""

    wd_mult: float
    lr_mult: float
    is_expert_parallel: bool
    is_decoupled_lr: bool


def _get_param_groups(
    model_chunks: Iterable[torch.nn.Module],
    no_weight_decay_cond: ParamCondition | None,
    scale_lr_cond: ParamCondition | None,
    lr_mult: float,
    lr: float | None,
    min_lr: float | None,
    decoupled_lr: float | None,
    decoupled_min_lr: float | None,
) -> list[dict[str, Any]]:
    """Trainable parameters in registration order, grouped; groups in order of their first parameter.

    Two parameters share a group when they agree in weight-decay multiplier, learning-rate multiplier, being
    an expert weight, and having the decoupled learning rate.

    Args:
        no_weight_decay_cond: True for parameters that do not decay; default biases and 1-D tensors (norm
            scales).
        scale_lr_cond: True for parameters whose rate is multiplied by ``lr_mult``; default none.
        lr: peak rate, and ``min_lr`` floor, of ordinary groups.
        decoupled_lr: peak rate of word embeddings and output layer (None: they are ordinary), and
            ``decoupled_min_lr`` its floor (None: ``min_lr``).
    """
    no_decay = no_weight_decay_cond or _is_bias_or_vector
    groups: dict[_Kind, list[torch.nn.Parameter]] = {}
    for chunk in model_chunks:
        for name, param in chunk.named_parameters():
            if not param.requires_grad:
                continue
            is_embedding = getattr(param, "is_embedding_or_output_parameter", False)
            kind = _Kind(
                wd_mult=0.0 if no_decay(name, param) else 1.0,
                lr_mult=lr_mult if scale_lr_cond is not None and scale_lr_cond(name, param) else 1.0,
                is_expert_parallel=not getattr(param, "allreduce", True),
                is_decoupled_lr=decoupled_lr is not None and is_embedding,
            )
            groups.setdefault(kind, []).append(param)
    described = [_describe(kind, params) for kind, params in groups.items()]
    return _update_min_and_max_lr_in_param_groups(described, lr, min_lr, decoupled_lr, decoupled_min_lr)


def groups_of_config(
    config: OptimizerConfig,
    model_chunks: Iterable[torch.nn.Module],
    no_weight_decay_cond: ParamCondition | None,
    scale_lr_cond: ParamCondition | None,
    lr_mult: float,
) -> list[dict[str, Any]]:
    """:func:`_get_param_groups` with the rates of ``config``."""
    return _get_param_groups(
        model_chunks,
        no_weight_decay_cond,
        scale_lr_cond,
        lr_mult,
        lr=config.lr,
        min_lr=config.min_lr,
        decoupled_lr=config.decoupled_lr,
        decoupled_min_lr=config.decoupled_min_lr,
    )


def empty_group(is_expert: bool, lr: float | None, min_lr: float | None) -> dict[str, Any]:
    """A group without parameters, for a rank that takes part in statistics only."""
    kind = _Kind(wd_mult=1.0, lr_mult=1.0, is_expert_parallel=is_expert, is_decoupled_lr=False)
    return {**_describe(kind, []), "max_lr": lr, "min_lr": min_lr}


def _update_min_and_max_lr_in_param_groups(
    param_groups: list[dict[str, Any]],
    lr: float | None,
    min_lr: float | None,
    decoupled_lr: float | None,
    decoupled_min_lr: float | None,
) -> list[dict[str, Any]]:
    """Writes the limits of the learning rate into the groups, which it returns; arguments as above."""
    if decoupled_min_lr is None:
        decoupled_min_lr = min_lr
    for group in param_groups:
        is_decoupled = group.get("is_decoupled_lr", False)
        group["max_lr"] = decoupled_lr if is_decoupled else lr
        group["min_lr"] = decoupled_min_lr if is_decoupled else min_lr
    return param_groups


def _is_bias_or_vector(name: str, param: torch.nn.Parameter) -> bool:
    return name.endswith(".bias") or param.dim() == 1


def _describe(kind: _Kind, params: list[torch.nn.Parameter]) -> dict[str, Any]:
    """A group for a torch optimizer, without limits of the learning rate."""
    return {"params": params, **asdict(kind)}


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _get_param_groups_and_buffers(
    model_chunks: list[torch.nn.Module],
    model_chunk_offset: int,
    config: OptimizerConfig,
    no_weight_decay_cond: ParamCondition | None,
    scale_lr_cond: ParamCondition | None,
    lr_mult: float,
    filter_fn: Callable[[dict[str, Any]], bool],
    buffer_name: str,
) -> tuple[list[dict[str, Any]], dict[int, list[Any]]]:
    """The param groups that ``filter_fn`` takes, and the chunks' gradient buffers.

    Args:
        model_chunk_offset: number of the first chunk.
        filter_fn: of a group as :func:`_get_param_groups` makes it.
        buffer_name: "buffers", or "expert_parallel_buffers", of the wrapped chunks.

    Returns:
        (groups, number of the chunk -> its buffers).
    """
    groups = groups_of_config(config, model_chunks, no_weight_decay_cond, scale_lr_cond, lr_mult)
    buffers = {
        number: getattr(chunk, buffer_name) for number, chunk in enumerate(model_chunks, model_chunk_offset)
    }
    return [group for group in groups if filter_fn(group)], buffers
