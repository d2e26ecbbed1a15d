"""Cross entropy of logits that are split along the vocabulary, against torch in float64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from megatron.core import parallel_state
from megatron.core.collectives import all_reduce
from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy
from megatron.core.fusions import fused_cross_entropy
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from tests.distributed.pool import run_ranks

S, B, V = 6, 3, 32
# dtype -> relative and absolute tolerance of gradients
TOLERANCES = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-2, 1e-3)}


def case(dtype):
    generator = torch.Generator().manual_seed(9)
    logits = (5 * torch.randn(S, B, V, generator=generator)).to(dtype)
    target = torch.randint(V, (S, B), generator=generator)
    target[1, 1] = target[4, 0] = -100  # no loss, no gradient
    return logits, target, torch.randn(S, B, generator=generator)


def reference(logits, target, gradient, smoothing):
    """torch's smoothing gives the target 1 - e + e/V; ours 1 - e' with e' = e V / (V - 1) and e'/V more."""
    leaf = logits.double().clone().requires_grad_()
    torch_smoothing = smoothing * V / (V - 1)
    loss = F.cross_entropy(
        leaf.view(-1, V), target.view(-1), reduction="none", label_smoothing=torch_smoothing
    ).view(S, B)
    loss.backward(gradient.double())
    return loss.detach(), leaf.grad


def compare_losses():
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(ranks)
    calls = []
    real = torch.distributed.all_reduce
    for dtype, smoothing in itertools.product(TOLERANCES, (0.0, 0.1)):
        logits, target, gradient = case(dtype)
        loss, grad = reference(logits, target, gradient, smoothing)
        group = parallel_state.get_tensor_model_parallel_group()
        functions = [lambda x, t, s=smoothing: vocab_parallel_cross_entropy(x, t, s)]
        if not smoothing:
            for same in (fused_cross_entropy.fused_vocab_parallel_cross_entropy, te_parallel_cross_entropy):
                functions.append(functools.partial(same, tp_group=group))
        for function in functions:
            mine = logits.chunk(ranks, -1)[rank].clone().requires_grad_()
            torch.distributed.all_reduce = lambda *a, **k: (calls.append(a[0].shape), real(*a, **k))[1]
            found = function(mine, target)
            torch.distributed.all_reduce = real
            assert found.dtype == torch.promote_types(dtype, torch.float32)
            near = {"rtol": 1e-6, "atol": 2e-6} if dtype != torch.float64 else {}
            torch.testing.assert_close(found.double(), loss, **near)
            found.backward(gradient)
            assert mine.grad.dtype == dtype
            rtol, atol = TOLERANCES[dtype]
            torch.testing.assert_close(mine.grad.double(), grad.chunk(ranks, -1)[rank], rtol=rtol, atol=atol)
    return [tuple(shape) for shape in calls]


@pytest.mark.parametrize("ranks", [2, 4])
def test_against_torch(ranks):
    rows = S * B
    plain, smoothed = [(rows,), (2, rows)], [(rows,), (3, rows)]
    for calls in run_ranks(ranks, compare_losses):
        assert calls == (plain * 3 + smoothed) * 3  # two exchanges a loss, no more


def step_by_step():
    """The published steps of the fused form, with the two reductions between them."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    logits, target, gradient = case(torch.float32)
    target = target.clamp(min=0)
    loss, grad = reference(logits, target, gradient, 0.0)
    wide, top = fused_cross_entropy.calculate_logits_max(logits.chunk(ranks, -1)[rank])
    all_reduce(top, group, torch.distributed.ReduceOp.MAX)
    share = V // ranks
    mask, local, sums, exponentials = fused_cross_entropy.calculate_predicted_logits(
        wide, target, top, rank * share, (rank + 1) * share
    )
    all_reduce(sums, group)
    softmax, found = fused_cross_entropy.calculate_cross_entropy_loss(exponentials, sums)
    torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=2e-6)
    found = fused_cross_entropy.calculate_gradients(softmax, gradient, mask, local)
    torch.testing.assert_close(found.double(), grad.chunk(ranks, -1)[rank], rtol=1e-5, atol=1e-6)


def test_steps_of_the_fused_form():
    run_ranks(2, step_by_step)


def foreign_target():
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    try:
        vocab_parallel_cross_entropy(torch.zeros(2, 1, V // 2), torch.tensor([[0], [V]]))
    except Exception as error:
        return str(error)
    return "accepted"


def test_foreign_targets_are_refused():
    for message in run_ranks(2, foreign_target):
        assert message.startswith(f"target id {V} is beyond the {V} logits")
