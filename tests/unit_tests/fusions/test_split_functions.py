"""Replaceable functions over the ranks of a group, against one rank's result in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron.core.errors import DataError
from megatron.core.fusions.fused_cross_entropy import split_cross_entropy
from megatron.core.fusions.matmul import all_gather_matmul, matmul_reduce_scatter
from tests.distributed.pool import run_ranks

RANKS, ROWS, K, N = 2, 4, 6, 5


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products():
    rank, group = dist.get_rank(), dist.group.WORLD
    x, matrix = drawn(RANKS, ROWS, K), drawn(K, N, seed=1)
    out, whole = all_gather_matmul(x[rank], matrix, group, True)
    assert torch.equal(whole, x.flatten(0, 1))
    torch.testing.assert_close(out, x.flatten(0, 1) @ matrix)
    again, nothing = all_gather_matmul(x[rank], drawn(N, K, seed=1).t(), group, False)
    assert nothing is None
    torch.testing.assert_close(again, x.flatten(0, 1) @ drawn(N, K, seed=1).t())
    summed = matmul_reduce_scatter(x[rank], matrix, group)
    torch.testing.assert_close(summed, (x.sum(0) @ matrix).chunk(RANKS)[rank])


def test_products_with_their_traffic():
    run_ranks(RANKS, products)


COLUMNS = 8  # of all ranks


def losses(smoothing):
    """Loss and gradient of this rank's columns, for targets in both halves and one that does not count."""
    rank = dist.get_rank()
    logits = 3 * drawn(6, COLUMNS)
    target = torch.tensor([0, 7, 3, 4, -1, 5])
    mine = logits.chunk(RANKS, -1)[rank].clone().requires_grad_()
    loss = split_cross_entropy(mine, target, smoothing, dist.group.WORLD)
    loss.backward(drawn(6, seed=3))
    return loss.detach(), mine.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_over_two_ranks(smoothing):
    logits = (3 * drawn(6, COLUMNS)).requires_grad_()
    target = torch.tensor([0, 7, 3, 4, -1, 5])
    # torch gives every class smoothing / classes; here the other classes share the smoothing.
    wanted = F.cross_entropy(
        logits, target, reduction="none", ignore_index=-1, label_smoothing=smoothing * COLUMNS / (COLUMNS - 1)
    )
    wanted.backward(drawn(6, seed=3))
    parts = run_ranks(RANKS, losses, smoothing)
    for loss, _ in parts:
        torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in parts], -1), logits.grad)


def loss_beyond_the_vocabulary(target):
    with pytest.raises(DataError, match=f"target id {target} is beyond the 8 logits"):
        split_cross_entropy(torch.zeros(1, COLUMNS // RANKS), torch.tensor([target]), 0.0, dist.group.WORLD)
    last = split_cross_entropy(
        torch.zeros(1, COLUMNS // RANKS), torch.tensor([COLUMNS - 1]), 0.0, dist.group.WORLD
    )
    torch.testing.assert_close(last, torch.tensor([8.0]).log())


def test_a_target_beyond_all_columns():
    run_ranks(RANKS, loss_beyond_the_vocabulary, COLUMNS)
