"""Embeddings that scripts build themselves, with every option: two ranks give what one gives."""

import pytest
import torch
from option_world import HIDDEN, SEQUENCE, WHOLE, WIDE, B, S, World, draw, random
from split_models import cut_like

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from tests.distributed.pool import run_ranks

TOKENS = torch.randint(WIDE, (B, S), generator=torch.Generator().manual_seed(4))
POSITIONS = torch.arange(S).expand(B, -1)
TYPES = (TOKENS > 9).long()

EMBEDDINGS = {
    "positions": {},
    "rotary": {"position_embedding_type": "rope"},
    "types": {"num_tokentypes": 2},
    "types without positions": {"num_tokentypes": 2, "position_embedding_type": "none"},
    "not split": {"scatter_to_sequence_parallel": False},
    "types, not split": {"num_tokentypes": 2, "scatter_to_sequence_parallel": False},
}


def embed(world, dropout, **options):
    config = world.config(hidden_dropout=dropout)
    module = LanguageModelEmbedding(config, WIDE, S, **options)
    types = TYPES if options.get("num_tokentypes") else None
    out = module(TOKENS, POSITIONS, types)
    kind = SEQUENCE if module.scatter_to_sequence_parallel else WHOLE
    out.backward(world.part(random(3, S, B, HIDDEN), kind))
    return module, world.joined(out.detach(), kind), world.gradients(module)


def check_embeddings(sequence_parallel):
    whole_world = World(1, False)
    # Ranks with parts of a sequence drop elements of their own: nothing to compare with.
    cases = [
        (name, dropout)
        for name in EMBEDDINGS
        for dropout in (0.0, 0.5)
        if not dropout or not sequence_parallel or "not split" in name
    ]
    wholes = {case: embed(whole_world, case[1], **EMBEDDINGS[case[0]]) for case in cases}
    world = World(2, sequence_parallel)
    for case in cases:
        module, out, gradients = embed(world, case[1], **EMBEDDINGS[case[0]])
        whole, whole_out, whole_gradients = wholes[case]
        torch.testing.assert_close(out, whole_out, msg=lambda text, case=case: f"{case}: {text}")
        weights = dict(whole.named_parameters())
        for key, parameter in module.named_parameters():
            assert torch.equal(parameter, cut_like(weights[key], parameter)), (case, key)
            torch.testing.assert_close(
                gradients[key],
                cut_like(whole_gradients[key], parameter),
                msg=lambda text, where=(case, key): f"{where}: {text}",
            )
    return True


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_embeddings(sequence_parallel):
    assert run_ranks(2, check_embeddings, sequence_parallel) == [True, True]


def check_sequence_first_table():
    """``reduce_scatter_embeddings`` is the table's own business: with and without sequence parallelism."""
    found = []
    for size in (1, 2):
        world = World(size, False)
        table = VocabParallelEmbedding(
            WIDE, HIDDEN, init_method=draw, reduce_scatter_embeddings=True, config=world.config()
        )
        out = table(TOKENS)
        out.backward(random(3, S, B, HIDDEN).chunk(size)[world.rank])
        found.append((mappings.gather_from_sequence_parallel_region(out.detach()), table))
    (whole_out, whole), (out, split) = found
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(split.weight.grad, cut_like(whole.weight.grad, split.weight))
    return True


def test_a_table_that_cuts_the_sequence():
    assert run_ranks(2, check_sequence_first_table) == [True, True]
