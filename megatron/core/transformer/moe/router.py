"""Which experts a token goes to, with which weights; and the losses that spread tokens over experts.

Letters: t tokens of this rank, E experts, k experts a token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.collectives import group_size
from megatron.core.errors import ConfigError
from megatron.core.fusions.experts import SCORE_SUM_EPSILON, limit_to_best_groups, topk_routing
from megatron.core.tensor_parallel import Place
from megatron.core.tensor_parallel.initial_weights import new_weight
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    dense,
    group_balance_losses,
    sequence_load_balancing_loss_func,
    sinkhorn,
    switch_load_balancing_loss_func,
    with_capacity,
    z_loss_func,
)
from megatron.core.transformer.moe.tracker import save_load, save_to_aux_losses_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils.tensors import mark

# Kinds of balancing whose scores follow the config's score function; those of others are a softmax.
_READ_SCORE_FUNCTION = ("aux_loss", "seq_aux_loss", "none")
ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
# Names of the losses in logs.
BALANCE, Z_LOSS = "load_balancing_loss", "z_loss"
EXPERT_LEVEL, DEVICE_LEVEL, COMM_LEVEL = (
    f"load_balancing_{level}_level_loss" for level in ("expert", "device", "comm")
)


def tracked_losses(config: TransformerConfig) -> list[str]:
    """Names of the losses that routers with this config report."""
    names = []
    if config.moe_router_load_balancing_type == "group_limited_greedy":
        weights = (
            config.moe_aux_loss_coeff,
            config.moe_device_level_aux_loss_coeff,
            config.moe_comm_aux_loss_coeff,
        )
        levels = (EXPERT_LEVEL, DEVICE_LEVEL, COMM_LEVEL)
        names += [name for name, weight in zip(levels, weights, strict=True) if weight]
    elif config.moe_aux_loss_coeff and _balances_by_loss(config):
        names.append(BALANCE)
    return names + ([Z_LOSS] if config.moe_z_loss_coeff else [])


def _balances_by_loss(config: TransformerConfig) -> bool:
    kind = config.moe_router_load_balancing_type
    return kind in ("aux_loss", "seq_aux_loss", "pai_megatron_aux_loss") or (
        kind == "none" and config.seq_aux
    )


class Router(MegatronModule, ABC):
    """Base: a score for every expert from each token's hidden state.

    Attributes:
        weight: [E, h], whole on every rank.
        layer_number: of the layer in the whole model, from 1, once it is known; losses are logged by it.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        if config.num_moe_experts is None:
            raise ConfigError("num_moe_experts: unset, but the layer has experts; set it")
        self.num_experts = config.num_moe_experts
        self.layer_number: int | None = None
        shape = (self.num_experts, config.hidden_size)
        assert config.init_method is not None, "the config fills it in"
        self.weight, _ = new_weight(config, shape, None, config.init_method, Place(0, 1))
        # Every rank has it whole, and its gradient from a part of the sequence.
        mark(self.weight, sequence_parallel=config.sequence_parallel)

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, E] logits, in ``config.moe_router_dtype`` or the dtype of the input."""
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype or "", input.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype))

    @abstractmethod
    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, E] -> [t, E] weights, [t, E] bool map."""

    @abstractmethod
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] -> [t, E] weights, [t, E] bool map."""

    def set_layer_number(self, layer_number: int) -> None:
        """Tells the number of the layer in the whole model, counted from 1."""
        self.layer_number = layer_number


class TopKRouter(Router):
    """The k best experts of every token.

    ``config.moe_router_load_balancing_type`` says how loads are kept even: ``aux_loss``, over the tokens of a
    micro-batch, and ``seq_aux_loss``, over each sequence, by a loss; ``sinkhorn`` by the choice itself;
    ``none`` not, or by a bias on the scores that follows the loads (``moe_router_enable_expert_bias``), with
    ``seq_aux`` by a loss over each sequence as well. MindSpeed-LLM's values are ``softmax_topk`` (softmax
    over all experts, no loss), ``pai_megatron_aux_loss`` (the same with a loss) and ``group_limited_greedy``
    (DeepSeek-V2: groups with the best single expert, losses over experts, groups, and their traffic).

    Attributes:
        expert_bias: [E] fp32, or None without.
        local_tokens_per_expert: [E] fp32, tokens of this rank since the bias changed last, or None.
    """

    expert_bias: Tensor | None
    local_tokens_per_expert: Tensor | None

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.topk = config.moe_router_topk
        self.kind = config.moe_router_load_balancing_type
        if self.kind not in _ROUTINGS:
            raise ConfigError(
                f"moe_router_load_balancing_type: {self.kind!r} is not one of {', '.join(_ROUTINGS)}"
            )
        counts = bias = None
        if config.moe_router_enable_expert_bias:
            counts, bias = (torch.zeros(self.num_experts, device=self.weight.device) for _ in range(2))
        self.register_buffer("local_tokens_per_expert", counts, persistent=False)
        self.register_buffer("expert_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """As of any module, but the buffers stay fp32: steps of the bias are lost in half precision."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = (
                    torch.zeros_like(moved, dtype=buffer.dtype) if buffer.is_meta else buffer.to(moved.device)
                )
        return self

    def move_bias(self, bias: Tensor) -> None:
        """Takes a new bias, [E], and counts tokens anew."""
        assert self.expert_bias is not None and self.local_tokens_per_expert is not None
        self.expert_bias.copy_(bias)
        self.local_tokens_per_expert.zero_()

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] -> [t, E] weights, 0 outside the map, and the bool map; t counts positions first."""
        return self.routing(self.gating(self.apply_input_jitter(input)))

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, E] -> [t, E] weights, 0 outside the map, and the bool map."""
        seq_length, bsz = logits.shape[:2]
        logits = self.apply_z_loss(logits.reshape(-1, self.num_experts))
        if self.config.moe_router_force_load_balancing:
            return self._balanced_by_force(logits)
        return _ROUTINGS[self.kind](self, logits, bsz, seq_length)

    @property
    def _trains(self) -> bool:
        """Whether this pass trains: not an evaluation, nor the first run of a layer that is recomputed."""
        return self.training and torch.is_grad_enabled()

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """Multiplies by noise from U(1 - eps, 1 + eps) in training."""
        eps = self.config.moe_input_jitter_eps
        if not eps or not self.training:
            return input
        return input * torch.empty_like(input).uniform_(1.0 - eps, 1.0 + eps)

    def apply_z_loss(self, logits: Tensor) -> Tensor:
        """Attaches the loss on large logits.  [t, E] -> [t, E]"""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self._trains:
            return logits
        # Parts of a sequence have as many tokens, so the mean over all of them is that of their means.
        loss = z_loss_func(logits, coefficient / group_size(_sequence_group()))
        return self._attach(logits, loss, Z_LOSS, coefficient)

    def compute_routing_scores_for_aux_loss(self, logits: Tensor) -> Tensor:
        """[t, E] fp32 scores over all experts that add up to 1, without the bias."""
        if self.config.moe_router_score_function == "sigmoid" and self.kind in _READ_SCORE_FUNCTION:
            scores = logits.float().sigmoid()
            return scores / (scores.sum(-1, keepdim=True) + SCORE_SUM_EPSILON)
        return logits.float().softmax(-1)

    def aux_loss_load_balancing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Top-k, with the loss over the tokens of the micro-batch."""
        probs, routing_map, chosen = self._choose(logits)

        def loss(group: ProcessGroup | None) -> Tensor:
            scores = self.compute_routing_scores_for_aux_loss(logits)
            coefficient = self.config.moe_aux_loss_coeff
            return switch_load_balancing_loss_func(scores, chosen.sum(0), self.topk, coefficient, group)

        return self.apply_load_balancing_loss(probs, loss), routing_map

    def seq_aux_loss_load_balancing(self, logits: Tensor, bsz: int, seq_length: int) -> tuple[Tensor, Tensor]:
        """Top-k, with the loss over each sequence."""
        probs, routing_map, chosen = self._choose(logits)

        def loss(group: ProcessGroup | None) -> Tensor:
            return sequence_load_balancing_loss_func(
                self.compute_routing_scores_for_aux_loss(logits),
                chosen,
                bsz,
                seq_length,
                self.topk,
                self.config.moe_aux_loss_coeff,
                group,
            )

        return self.apply_load_balancing_loss(probs, loss), routing_map

    def sinkhorn_load_balancing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts by a matrix with even columns, in training; weights are the scores of the logits."""
        if self.config.moe_aux_loss_coeff:
            raise ConfigError("moe_aux_loss_coeff: sinkhorn routing is even by itself; set it to 0")
        scores = logits.sigmoid() if self.topk == 1 else logits.float().softmax(-1).to(logits.dtype)
        with torch.no_grad():
            ranked = sinkhorn(logits) if self.training else logits
            experts = ranked.topk(self.topk, dim=-1).indices
        probs, routing_map = dense(scores.gather(-1, experts), experts, self.num_experts)
        self._count(logits, routing_map, routing_map)
        return probs, routing_map

    def apply_load_balancing_loss(
        self, activation: Tensor, load_balancing_loss_func: Callable[[ProcessGroup | None], Tensor]
    ) -> Tensor:
        """Computes, logs and attaches a loss to routing weights; in training only.

        Args:
            activation: [t, E] weights.
            load_balancing_loss_func: the loss, given the ranks that share the sequences.
        """
        coefficient = self.config.moe_aux_loss_coeff
        if not coefficient or not self._trains:
            return activation
        loss = load_balancing_loss_func(_sequence_group())
        name = EXPERT_LEVEL if self.kind == "group_limited_greedy" else BALANCE
        return self._attach(activation, loss, name, coefficient)

    def _attach(self, activation: Tensor, loss: Tensor, name: str, coefficient: float) -> Tensor:
        """Logs ``loss`` without its coefficient, and lets its gradient start where that of ``activation``
        passes.
        """
        group, config = _sequence_group(), self.config
        save_to_aux_losses_tracker(
            name,
            loss / coefficient,
            self.layer_number,
            config.num_layers + (config.mtp_num_layers or 0),
            reduce_group=group,
            avg_group=_replica_group(),
        )
        if config.calculate_per_token_loss:
            # The step's gradients are divided by its tokens: a mean over a micro-batch counts once for each.
            loss = loss * (activation.shape[0] * group_size(group))
        return MoEAuxLossAutoScaler.apply(activation, loss)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[t, E] weights, [t, E] bool map, and the map before any token was dropped."""
        config = self.config
        options: dict[str, Any] = {"pre_softmax": True}
        if self.kind in _READ_SCORE_FUNCTION:
            options = {
                "score_function": config.moe_router_score_function,
                "pre_softmax": config.moe_router_pre_softmax,
                "num_groups": config.moe_router_num_groups if config.moe_router_group_topk else None,
                "group_topk": config.moe_router_group_topk,
                "scaling_factor": config.moe_router_topk_scaling_factor,
                "expert_bias": self.expert_bias,
            }
        weights, experts = topk_routing(logits, self.topk, **options)
        if config.norm_topk_prob and self.kind in ("aux_loss", "softmax_topk"):
            wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
            weights = (wide / (wide.sum(-1, keepdim=True) + SCORE_SUM_EPSILON)).to(weights.dtype)
        return self._limit(logits, weights, experts)

    def _limit(self, logits: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[t, k] weights and experts -> as :meth:`_choose`; experts take what their capacity allows."""
        config = self.config
        probs, chosen = dense(weights, experts, self.num_experts)
        probs, routing_map, _ = with_capacity(
            probs,
            chosen,
            self.topk,
            config.moe_expert_capacity_factor,
            config.moe_pad_expert_input_to_capacity,
            config.moe_token_drop_policy,
        )
        self._count(logits, chosen, routing_map)
        return probs, routing_map, chosen

    def _without_loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probs, routing_map, _ = self._choose(logits)
        return probs, routing_map

    def _group_limited_greedy(self, logits: Tensor, bsz: int, seq_length: int) -> tuple[Tensor, Tensor]:
        """Experts within the groups whose best expert scores highest, and losses on three levels."""
        config = self.config
        groups = config.moe_router_num_groups or config.expert_model_parallel_size
        kept = config.moe_router_group_topk
        assert kept is not None, "the config's rules ask for it"
        scores = logits.float().softmax(-1)
        experts = limit_to_best_groups(scores.detach(), groups, kept, 1).topk(self.topk, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.topk > 1 and config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + SCORE_SUM_EPSILON)
        else:
            weights = weights * (config.moe_router_topk_scaling_factor or 1.0)
        probs, routing_map, _ = self._limit(logits, weights.to(logits.dtype), experts)
        if not self._trains:
            return probs, routing_map
        # Without seq_aux all tokens of the micro-batch count as one sequence.
        shape = (bsz, seq_length) if config.seq_aux else (1, bsz * seq_length)

        def expert_level(group: ProcessGroup | None) -> Tensor:
            coefficient = config.moe_aux_loss_coeff
            return sequence_load_balancing_loss_func(
                scores, routing_map, *shape, self.topk, coefficient, group
            )

        probs = self.apply_load_balancing_loss(probs, expert_level)
        coefficients = (config.moe_device_level_aux_loss_coeff, config.moe_comm_aux_loss_coeff)
        if any(coefficients):
            losses = group_balance_losses(
                scores, routing_map, *shape, self.topk, groups, kept, _sequence_group()
            )
            for loss, coefficient, name in zip(losses, coefficients, (DEVICE_LEVEL, COMM_LEVEL), strict=True):
                if coefficient:
                    probs = self._attach(probs, loss * coefficient, name, coefficient)
        return probs, routing_map

    def _balanced_by_force(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts in turn, whatever the scores say; weights are the softmax over the chosen ones."""
        turn = torch.arange(logits.shape[0] * self.topk, device=logits.device)
        experts = (turn % self.num_experts).view(-1, self.topk)
        weights = logits.float().gather(-1, experts).softmax(-1).to(logits.dtype)
        probs, routing_map, _ = self._limit(logits, weights, experts)
        return probs, routing_map

    def _count(self, logits: Tensor, chosen: Tensor, routing_map: Tensor) -> None:
        """Adds to the loads that the bias follows, and to those that are logged.

        Args:
            logits: [t, E].
            chosen: [t, E] bool, before any token was dropped.
            routing_map: [t, E] bool, after, and perhaps with rows that only fill an expert's capacity.
        """
        config = self.config
        if not self._trains:
            return
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert += chosen.sum(0)
        if config.log_moe_balance:
            save_load(
                self.layer_number,
                config.num_layers + (config.mtp_num_layers or 0),
                chosen.sum(0),
                (chosen & routing_map).sum(0),
                self.compute_routing_scores_for_aux_loss(logits.detach()),
            )


# Kind of balancing -> routing of [t, E] logits of ``bsz`` sequences with ``seq_length`` tokens on this rank
_ROUTINGS: dict[str, Callable[[TopKRouter, Tensor, int, int], tuple[Tensor, Tensor]]] = {
    "aux_loss": lambda router, logits, bsz, length: router.aux_loss_load_balancing(logits),
    "seq_aux_loss": TopKRouter.seq_aux_loss_load_balancing,
    "sinkhorn": lambda router, logits, bsz, length: router.sinkhorn_load_balancing(logits),
    "none": lambda router, logits, bsz, length: (
        router.seq_aux_loss_load_balancing(logits, bsz, length)
        if router.config.seq_aux
        else router._without_loss(logits)
    ),
    "softmax_topk": lambda router, logits, bsz, length: router._without_loss(logits),
    "pai_megatron_aux_loss": lambda router, logits, bsz, length: router.aux_loss_load_balancing(logits),
    "group_limited_greedy": TopKRouter._group_limited_greedy,
}


def _sequence_group() -> ProcessGroup | None:
    """Ranks that share the sequences of a micro-batch."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    return parallel_state.get_tensor_and_context_parallel_group()


def _replica_group() -> ProcessGroup | None:
    """Ranks with other sequences."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    return parallel_state.get_data_parallel_group()
