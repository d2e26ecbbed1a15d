"""The virtual NPU as a device of torch, before any training."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_npu.virtual.operators import CALLS

DEVICE = "npu:0"


def test_torch_sees_devices() -> None:
    assert torch.npu.is_available() and torch.npu.device_count() == 2
    assert torch.accelerator.current_accelerator().type == "npu"
    assert torch.npu.get_device_name(0) == "Ascend910B2"
    assert torch.distributed.get_default_backend_for_device("npu") == "hccl"


def both(function, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Holds a function and its gradients on the NPU to those on the CPU."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def run(device: str) -> list[Tensor]:
        leaves = [t.to(device).requires_grad_() for t in drawn]
        result = function(*leaves)
        assert result.device.type == torch.device(device).type
        factors = torch.linspace(-1, 1, result.numel(), device=device).view(result.shape)
        (result * factors).sum().backward()
        return [t.detach().cpu() for t in (result, *(leaf.grad for leaf in leaves))]

    for found, wanted in zip(run(DEVICE), run("cpu"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def shown_to(q: Tensor) -> Tensor:
    """What each query sees: a band with an edge of its own."""
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(2).triu(-3)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch.matmul, [(5, 2, 8), (8, 3)]),
        (torch.matmul, [(4, 5, 6), (4, 6, 3)]),
        (torch.matmul, [(2, 1, 5, 6), (3, 6, 4)]),
        (torch.matmul, [(6,), (6, 3)]),
        (torch.matmul, [(2, 5, 6), (6,)]),
        (torch.matmul, [(6,), (6,)]),
        (F.linear, [(5, 2, 8), (3, 8), (3,)]),
        (lambda x, w, b: F.layer_norm(x, (8,), w, b), [(5, 8), (8,), (8,)]),
        (lambda x: F.gelu(x, approximate="tanh"), [(5, 8)]),
        (lambda x: x.transpose(0, 1)[1:].softmax(-1), [(5, 8)]),
        (lambda x: torch.cat(x.split(2, dim=1)[::-1], dim=1).cumsum(0), [(5, 8)]),
        (lambda x: F.cross_entropy(x, torch.arange(5, device=x.device), reduction="none"), [(5, 8)]),
        (lambda w: F.embedding(torch.tensor([[1, 1], [0, 3]], device=w.device), w), [(5, 8)]),
        (lambda x: x[torch.tensor([2, 0, 2], device=x.device)], [(5, 8)]),
        (lambda x: x.repeat_interleave(3), [(5, 2)]),
        (lambda x: x.repeat_interleave(3, dim=-2), [(4, 5, 2)]),
        (lambda x: x.repeat_interleave(torch.tensor([2, 0, 1], device=x.device), dim=0), [(3, 2)]),
        (lambda x: x.masked_fill(x > 0, -3.0).logsumexp(0), [(5, 8)]),
        (F.scaled_dot_product_attention, [(2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)]),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 3, 7, 8)] * 3),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, shown_to(q), scale=0.2), [(2, 3, 7, 8)] * 3),
    ],
)  # fmt: skip
def test_operations_and_their_gradients_are_those_of_the_cpu(function, shapes) -> None:
    both(function, *shapes)


def test_attention_of_torch_goes_through_ascends_operator() -> None:
    x = torch.randn(2, 3, 8, 16, device=DEVICE, requires_grad=True)
    names = ("npu_fusion_attention_v3", "npu_fusion_attention_grad_v3")
    before = [CALLS[name] for name in names]

    def gradient() -> Tensor:
        torch.npu.manual_seed(1)
        return torch.autograd.grad(F.scaled_dot_product_attention(x, x, x, dropout_p=0.5).square().sum(), x)[
            0
        ]

    torch.testing.assert_close(gradient(), gradient())
    assert [CALLS[name] for name in names] == [count + 2 for count in before]
    step = 1e-2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    with torch.no_grad():
        values = []
        for moved in (x + step, x - step):
            torch.npu.manual_seed(1)
            attended = F.scaled_dot_product_attention(moved, moved, moved, dropout_p=0.5)
            values.append(attended.double().square().sum().item())
    assert values[0] - values[1] == pytest.approx(2 * (gradient() * step).sum().item(), rel=1e-2)


def test_lengths_of_documents_are_tensors_of_the_host_in_the_third_version() -> None:
    import torch_npu

    q, k, v = (torch.randn(9, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    ends = torch.tensor([4, 9])
    lengths = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    whole = torch_npu.npu_fusion_attention_v3(q, k, v, 2, "TND", scale=0.25, **lengths)[0]
    found = [whole, *torch.autograd.grad(whole.square().sum(), (q, k, v))]
    parts = []
    for span in (slice(0, 4), slice(4, 9)):
        operands = [t[span].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*operands, scale=0.25)[0].transpose(0, 1))
    apart = torch.cat(parts)
    wanted = [apart, *torch.autograd.grad(apart.square().sum(), (q, k, v))]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_torch_npu_answers_above_its_kernels_has_one_too() -> None:
    shown = torch.eye(3, dtype=torch.bool, device=DEVICE)
    shown |= torch.tensor([False, True, False], device=DEVICE)
    assert shown.int().tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 1]]
    bits = torch.tensor([1, 4], device=DEVICE)
    bits |= 6
    assert bits.tolist() == [7, 6]
    assert [t.tolist() for t in torch.where(shown)] == [[0, 0, 1, 2, 2], [0, 1, 1, 1, 2]]
    assert torch.tensor([2.0, 0.0, 1.0], device=DEVICE).argsort().tolist() == [1, 2, 0]
    assert F.one_hot(torch.tensor([1, 0], device=DEVICE)).tolist() == [[0, 1], [1, 0]]


def test_products_of_half_precision_are_summed_in_fp32() -> None:
    ones = torch.ones(1, 4096, dtype=torch.float16, device=DEVICE)
    tenths = torch.full((4096, 1), 0.1, dtype=torch.float16, device=DEVICE)
    # 4096 times the fp16 number next to 0.1, rounded to fp16
    assert (ones @ tenths).item() == 409.5


def test_what_a_call_writes_is_on_the_device() -> None:
    t = torch.zeros(4, 6, device=DEVICE)
    t[:, 1::2].add_(2.0).mul_(torch.arange(3.0, device=DEVICE))
    torch.add(t, 1.0, out=t[:])
    torch._foreach_mul_([t, t[0]], 2.0)
    assert t[1].tolist() == [2, 2, 2, 6, 2, 10] and t[0].tolist() == [4, 4, 4, 12, 4, 20]
    grown = torch.empty(0, device=DEVICE)
    torch.cat([t, t], out=grown)
    assert grown.shape == (8, 6) and torch.equal(grown[4:], t)
    assert torch.equal(t.to("npu:1").cpu(), t.cpu())


def test_operands_of_two_devices_are_refused() -> None:
    t = torch.ones(3, device=DEVICE)
    for other in (torch.ones(3), torch.ones(3, device="npu:1")):
        with pytest.raises(RuntimeError, match="expected all tensors on npu:0"):
            t + other
    assert (t + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert t[torch.tensor([0, 2])].shape == (2,)


def test_a_seed_gives_the_numbers_of_the_cpu_first() -> None:
    torch.npu.manual_seed(5)
    found = torch.empty(20, device=DEVICE).normal_()
    assert torch.equal(found.cpu(), torch.empty(20).normal_(generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(torch.empty(20, device=DEVICE).normal_(), found)


def test_a_saved_state_replays_draws() -> None:
    ones = torch.ones(64, device=DEVICE)

    def draw() -> list[Tensor]:
        order = torch.randperm(9, device=DEVICE)
        return [t.cpu() for t in (torch.randn(3, device=DEVICE), F.dropout(ones, 0.5), order)]

    state = torch.npu.get_rng_state()
    first, second = draw(), draw()
    torch.npu.set_rng_state(state)
    for found, wanted, later in zip(draw(), first, second, strict=True):
        assert torch.equal(found, wanted) and not torch.equal(wanted, later)


def run_experts(device: str, topk: int | None, capacity: int | None) -> list[Tensor]:
    """Result and gradients of choosing experts, going there, a product each, and coming back."""
    from megatron.core.fusions.experts import permute_tokens, topk_routing, unpermute_tokens
    from megatron.core.fusions.matmul import grouped_matmul

    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randn(shape, generator=generator) for shape in ((10, 16), (16, 6), (6, 16, 24))]
    tokens, router, weight = (t.to(device).requires_grad_() for t in drawn)
    weights, experts = topk_routing(tokens @ router, 2, "sigmoid", num_groups=2, group_topk=1)
    probs = weights.new_zeros(10, 6).scatter(1, experts, weights)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, experts, True)
    if capacity is not None:
        order = probs.sort(dim=0, descending=True, stable=True).indices
        chosen = torch.zeros_like(chosen).scatter_(0, order[:capacity], True)
    rows, row_probs, where = permute_tokens(tokens, chosen, probs, topk, capacity)
    rows = grouped_matmul(rows * row_probs.unsqueeze(1), weight, chosen.sum(0), False)
    out = unpermute_tokens(rows, where, chosen, probs, topk, capacity)
    out.square().sum().backward()
    return [t.detach().cpu() for t in (out, tokens.grad, router.grad, weight.grad)]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(("topk", "capacity"), [(2, None), (None, None), (None, 3)])
def test_tokens_go_to_experts_and_back(topk: int | None, capacity: int | None, replaced: bool) -> None:
    """By the defaults, for which torch_npu must have every kernel, and by Ascend's operators."""
    import megatron_npu
    from megatron.core import overrides

    megatron_npu.activate()
    try:
        overrides.disable("all")
        wanted = run_experts("cpu", topk, capacity)
        if replaced:
            overrides.enable_all()
        before = CALLS["npu_grouped_matmul"]
        found = run_experts(DEVICE, topk, capacity)
        assert (CALLS["npu_grouped_matmul"] > before) == replaced
    finally:
        overrides.enable_all()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_recomputed_attention_drops_the_same() -> None:
    import torch_npu

    def attention(x: Tensor) -> Tensor:
        return torch_npu.npu_fusion_attention(x, x, x, 2, "SBH", scale=0.5, keep_prob=0.5)[0]

    x = torch.randn(8, 1, 16, device=DEVICE, requires_grad=True)
    torch.npu.manual_seed(1)
    (wanted,) = torch.autograd.grad(attention(x).square().sum(), x)
    torch.npu.manual_seed(1)
    (found,) = torch.autograd.grad(checkpoint(attention, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(found, wanted)


def test_dropout_keeps_its_share_and_its_mean() -> None:
    x = torch.ones(20_000, device=DEVICE, requires_grad=True)
    y = F.dropout(x, 0.25)
    y.sum().backward()
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(F.dropout(x, 0.25, training=False), x)


def test_memory_is_counted() -> None:
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    t = torch.ones(1 << 20, device=DEVICE)
    assert 0 <= torch.accelerator.memory_allocated() - before - t.nbytes <= 1024
    del t
    assert torch.accelerator.memory_allocated() == before
    assert torch.accelerator.max_memory_allocated() - before >= 4 << 20
    assert torch.npu.mem_get_info()[1] == 64 << 30


def test_streams_and_events() -> None:
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.npu.stream(torch.npu.Stream()):
        result = torch.ones(300, 300, device=DEVICE).matmul(torch.ones(300, 300, device=DEVICE))
    end.record()
    torch.npu.synchronize()
    assert start.elapsed_time(end) > 0 and result[0, 0].item() == 300


def test_tensors_are_saved_and_loaded(tmp_path) -> None:
    torch.save(torch.arange(5.0, device="npu:1"), tmp_path / "t")
    assert torch.load(tmp_path / "t").device == torch.device("npu:1")
    assert torch.load(tmp_path / "t", map_location="cpu").tolist() == [0, 1, 2, 3, 4]


def test_ascends_operators_are_counted_or_refused() -> None:
    import torch_npu

    before = CALLS["npu_rms_norm"]
    torch_npu.npu_rms_norm(torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE))
    assert CALLS["npu_rms_norm"] == before + 1
    with pytest.raises(NotImplementedError, match="npu_sign_bits_pack"):
        torch_npu.npu_sign_bits_pack(torch.ones(8, device=DEVICE), 1)
