"""Which layers a stage builds, against tables written by hand."""

from types import SimpleNamespace

import pytest

from megatron.core import parallel_state
from megatron.core.errors import ConfigError
from megatron.core.transformer import transformer_block, transformer_layer
from megatron.core.transformer.pipeline_layout import (
    get_layer_counts,
    get_layer_ranges,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)


def config(layers, pp, vpp=None, first=None, last=None, embedding=False, loss=False):
    return SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=embedding,
        account_for_loss_in_pipeline_split=loss,
    )


# arguments -> layers of the virtual stages, in the order of the data
TABLE = [
    ((8, 1), [8]),
    ((8, 4), [2, 2, 2, 2]),
    ((8, 2, 4), [1] * 8),
    ((12, 2, 1), [6, 6]),
    ((10, 4, None, 1, 3), [1, 3, 3, 3]),
    ((7, 4, None, 1), [1, 2, 2, 2]),
    ((7, 4, None, None, 1), [2, 2, 2, 1]),
    ((5, 2, None, 1, 4), [1, 4]),
    # Two chunks per stage; the outer stages halve their own numbers.
    ((12, 3, 2, 2, 6), [1, 2, 3, 1, 2, 3]),
    ((7, 4, None, None, None, True), [1, 2, 2, 2]),
    ((6, 4, None, None, None, True, True), [1, 2, 2, 1]),
    ((6, 2, 2, None, None, True, True), [1, 2, 2, 1]),
    ((7, 2, 4, None, None, False, True), [1, 1, 1, 1, 1, 1, 1, 0]),
]


@pytest.fixture
def place():
    def select(stage, chunk=None):
        parallel_state.set_pipeline_model_parallel_rank(stage)
        parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)

    yield select
    select(None)


@pytest.mark.parametrize(("arguments", "counts"), TABLE)
def test_counts_and_offsets(place, arguments, counts):
    settings = config(*arguments)
    assert get_layer_counts(settings) == counts
    assert [layer for layers in get_layer_ranges(settings) for layer in layers] == list(range(arguments[0]))
    pp, vpp = settings.pipeline_model_parallel_size, settings.virtual_pipeline_model_parallel_size
    for number, count in enumerate(counts):
        place(number % pp, number // pp if vpp else None)
        assert get_num_layers_to_build(settings) == count
        assert get_transformer_layer_offset(settings) == sum(counts[:number])


def test_one_stage_needs_no_process_groups():
    assert get_num_layers_to_build(config(5, 1)) == 5 and get_transformer_layer_offset(config(5, 1)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 2), "7 layers do not divide into 2 pipeline stages x 1"),
        ((8, 2, 3), "2 pipeline stages x 3 virtual stages: use a multiple of 6"),
        ((8, 4, None, None, None, True), r"9 layers \(the embedding and the loss counted"),
        ((8, 4, None, 1, 2), "leave 5 for 2 others x 1 virtual stages, which needs a positive multiple of 2"),
        ((5, 2, None, 1, 3), "must be 0: there are no other stages"),
        ((8, 2, 2, 3), "num_layers_in_first_pipeline_stage 3: must be positive and a multiple of 2"),
        ((8, 2, None, None, 0), "num_layers_in_last_pipeline_stage 0"),
        ((4, 4, None, 2, 2), "leave 0 for 2 others"),
        ((8, 2, None, 3, None, True), "leave out account_for_embedding_in_pipeline_split"),
    ],
)
def test_what_cannot_be_dealt_out(arguments, message):
    with pytest.raises(ConfigError, match=message):
        get_layer_counts(config(*arguments))


def test_a_virtual_stage_must_be_selected(place):
    place(0)
    with pytest.raises(ConfigError, match="set_virtual_pipeline_model_parallel_rank"):
        get_num_layers_to_build(config(8, 2, 2))


def test_public_names():
    assert transformer_block.get_num_layers_to_build is get_num_layers_to_build
    assert transformer_layer.get_transformer_layer_offset is get_transformer_layer_offset
