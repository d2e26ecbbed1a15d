"""The experts of one rank, in three layouts of their weights; all take rows sorted by expert.

Letters: r rows, h hidden, f inner width of one expert (on this rank of those that split it), E experts here.
The first weights of expert e do not depend on how the experts are spread or split over ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron import unbuilt
from megatron.core import accelerator, parallel_state
from megatron.core.errors import ConfigError
from megatron.core.fusions.matmul import grouped_matmul
from megatron.core.tensor_parallel.initial_weights import (
    InitMethod,
    Place,
    has_own_replicas,
    new_weight,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.layers import LinearBase
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.tensor_parallel.weight_streams import weight_scope
from megatron.core.transformer.mlp import MLP, MLPSubmodules, activate, takes_stride
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils.tensors import mark

__getattr__ = unbuilt.names_of(__name__)


def first_local_expert(config: TransformerConfig, num_local_experts: int) -> int:
    """Number of the first expert of this rank among all experts."""
    if config.expert_model_parallel_size == 1:
        return 0
    return parallel_state.get_expert_model_parallel_rank() * num_local_experts


class _Experts(MegatronModule):
    """What all layouts share: the weights of the routing, and the activation."""

    def __init__(self, num_local_experts: int, config: TransformerConfig):
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.activation_func = config.activation_func
        self.activation_recompute = config.recomputes("moe_act")

    def _weigh_input(self, rows: Tensor, row_probs: Tensor) -> tuple[Tensor, Tensor]:
        """With ``moe_apply_probs_on_input`` the routing weights are spent on the rows themselves."""
        if not self.config.moe_apply_probs_on_input:
            return rows, row_probs
        return (rows * row_probs.unsqueeze(-1)).to(rows.dtype), torch.ones_like(row_probs)

    def _inner(self, x: Tensor, row_probs: Tensor) -> Tensor:
        """Activation times routing weight.  [r, f or 2f], [r] -> [r, f]"""
        width = x.shape[1] // 2 if self.config.gated_linear_unit else x.shape[1]
        return _WeightedActivation.apply(x, row_probs, self._activate, width)

    def _activate(self, x: Tensor) -> Tensor:
        return activate(self.config, self.activation_func, x, None)

    def _through(
        self, x: Tensor, row_probs: Tensor, fc1: Callable[[Tensor], Tensor], fc2: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Both matmuls; the activation in between may be computed again in backward.  [r, h] -> [r, h]"""
        first = fc1(x)
        if not (self.activation_recompute and self.training):
            return fc2(self._inner(first, row_probs))
        recompute = CheckpointWithoutOutput()
        output = fc2(recompute.checkpoint(self._inner, first, row_probs))
        recompute.discard_output_and_register_recompute(output)
        return output


class _WeightedActivation(torch.autograd.Function):
    """``activation(x) * weight`` of every row; keeps its inputs alone and activates again in backward.

    A CPU takes some rows at a time, which stay in its cache from one step to the next.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, row_probs: Tensor, activation: Callable[[Tensor], Tensor], width: int
    ) -> Tensor:
        ctx.save_for_backward(x, row_probs)
        ctx.activation = activation
        out = x.new_empty(len(x), width)
        for block in accelerator.row_blocks(len(x), x.shape[1], x.device):
            torch.mul(activation(x[block]), row_probs[block].unsqueeze(-1), out=out[block])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, row_probs = ctx.saved_tensors
        grad_x, grad_probs = torch.empty_like(x), torch.empty_like(row_probs)
        wide = torch.promote_types(x.dtype, row_probs.dtype)
        for block in accelerator.row_blocks(len(x), x.shape[1], x.device):
            part, grad_part = x[block].detach().requires_grad_(), grad[block].to(wide)
            with torch.enable_grad():
                active = ctx.activation(part)
            torch.sum(grad_part * active.detach(), -1, out=grad_probs[block])
            grad_active = (grad_part * row_probs[block].unsqueeze(-1)).to(active.dtype)
            (grad_x[block],) = torch.autograd.grad(active, part, grad_active)
        return grad_x, grad_probs, None, None


class SequentialMLP(_Experts):
    """One MLP per expert, run one after another.

    Attributes:
        local_experts: the MLPs, in the order of the experts.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, submodules: MLPSubmodules):
        super().__init__(num_local_experts, config)
        self.local_experts = nn.ModuleList()
        first = first_local_expert(config, num_local_experts)
        for number in range(first, first + num_local_experts):
            with weight_scope("expert", number):
                self.local_experts.append(MLP(config, submodules, is_expert=True))
        for module in self.modules():
            if isinstance(module, LinearBase):
                module.leave_communication_to_caller()

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[r, h] -> [r, h], partial sums if experts are split; no bias.

        Args:
            permuted_local_hidden_states: rows, the first expert's first.
            tokens_per_expert: [E] integers that add up to r.
            permuted_probs: [r] routing weights.
        """
        rows, probs = self._weigh_input(permuted_local_hidden_states, permuted_probs)
        counts = tokens_per_expert.tolist()
        # An expert without rows runs as well: its weights need a gradient, be it zero.
        parts = [
            expert(part, per_token_scale=scale)[0]
            for expert, part, scale in zip(
                self.local_experts, rows.split(counts), probs.split(counts), strict=True
            )
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts), None


class GroupedMLP(_Experts):
    """All experts' weights in two parameters, for matmuls that take all experts at once.

    Attributes:
        weight1: nominally [h, E * f] (or 2f, gate first), in memory E blocks [h, f] one after the other.
        weight2: nominally [E * f, h], in memory E blocks [f, h].
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig):
        super().__init__(num_local_experts, config)
        if config.add_bias_linear:
            raise ConfigError("add_bias_linear: grouped experts have no biases; set it to False")
        assert config.moe_ffn_hidden_size is not None, "the config fills it in"
        inner, hidden = config.moe_ffn_hidden_size, config.hidden_size
        place = Place.find(config, is_expert=True)
        parts = 2 if config.gated_linear_unit else 1
        width = place.divide(inner, "moe_ffn_hidden_size")
        self.weight1 = self._empty(hidden, num_local_experts * parts * width, 1)
        self.weight2 = self._empty(num_local_experts * width, hidden, 0)
        first = first_local_expert(config, num_local_experts)
        blocks1 = self.weight1.detach().view(num_local_experts, hidden, parts * width)
        blocks2 = self.weight2.detach().view(num_local_experts, width, hidden)
        second_init = config.output_layer_init_method
        assert config.init_method is not None and second_init is not None, "the config fills them in"
        for index in range(num_local_experts):
            # Drawn as a linear layer draws them, [out, in], so that every layout starts alike.
            with weight_scope("expert", first + index):
                one, _ = new_weight(
                    config, (parts * inner, hidden), 0, config.init_method, place, stride=parts
                )
                two, _ = new_weight(config, (hidden, inner), 1, second_init, place)
            if config.perform_initialization:
                blocks1[index].copy_(one.detach().t())
                blocks2[index].copy_(two.detach().t())

    def _empty(self, rows: int, columns: int, split_dim: int) -> nn.Parameter:
        config = self.config
        weight = nn.Parameter(
            torch.empty(rows, columns, dtype=config.params_dtype, device=accelerator.build_device(config))
        )
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=split_dim, stride=1)
        mark(weight, allreduce=not has_own_replicas(config, is_expert=True))
        return weight

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[r, h] -> [r, h]; arguments as in :class:`SequentialMLP`."""
        rows, probs = self._weigh_input(permuted_local_hidden_states, permuted_probs)
        fusion = self.config.gradient_accumulation_fusion

        def matmul(weight: Tensor, x: Tensor) -> Tensor:
            return grouped_matmul(x, weight, tokens_per_expert, fusion)

        fc1, fc2 = (functools.partial(matmul, weight) for weight in (self.weight1, self.weight2))
        return self._through(rows, probs, fc1, fc2), None


class TEGroupedMLP(_Experts):
    """Two grouped linear layers, with a parameter of its own for every expert: ``linear_fc1.weight0`` ...

    Attributes:
        linear_fc1, linear_fc2: hidden to inner width and back.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, submodules: MLPSubmodules):
        super().__init__(num_local_experts, config)
        inner, hidden = config.moe_ffn_hidden_size, config.hidden_size
        assert inner is not None, "the config fills it in"
        common: dict[str, Any] = {
            "config": config,
            "bias": config.add_bias_linear,
            "skip_bias_add": False,
            "is_expert": True,
        }
        gated = config.gated_linear_unit
        stride = {"stride": 2} if gated and takes_stride(submodules.linear_fc1) else {}
        self.linear_fc1 = build_module(
            submodules.linear_fc1,
            num_local_experts,
            hidden,
            2 * inner if gated else inner,
            init_method=config.init_method,
            tp_comm_buffer_name="fc1",
            **common,
            **stride,
        )
        self.linear_fc2 = build_module(
            submodules.linear_fc2,
            num_local_experts,
            inner,
            hidden,
            init_method=config.output_layer_init_method,
            tp_comm_buffer_name="fc2",
            **common,
        )

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[r, h] -> [r, h]; arguments as in :class:`SequentialMLP`."""
        rows, probs = self._weigh_input(permuted_local_hidden_states, permuted_probs)
        counts = tokens_per_expert.tolist()
        return self._through(
            rows, probs, lambda x: self.linear_fc1(x, counts)[0], lambda x: self.linear_fc2(x, counts)[0]
        ), None


class GroupedLinear(LinearBase):
    """A linear layer for each of ``num_gemms`` groups of rows: parameters ``weight0``, ``weight1`` ...

    Args:
        num_gemms: number of groups.
        input_size, output_size: widths of a whole layer.
        split_dim: dimension of [out, in] that ranks split, or None.
        config: precision, device, expert-parallel sizes.
        init_method: fills a weight.
        bias: must be False.
        skip_bias_add: as in other linear layers; without a bias it changes nothing.
        is_expert: the groups are experts, which have a first value of their own each.
        tp_comm_buffer_name: tells layers of one expert apart that are not split, when weights are drawn.
        stride: parts of the output that are split one by one.
    """

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        split_dim: int | None,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        stride: int = 1,
    ):
        super().__init__(config, (input_size, output_size), skip_bias_add, is_expert)
        if bias:
            raise ConfigError("bias: grouped linear layers have none; set add_bias_linear to False")
        self.num_gemms = num_gemms
        self.bias = None
        self.leave_communication_to_caller()
        first = first_local_expert(config, num_gemms) if is_expert else 0
        place = self.place if split_dim is not None else Place(0, 1, is_expert)
        # An expert's layer split by its input is its second, and draws what it draws in an MLP of its own.
        scope = () if split_dim is not None else (tp_comm_buffer_name,)
        for index in range(num_gemms):
            with weight_scope("expert", first + index, *scope, drawn=int(split_dim == 1)):
                weight, _ = new_weight(
                    config, (output_size, input_size), split_dim, init_method, place, stride=stride
                )
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        """[r, in] -> [r, out] of the part held here; ``m_splits`` are the rows of each group."""
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        if accelerator.is_accelerated():
            return self._in_one_call(x, m_splits, weights), None
        return self._one_by_one(x, m_splits, weights), None

    def _in_one_call(self, x: Tensor, m_splits: list[int], weights: list[Tensor]) -> Tensor:
        """One kernel for all groups, for the price of a copy of the weights."""
        stacked = torch.stack([weight.t() for weight in weights])
        return grouped_matmul(x, stacked, torch.tensor(m_splits), False)

    def _one_by_one(self, x: Tensor, m_splits: list[int], weights: list[Tensor]) -> Tensor:
        parts = [
            self._linear(rows, weight, None, False)
            for rows, weight in zip(x.split(m_splits), weights, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
