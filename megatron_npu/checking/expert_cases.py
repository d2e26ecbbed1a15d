"""Calls of the parts of a layer of experts."""

from typing import Any

import torch
from torch import Tensor

from megatron.core import overrides
from megatron_npu.checking.case import Call, Case, Draw

_PERMUTE = "megatron.core.fusions.experts.permute_tokens"
_UNPERMUTE = "megatron.core.fusions.experts.unpermute_tokens"
_GATING = "megatron.core.fusions.experts.topk_routing"
_MATMULS = "megatron.core.fusions.matmul."


def _ranks(draw: Draw, rows: int, columns: int) -> Tensor:
    """int64 0..columns-1 in every row, in random order."""
    return draw.normal(rows, columns).argsort(-1).argsort(-1)


# --- choice -------------------------------------------------------------------------------------------------


def _routing(experts: int = 16, topk: int = 4, bias: bool = False, **settings: Any) -> Any:
    """Logits are far enough apart for every type to choose the same experts."""

    def make(draw: Draw) -> Call:
        logits = _ranks(draw, 9, experts).double() * (4.0 / experts) - 2.0
        expert_bias = (0.1 * draw.normal(experts)).float() if bias else None
        return Call((logits, topk), settings | {"expert_bias": expert_bias}, wanted=(0,))

    return make


def _dense_weights(result: tuple[Tensor, Tensor], call: Call) -> list[Tensor]:
    """[t, E]: the order of a token's experts does not matter."""
    weights, experts = result
    return [weights.new_zeros(call.args[0].shape).scatter(1, experts, weights)]


_ROUTINGS = {
    "softmax of the chosen": _routing(),
    "softmax of the chosen, one expert": _routing(topk=1),
    "softmax of the chosen, 2 of 4 groups": _routing(topk=2, num_groups=4, group_topk=2),
    "softmax of all": _routing(pre_softmax=True, scaling_factor=2.5),
    "softmax of all, 2 of 4 groups": _routing(pre_softmax=True, num_groups=4, group_topk=2),
    "sigmoid": _routing(score_function="sigmoid"),
    "sigmoid, bias, 2 of 4 groups": _routing(
        score_function="sigmoid", bias=True, num_groups=4, group_topk=2, scaling_factor=2.5
    ),
    "sigmoid, bias, 4 of 4 groups": _routing(score_function="sigmoid", bias=True, num_groups=4, group_topk=4),
}

# --- order --------------------------------------------------------------------------------------------------


def _map(draw: Draw, topk: int | None, capacity: int | None, tokens: int = 10, experts: int = 6) -> Tensor:
    """With a top-k, no token chooses expert 2."""
    if topk is None:
        assert capacity is not None
        return _ranks(draw, experts, tokens).t() < capacity
    scores = draw.normal(tokens, experts)
    scores[:, 2] = -9.0
    return scores.argsort(-1).argsort(-1) >= experts - topk


def _permute(topk: int | None, capacity: int | None, with_probs: bool, narrow: bool = True) -> Any:
    def make(draw: Draw) -> Call:
        routing_map = _map(draw, topk, capacity)
        probs = draw.positive(*routing_map.shape) if with_probs else None
        if probs is not None and not narrow:
            probs = probs.float()
        wanted = (0, 2) if with_probs else (0,)
        return Call((draw.normal(len(routing_map), 24), routing_map, probs, topk, capacity), wanted=wanted)

    return make


def _rows_and_places(result: tuple[Tensor, Tensor | None, Tensor], call: Call) -> list[Tensor]:
    """Places are compared as well; a result that is not a function of the tokens cannot be."""
    rows, row_probs, where = result
    places = where.to(rows.dtype) + 0.0 * rows.sum()
    return [rows, places] if row_probs is None else [rows, row_probs, places]


def _unpermute(topk: int | None, capacity: int | None, with_probs: bool, narrow: bool = True) -> Any:
    def make(draw: Draw) -> Call:
        routing_map = _map(draw, topk, capacity)
        tokens = draw.normal(len(routing_map), 24)
        permute = overrides.default_of(_PERMUTE)
        rows, _, where = permute(tokens, routing_map, None, topk, capacity)
        probs = draw.positive(*routing_map.shape) if with_probs else None
        if probs is not None and not narrow:
            probs = probs.float()
        wanted = (0, 3) if with_probs else (0,)
        args = (draw.normal(*rows.shape), where, routing_map, probs, topk, capacity)
        return Call(args, wanted=wanted)

    return make


_ORDERS: dict[str, dict[str, Any]] = {
    "3 experts a token": dict(topk=3, capacity=None, with_probs=False),
    "3 experts a token, weights": dict(topk=3, capacity=None, with_probs=True),
    "1 expert a token, weights": dict(topk=1, capacity=None, with_probs=True),
    "4 tokens an expert": dict(topk=None, capacity=4, with_probs=False),
    "4 tokens an expert, weights": dict(topk=None, capacity=4, with_probs=True),
}
_WIDE_WEIGHTS: dict[str, Any] = dict(topk=3, capacity=None, with_probs=True, narrow=False)

# --- products -----------------------------------------------------------------------------------------------

_COUNTS = torch.tensor([5, 0, 12, 1])
_ROWS = int(_COUNTS.sum())


def _product(transposed: bool) -> Any:
    def make(draw: Draw) -> Call:
        return Call((draw.normal(_ROWS, 24), draw.normal(len(_COUNTS), 24, 16), _COUNTS))

    def make_transposed(draw: Draw) -> Call:
        weight = draw.normal(len(_COUNTS), 16, 24).transpose(1, 2)
        return Call((draw.normal(_ROWS, 24), weight, _COUNTS))

    return make_transposed if transposed else make


def _gradient(draw: Draw) -> Call:
    return Call((draw.normal(_ROWS, 24), draw.normal(_ROWS, 16), _COUNTS))


def _accumulated(draw: Draw) -> Call:
    main_grad = draw.normal(len(_COUNTS), 24, 16).float()
    return Call((*_gradient(draw).args, main_grad))


EXPERT_CASES = [
    *(Case(_GATING, name, make, _dense_weights, pinned=True) for name, make in _ROUTINGS.items()),
    *(Case(_PERMUTE, name, _permute(**settings), _rows_and_places) for name, settings in _ORDERS.items()),
    Case(
        _PERMUTE,
        "fp32 weights",
        _permute(**_WIDE_WEIGHTS),
        _rows_and_places,
        dtypes=(torch.bfloat16,),
    ),
    *(Case(_UNPERMUTE, name, _unpermute(**settings)) for name, settings in _ORDERS.items()),
    Case(_UNPERMUTE, "fp32 weights", _unpermute(**_WIDE_WEIGHTS), dtypes=(torch.bfloat16,)),
    Case(_MATMULS + "grouped_mm", "an expert without rows", _product(False)),
    Case(_MATMULS + "grouped_mm", "transposed weights", _product(True)),
    Case(_MATMULS + "grouped_weight_gradient", "an expert without rows", _gradient),
    Case(
        _MATMULS + "accumulate_grouped_weight_gradient",
        "an expert without rows",
        _accumulated,
        lambda result, call: [call.args[3]],
        pinned=True,
    ),
]
