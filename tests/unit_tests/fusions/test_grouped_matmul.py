"""A product per expert against a loop in fp64, and all points of a layer of experts against transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import accelerator
from megatron.core.errors import ConfigError
from megatron.core.fusions import matmul as module
from megatron.core.fusions.experts import permute_tokens, topk_routing, unpermute_tokens
from megatron.core.fusions.matmul import grouped_matmul
from tests.reference_models import load_transformers

COUNTS = torch.tensor([3, 0, 6, 1])
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop(x: Tensor, weight: Tensor) -> Tensor:
    blocks = weight.reshape(len(COUNTS), x.shape[1], -1)
    return torch.cat([rows @ block for rows, block in zip(x.split(COUNTS.tolist()), blocks, strict=True)])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def both(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Result and gradients, found and wanted."""
    x, weight = (t.requires_grad_() for t in (drawn(10, 8, dtype=dtype), drawn(*shape, dtype=dtype, seed=2)))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    results = []
    for out, leaves in ((grouped_matmul(x, weight, COUNTS, False), [x, weight]), (loop(*exact), exact)):
        factors = drawn(*out.shape, seed=3).to(out)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, factors)])
    return results[0], results[1]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(4, 8, 16), (8, 64), (32, 16)])
def test_a_product_per_expert(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Both parameters of Megatron's grouped experts are such blocks: [h, E f] and [E f, h]."""
    for found, wanted in zip(*both(dtype, shape), strict=True):
        assert found.shape == wanted.shape and found.dtype == dtype
        assert relative(found, wanted) < BOUNDS[dtype]


def test_half_precision_is_computed_in_what_the_cpu_multiplies_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "matmul_compute_dtype", lambda dtype, device=None: torch.float32)
    for found, wanted in zip(*both(torch.bfloat16, (4, 8, 16)), strict=True):
        assert found.dtype == torch.bfloat16 and relative(found, wanted) < BOUNDS[torch.bfloat16]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no product of all experts")
def test_one_call_for_all_experts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves bf16 on accelerators, here with the kernel that torch has for a CPU."""
    aligned = module._is_aligned
    calls = []
    kernel = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    monkeypatch.setattr(module, "_has_one_call", lambda *operands: all(map(aligned, operands)))
    for found, wanted in zip(*both(torch.bfloat16, (4, 8, 16)), strict=True):
        assert relative(found, wanted) < BOUNDS[torch.bfloat16]
    assert len(calls) == 3
    main_grad, x, grad = torch.zeros(4, 8, 16), drawn(10, 8).bfloat16(), drawn(10, 16, seed=3).bfloat16()
    module.accumulate_grouped_weight_gradient(x, grad, COUNTS, main_grad)
    parts = zip(x.double().split(COUNTS.tolist()), grad.double().split(COUNTS.tolist()), strict=True)
    assert relative(main_grad, torch.stack([a.t() @ b for a, b in parts])) < BOUNDS[torch.bfloat16]
    assert len(calls) == 4
    module.grouped_mm(drawn(10, 7).bfloat16(), drawn(4, 7, 16).bfloat16(), COUNTS)
    assert len(calls) == 4  # rows that begin anywhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_goes_to_main_grad_where_asked(dtype: torch.dtype) -> None:
    x, weight = drawn(10, 8, dtype=dtype), torch.nn.Parameter(drawn(8, 64, dtype=dtype, seed=2))
    factors = drawn(10, 16, dtype=dtype, seed=3)
    grouped_matmul(x, weight, COUNTS, True).backward(factors)  # no main_grad: as ever
    plain, weight.grad = weight.grad, None
    assert not hasattr(weight, "grad_added_to_main_grad")
    weight.main_grad = torch.full(weight.shape, 0.5)
    for _ in range(2):
        grouped_matmul(x, weight, COUNTS, True).backward(factors)
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, 0.5 + plain.float() + plain.float(), rtol=0, atol=1e-6)


def test_a_frozen_weight_has_no_gradient() -> None:
    x, weight = drawn(10, 8).requires_grad_(), drawn(4, 8, 16)
    weight.main_grad = torch.zeros(4, 8, 16)
    grouped_matmul(x, weight, COUNTS, True).sum().backward()
    assert x.grad is not None and not weight.main_grad.any()


def test_matmul_of_no_rows_has_zero_gradients() -> None:
    x, weight = drawn(0, 8).requires_grad_(), drawn(4, 8, 16).requires_grad_()
    out = grouped_matmul(x, weight, torch.zeros(4, dtype=torch.int64), False)
    out.sum().backward()
    assert out.shape == (0, 16) and x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(4, 8, 16, dtype=torch.float64))


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="is not 4 blocks of 8 rows"):
        grouped_matmul(drawn(10, 8), drawn(5, 7), COUNTS, False)
    with pytest.raises(ConfigError, match="11 rows, but 10 tokens"):
        grouped_matmul(drawn(11, 8), drawn(4, 8, 16), COUNTS, False)


@pytest.mark.parametrize("weights_inside", [True, False])
@pytest.mark.parametrize("topk", [1, 2])
def test_a_layer_of_experts_is_that_of_mixtral(topk: int, weights_inside: bool) -> None:
    """Routing weights multiply what is between the two products, or the rows when they are summed up."""
    load_transformers()
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=24, intermediate_size=40, num_local_experts=6, num_experts_per_tok=topk,
        router_jitter_noise=0.0,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config)
    for number, parameter in enumerate(block.parameters()):
        parameter.data = 0.3 * drawn(*parameter.shape, seed=number).float()
    with torch.no_grad():
        block.gate.weight[4] = 0.0  # few tokens go there
    x = drawn(3, 7, 24).float().requires_grad_()
    leaves = [x, *block.parameters()]
    wanted = block(x)

    tokens = x.view(-1, 24)
    weights, experts = topk_routing(tokens @ block.gate.weight.t(), topk)
    probs = weights.new_zeros(len(tokens), 6).scatter(1, experts, weights)
    chosen = torch.zeros(probs.shape, dtype=torch.bool).scatter_(1, experts, True)
    counts = chosen.sum(0)
    rows, row_probs, where = permute_tokens(tokens, chosen, probs, topk, None)
    first = block.experts.gate_up_proj.transpose(1, 2).contiguous()
    second = block.experts.down_proj.transpose(1, 2).contiguous()
    gate, up = grouped_matmul(rows, first, counts, False).chunk(2, dim=-1)
    inner = F.silu(gate) * up
    if weights_inside:
        inner = inner * row_probs.unsqueeze(1)
    rows = grouped_matmul(inner, second, counts, False)
    found = unpermute_tokens(rows, where, chosen, None if weights_inside else probs, topk, None).view(x.shape)

    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    factors = drawn(*x.shape, seed=9).float()
    for one, other in zip(
        torch.autograd.grad(found, leaves, factors),
        torch.autograd.grad(wanted, leaves, factors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
