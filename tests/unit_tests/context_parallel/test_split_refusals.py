"""Settings that ranks cannot share are refused, and say what can."""

import pytest
import torch

from megatron.core.context_parallel.attention import comm_type_of_layer
from megatron.core.context_parallel.heads import check_heads, to_heads
from megatron.core.errors import ConfigError
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks
from tests.unit_tests.context_parallel.split_world import HEADS, WIDTH, Case, build, start


def test_unknown_communication_type_is_refused():
    with pytest.raises(ConfigError, match="choose one of p2p, all_gather, a2a, a2a\\+p2p"):
        build(Case("ring"), 2)


def test_heads():
    with pytest.raises(ConfigError, match=r"4 attention heads .* 8 context-parallel"):
        build(Case("a2a"), 8)
    with pytest.raises(ConfigError, match=r"2 attention heads .* 4 context-parallel"):
        build(Case("a2a"), 4, tensor_model_parallel_size=2)
    with pytest.raises(ConfigError, match=r"6 query groups .* 4 context-parallel ranks: one must divide"):
        check_heads(12, 6, 4)


def exchange_of_odd_heads() -> str:
    # The width of a head divides where their number does not.
    query, key = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 1, 4)
    with pytest.raises(ConfigError) as caught:
        to_heads(query, key, key, torch.distributed.group.WORLD)
    return str(caught.value)


def test_heads_are_counted_before_they_are_exchanged():
    for message in run_ranks(2, exchange_of_odd_heads):
        assert "3 attention heads of a tensor-parallel rank do not divide between 2" in message


@pytest.mark.parametrize("sizes", [None, (2, 4), (2, 2, 1)])
def test_hierarchical_sizes_must_multiply_to_the_group_size(sizes):
    with pytest.raises(ConfigError, match="two sizes whose product is 4"):
        build(Case("a2a+p2p", hierarchy=sizes), 4)


def config(kinds, layers=3):
    return TransformerConfig(
        num_layers=layers,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        context_parallel_size=2,
        cp_comm_type=kinds,
    )


def test_kind_of_a_layer():
    assert comm_type_of_layer(config(None), 2) == "p2p"
    assert comm_type_of_layer(config("a2a"), 3) == "a2a"
    kinds = ["p2p", "a2a", "all_gather"]
    assert [comm_type_of_layer(config(kinds), number) for number in (1, 2, 3)] == kinds
    with pytest.raises(ConfigError, match="2 words for 3 layers"):
        config(["p2p", "a2a"])


def messages():
    """On a rank: what is said about operands that do not fit."""
    start(2)
    layer, found = build(Case(), 2), []
    x = torch.zeros(4, 1, HEADS, WIDTH)
    for operands in ((x, x[:2], x[:2], None), (x[:3],) * 3 + (None,), (x, x, x, torch.ones(1, 1, 8, 8) > 0)):
        try:
            layer(*operands)
        except ConfigError as error:
            found.append(str(error))
    return found


def test_operands():
    for unequal, odd, mask in run_ranks(2, messages):
        assert "4 queries and 2 keys" in unequal
        assert "multiple of 4" in odd
        assert "(1, 1, 8, 8)" in mask
        assert "(4, 8)" in mask
