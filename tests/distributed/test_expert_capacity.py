"""Experts with a capacity: the tokens that they drop, over ranks and through ``pretrain_gpt.py``."""

import math
import re
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch

from tests.distributed import real_loop
from tests.distributed.expert_layouts import bare
from tests.distributed.gpt_run import NO_DROPOUT, command_line, run, worst_difference
from tests.distributed.layouts import Layout
from tests.distributed.pool import run_ranks

EXPERTS, TOPK, FACTOR = 4, 2, 0.75
WORDS = f"{NO_DROPOUT} --micro-batch-size 1 --moe-router-topk {TOPK} --moe-expert-capacity-factor {FACTOR}"
POLICIES = {
    "by-weight": "--moe-token-drop-policy probs",
    "by-position": "--moe-token-drop-policy position",
    "padded": "--moe-pad-expert-input-to-capacity",
}


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@dataclass
class Routed(real_loop.Record):
    """What the routers of a rank decided.

    Attributes:
        decisions: for each call, (logits [t, E], weights [t, E], map [t, E]).
    """

    decisions: list[tuple[torch.Tensor, ...]] = field(default_factory=list)


def train_and_watch_routers(argv):
    """On a rank: the run, and all decisions."""
    from megatron.core.transformer.moe.router import TopKRouter

    routing, decisions = TopKRouter.routing, []

    def watched(router, logits):
        probs, routing_map = routing(router, logits)
        decisions.append((logits.detach().flatten(0, 1), probs.detach(), routing_map))
        return probs, routing_map

    with mock.patch.object(TopKRouter, "routing", watched):
        record = real_loop.train(argv, with_gradients=False)
    return Routed(**vars(record), decisions=decisions)


def kept_by_hand(logits, by_position):
    """[t, E] weights of the tokens that experts keep, one expert after the other, and the number dropped."""
    tokens = len(logits)
    capacity = math.ceil(tokens * TOPK / EXPERTS * FACTOR)
    weights, dropped = torch.zeros(tokens, EXPERTS, dtype=torch.float64), 0
    for token, row in enumerate(logits.double()):
        chosen = sorted(range(EXPERTS), key=lambda expert: -float(row[expert]))[:TOPK]
        weights[token, chosen] = row[chosen].softmax(0)
    for expert in range(EXPERTS):
        takers = [token for token in range(tokens) if weights[token, expert] > 0]
        if not by_position:
            takers.sort(key=lambda token: -float(weights[token, expert]))
        for token in takers[capacity:]:
            weights[token, expert] = 0
            dropped += 1
    return weights, dropped, capacity


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "layout, dispatcher",
    [
        (bare(tp=2, dp=2, ep=2, etp=1), "alltoall"),
        (bare(cp=2, ep=2), "allgather"),
    ],
    ids=["tp2-dp2-ep2-alltoall", "cp2-ep2-allgather"],
)
def test_each_rank_drops_the_tokens_that_a_count_by_hand_drops(layout, dispatcher, policy, data_cache):
    words = f"{WORDS} {POLICIES[policy]} --moe-token-dispatcher-type {dispatcher} --log-moe-balance"
    records = run_ranks(layout.world_size, train_and_watch_routers, command_line(layout, data_cache, words))
    dropped = 0
    for record in records:
        assert record.decisions
        for logits, probs, routing_map in record.decisions:
            expected, here, capacity = kept_by_hand(logits, policy == "by-position")
            torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-7)
            if policy == "padded":
                assert routing_map.sum(0).tolist() == [capacity] * EXPERTS
                assert not ((expected > 0) & ~routing_map).any()
            else:
                assert torch.equal(routing_map, expected > 0)
            dropped += here
    assert dropped > 0
    logged = [int(number) for number in re.findall(r"dropped tokens: (\d+)", records[-1].output)]
    assert sum(logged) == dropped


@pytest.mark.parametrize(
    "layout, policy, words",
    [
        (bare(dp=2, ep=2), "by-weight", "--moe-token-dispatcher-type alltoall --moe-grouped-gemm"),
        (bare(dp=4, ep=4), "padded", "--moe-token-dispatcher-type alltoall_seq"),
        (bare(dp=2, etp=2), "by-position", "--moe-token-dispatcher-type flex --moe-grouped-gemm"),
        (bare(pp=2, dp=2, ep=2), "padded", "--moe-token-dispatcher-type allgather --moe-grouped-gemm"),
    ],
    ids=["dp2-ep2-by-weight", "dp4-ep4-padded", "dp2-etp2-by-position", "pp2-dp2-ep2-padded"],
)
def test_ranks_with_whole_sequences_train_as_one_that_drops(layout, policy, words, data_cache):
    """A capacity counts the tokens of one rank's micro-batch: these are the same for one rank."""
    both = f"{WORDS} {POLICIES[policy]}"
    worst = worst_difference(
        run(layout, data_cache, f"{both} {words}"), run(Layout(model="moe"), data_cache, both)
    )
    assert worst.pop("loss") < 1e-5
    assert max(worst.values()) < 1e-4
