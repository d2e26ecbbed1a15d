"""Experts behind their dispatcher, on one rank and on several, with a routing that is given."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import DISPATCHERS
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

EXPERTS, TOPK, HIDDEN, WIDTH = 8, 2, 12, 16
TOKENS = 24  # of all ranks, which divides among 1, 2 and 4 of them
KINDS = {
    "sequential": {"use_te": False},
    "grouped": {"use_te": False, "moe_grouped_gemm": True},
    "te-grouped": {"use_te": True, "moe_grouped_gemm": True},
}


@dataclass(frozen=True)
class Case:
    """How experts are spread and asked for.

    Attributes:
        tp, ep, etp: sizes of tensor, expert and expert tensor parallelism.
        dispatcher: value of ``moe_token_dispatcher_type``.
        kind: layout of the experts.
        routing: "dropless"; "drop": some tokens lose experts; "pad": all experts have their capacity.
        fields: other fields of the config.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1
    dispatcher: str = "alltoall"
    kind: str = "sequential"
    routing: str = "dropless"
    fields: tuple = ()

    def config(self):
        capacity = {
            "dropless": {},
            "drop": {"moe_expert_capacity_factor": 1.0},
            "pad": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        }
        return TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            num_moe_experts=EXPERTS,
            moe_router_topk=TOPK,
            moe_ffn_hidden_size=WIDTH,
            moe_grouped_gemm=self.kind != "sequential",
            moe_token_dispatcher_type=self.dispatcher,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            params_dtype=torch.float64,
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.tp > 1,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            init_method_std=0.3,
            **capacity[self.routing],
            **dict(self.fields),
        )


def routing(case, ranks):
    """Weights and map of all tokens, [TOKENS, EXPERTS]; capacities count the tokens of each rank apart."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    scores[:, 1] *= 0.3  # some experts get few tokens, and on some ranks none
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(TOPK).indices, True)
    if case.routing == "drop":
        chosen &= torch.rand(TOKENS, EXPERTS, generator=generator) > 0.3
    probs = scores * chosen
    if case.routing == "pad":
        capacity = math.ceil(TOKENS / ranks * TOPK / EXPERTS)
        padded = torch.zeros_like(chosen)
        for part in range(ranks):
            rows = slice(part * TOKENS // ranks, (part + 1) * TOKENS // ranks)
            best = probs[rows].topk(capacity, dim=0).indices
            padded[rows] = padded[rows].scatter(0, best, True)
        chosen, probs = padded, probs * padded
    return probs, chosen


def tokens():
    return torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def wanted():
    return torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def rows_of(rank, ranks):
    return slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)


def build(case):
    """Experts and their dispatcher in the world that exists."""
    config = case.config()
    model_parallel_cuda_manual_seed(11)
    rank = parallel_state.get_expert_model_parallel_rank() if case.ep > 1 else 0
    local = EXPERTS // case.ep
    spec = get_moe_module_spec(num_experts=EXPERTS, **KINDS[case.kind]).submodules
    experts = build_module(spec.experts, local, config)
    indices = list(range(rank * local, (rank + 1) * local))
    return experts, DISPATCHERS[case.dispatcher](local, indices, config)


def run(case, rank=0, ranks=1, routed_for=1):
    """Output, gradient of the tokens and of the weights, for one rank's share of the tokens; the experts."""
    experts, dispatcher = build(case)
    mine = rows_of(rank, ranks)
    x = tokens()[mine].clone().requires_grad_()
    probs, chosen = (each[mine].clone() for each in routing(case, routed_for))
    probs.requires_grad_()
    rows, counts, row_probs = dispatcher.token_permutation(x, probs, chosen)
    assert int(counts.sum()) == len(rows) == len(row_probs)
    results, bias = experts(rows, counts, row_probs)
    output, bias = dispatcher.token_unpermutation(results, bias)
    assert bias is None
    output.backward(wanted()[mine])
    return output.detach(), x.grad, probs.grad, experts


def whole_weights(experts, config, of=lambda parameter: parameter):
    """Per local expert, fc1 [2, parts, h, ...] as rows of gate and of up, and fc2; from this rank's part."""
    hidden, local = config.hidden_size, experts.num_local_experts
    if hasattr(experts, "weight1"):
        one = of(experts.weight1).view(local, hidden, -1).transpose(1, 2)
        two = of(experts.weight2).view(local, -1, hidden).transpose(1, 2)
    elif hasattr(experts, "local_experts"):
        one = torch.stack([of(e.linear_fc1.weight) for e in experts.local_experts])
        two = torch.stack([of(e.linear_fc2.weight) for e in experts.local_experts])
    else:
        one = torch.stack([of(getattr(experts.linear_fc1, f"weight{i}")) for i in range(local)])
        two = torch.stack([of(getattr(experts.linear_fc2, f"weight{i}")) for i in range(local)])
    return one, two


def cut(one, two, case):
    """This rank's part of the weights (or gradients) of all experts."""
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    part = parallel_state.get_expert_tensor_parallel_rank()
    local = EXPERTS // case.ep
    mine = slice(ep_rank * local, (ep_rank + 1) * local)
    gate, up = one[mine].chunk(2, dim=1)
    one = torch.cat([gate.chunk(case.etp, 1)[part], up.chunk(case.etp, 1)[part]], dim=1)
    return one, two[mine].chunk(case.etp, 2)[part]


def compare(case):
    """On every rank: the names of what differs from one rank's run."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(1)
    alone = Case(1, 1, 1, case.dispatcher, case.kind, case.routing, case.fields)
    if case.routing == "pad":
        # One rank alone would have one capacity for all tokens: it takes each rank's share by itself.
        shares = [run(alone, each, ranks, ranks) for each in range(ranks)]
        output, grad_x, grad_probs = (torch.cat([share[i] for share in shares]) for i in range(3))
        gradients = [
            whole_weights(share[3], alone.config(), lambda parameter: parameter.grad) for share in shares
        ]
        whole_gradients = [sum(each) for each in zip(*gradients, strict=True)]
        whole = whole_weights(shares[0][3], alone.config(), lambda parameter: parameter.detach())
    else:
        output, grad_x, grad_probs, experts = run(alone)
        whole_gradients = whole_weights(experts, alone.config(), lambda parameter: parameter.grad)
        whole = whole_weights(experts, alone.config(), lambda parameter: parameter.detach())
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        case.tp, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp
    )
    found, found_x, found_probs, experts = run(case, rank, ranks, ranks)
    replicas = parallel_state.get_expert_data_parallel_group()
    for parameter in experts.parameters():
        dist.all_reduce(parameter.grad, group=replicas)
    mine = rows_of(rank, ranks)
    pairs = {
        "output": (found, output[mine]),
        "gradient of tokens": (found_x, grad_x[mine]),
        "gradient of weights of the routing": (found_probs, grad_probs[mine]),
    }
    for name, of, expected in (
        ("weights", lambda parameter: parameter.detach(), whole),
        ("gradients", lambda parameter: parameter.grad, whole_gradients),
    ):
        for number, (got, want) in enumerate(
            zip(whole_weights(experts, case.config(), of), cut(*expected, case), strict=True), start=1
        ):
            pairs[f"{name} of fc{number}"] = (got, want)
    return [
        f"{name}: {(got - want).abs().max():.2e}"
        for name, (got, want) in pairs.items()
        if not torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    ]
