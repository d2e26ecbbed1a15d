"""Routers of small models for tests, and what they decide, written out in float64."""

from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

HIDDEN = 16


def config_of(experts: int, topk: int, **fields: Any) -> TransformerConfig:
    """A config of one layer with experts; ``fields`` go before the defaults here."""
    defaults = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        add_bias_linear=False,
        perform_initialization=False,
        moe_router_pre_softmax=topk == 1,
    )
    return TransformerConfig(**{**defaults, "num_moe_experts": experts, "moe_router_topk": topk, **fields})


def router_of(experts: int, topk: int, **fields: Any) -> TopKRouter:
    """A router with drawn weights and, where it has one, a drawn bias."""
    router = TopKRouter(config_of(experts, topk, **fields))
    router.set_layer_number(1)
    with torch.no_grad():
        router.weight.copy_(drawn(experts, HIDDEN, seed=7))
    if router.expert_bias is not None:
        router.expert_bias.copy_(0.1 * drawn(experts, seed=8))
    return router


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers, [shape] float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forget_what_was_tracked() -> None:
    """Brings back the state of a fresh process."""
    parallel_state.get_moe_layer_wise_logging_tracker().clear()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def tracked(name: str) -> float:
    """Sum over layers of a loss that routers have reported."""
    return float(parallel_state.get_moe_layer_wise_logging_tracker()[name]["values"].sum())


def balance_loss(scores: Tensor, chosen: Tensor, topk: int) -> Tensor:
    """E / (T^2 k) * sum over experts of (sum of scores) * (tokens).

    Args:
        scores: [T, E], adding up to 1.
        chosen: [T, E] bool.
    """
    tokens, experts = scores.shape
    return sum((scores[:, e].sum() * int(chosen[:, e].sum()) for e in range(experts)), torch.tensor(0.0)) * (
        experts / (tokens * tokens * topk)
    )


def sequence_balance_loss(scores: Tensor, chosen: Tensor, topk: int, sequences: int) -> Tensor:
    """Mean over sequences of the balance loss of each.  Token ``t`` belongs to sequence ``t % sequences``."""
    losses = [
        balance_loss(scores[number::sequences], chosen[number::sequences], topk)
        for number in range(sequences)
    ]
    return torch.stack(losses).mean()


def normalised_scores(logits: Tensor, score_function: str = "softmax") -> Tensor:
    """[T, E] fp64 scores that add up to 1."""
    wide = logits.double()
    if score_function == "softmax":
        return wide.softmax(-1)
    return wide.sigmoid() / wide.sigmoid().sum(-1, keepdim=True)
