"""A layer of experts holds copies of tokens for the experts that they go to, never for all experts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

TOKENS, EXPERTS, TOPK, HIDDEN, WIDTH = 512, 64, 6, 32, 8
ROWS = TOKENS * TOPK
KINDS = {
    "sequential": {"use_te": False},
    "grouped": {"use_te": False, "moe_grouped_gemm": True},
    "te-grouped": {"use_te": True, "moe_grouped_gemm": True},
}
CAPACITIES = {
    "dropless": {},
    "drop": {"moe_expert_capacity_factor": 1.0},
    "pad": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
}


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that a result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def layer(kind, capacity, dispatcher):
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_ffn_hidden_size=WIDTH,
        moe_grouped_gemm=kind != "sequential",
        moe_token_dispatcher_type=dispatcher,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=0.01,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        **CAPACITIES[capacity],
    )
    made = build_module(get_moe_module_spec(num_experts=EXPERTS, **KINDS[kind]), config)
    made.set_layer_number(1)
    return made


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_larger_than_the_rows_of_the_chosen_experts(kind, capacity, dispatcher) -> None:
    experts = layer(kind, capacity, dispatcher)
    x = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    with LargestTensor() as seen:
        output, _ = experts(x)
        output.square().sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in experts.parameters())
    # All weights and all [tokens, experts] tensors are smaller; a buffer of all pairs is 64 / 6 as large.
    assert seen.elements == ROWS * HIDDEN if capacity != "drop" else seen.elements <= ROWS * HIDDEN
    assert ROWS * HIDDEN < TOKENS * EXPERTS * HIDDEN / 10
