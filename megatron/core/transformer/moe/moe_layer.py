"""A layer's mixture of experts in place of its MLP."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.errors import ConfigError
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import first_local_expert
from megatron.core.transformer.moe.legacy_a2a_token_dispatcher import MoEAlltoAllSEQTokenDispatcher
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

# config.moe_token_dispatcher_type -> class
DISPATCHERS = {
    "allgather": MoEAllGatherTokenDispatcher,
    "alltoall": MoEAlltoAllTokenDispatcher,
    "alltoall_seq": MoEAlltoAllSEQTokenDispatcher,
    "flex": MoEFlexTokenDispatcher,
}


@dataclass
class MoESubmodules:
    """Slots of a layer of experts."""

    experts: ModuleSpec | type | None = None
    shared_experts: ModuleSpec | type | None = None


class BaseMoELayer(MegatronModule, ABC):
    """Deals the experts out: expert-parallel rank r has the r-th of equal parts, in their order.

    Attributes:
        num_local_experts: experts of this rank.
        local_expert_indices: their numbers among all experts.
        router: ``(hidden [s, b, h]) -> (weights [t, E], map [t, E])``.
        experts: this rank's.
        shared_experts: experts that all tokens go to, or None.
        token_dispatcher: brings tokens to experts and back.
        layer_number: of the layer in the whole model, from 1, once it is known.

    Raises:
        ConfigError: the experts do not divide among the ranks.
    """

    router: Any
    experts: Any
    shared_experts: Any
    token_dispatcher: MoETokenDispatcher | None

    def __init__(self, config: TransformerConfig, layer_number: int | None = None):
        super().__init__(config)
        experts, ranks = config.num_moe_experts, config.expert_model_parallel_size
        if not experts:
            raise ConfigError("num_moe_experts: unset, but the layer has experts; set it")
        if experts % ranks:
            raise ConfigError(
                f"num_moe_experts {experts} is not divisible by expert_model_parallel_size {ranks}"
            )
        if ranks > 1 and not parallel_state.is_initialized():
            raise ConfigError(
                f"expert_model_parallel_size {ranks}: no process groups exist; call "
                f"parallel_state.initialize_model_parallel(expert_model_parallel_size={ranks}) first"
            )
        self.num_local_experts = experts // ranks
        first = first_local_expert(config, self.num_local_experts)
        self.local_expert_indices = list(range(first, first + self.num_local_experts))
        self.router = self.experts = self.shared_experts = self.token_dispatcher = None
        self.layer_number = layer_number

    @abstractmethod
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h], and a bias for the caller to add, or None."""

    def set_layer_number(self, layer_number: int) -> None:
        """Tells the layer, and its router, its number in the whole model, counted from 1."""
        self.layer_number = layer_number
        self.router.set_layer_number(layer_number)


class MoELayer(BaseMoELayer):
    """Router, dispatch, experts, the way back, and shared experts.

    With ``recompute_modules`` moe, all of it runs again in backward and only its input is kept.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
    ):
        super().__init__(config, layer_number)
        if submodules is None:
            raise ConfigError("a layer of experts needs submodules: see get_moe_module_spec()")
        self.submodules = submodules
        self.moe_layer_recompute = config.recomputes("moe")
        self.router = TopKRouter(config)
        if layer_number is not None:
            self.router.set_layer_number(layer_number)
        kind = config.moe_token_dispatcher_type
        if kind not in DISPATCHERS:
            raise ConfigError(f"moe_token_dispatcher_type: {kind!r} is not one of {', '.join(DISPATCHERS)}")
        dispatcher = DISPATCHERS[kind](self.num_local_experts, self.local_expert_indices, config)
        self.token_dispatcher = dispatcher
        self.experts = build_module(submodules.experts, self.num_local_experts, config)
        self.use_shared_expert = config.moe_shared_expert_intermediate_size is not None
        self.shared_expert_overlap = config.moe_shared_expert_overlap
        if self.use_shared_expert:
            self.shared_experts = build_module(submodules.shared_experts, config=config)
            if self.shared_expert_overlap:
                dispatcher.set_shared_experts(self.shared_experts)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h], and no bias.

        Raises:
            ConfigError: training with tensor parallelism but without sequence parallelism, where every
                tensor-parallel rank would send the same tokens and experts would count them over again.
        """
        config = self.config
        if self.training and config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            raise ConfigError(
                "sequence_parallel: needed to train experts with tensor_model_parallel_size "
                f"{config.tensor_model_parallel_size}; set it to True"
            )
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._mix, False, hidden_states), None
        return self._mix(hidden_states), None

    def _mix(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]"""
        assert self.token_dispatcher is not None, "made by the constructor"
        probs, routing_map = self.router(hidden_states)
        rows, tokens_per_expert, row_probs = self.token_dispatcher.token_permutation(
            hidden_states, probs, routing_map
        )
        results, bias = self.experts(rows, tokens_per_expert, row_probs)
        output, _ = self.token_dispatcher.token_unpermutation(results, bias)
        if self.use_shared_expert and not self.shared_expert_overlap:
            output = output + self.shared_experts(hidden_states)
        return output
