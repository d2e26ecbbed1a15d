"""Putting pieces together, against tensors cut by hand."""

import pytest
import torch
from torch import nn

from tests.distributed.full_tensors import Piece, assemble, global_names, join, piece_of


def test_rows_columns_and_gates_come_together():
    whole = torch.arange(32.0).reshape(8, 4)
    rows = [Piece(whole[:4], 0, 2), Piece(whole[4:], 1, 2)]
    assert torch.equal(join(reversed(rows)), whole)
    columns = [Piece(whole[:, i : i + 1], i, 4, dim=1) for i in range(4)]
    assert torch.equal(join(columns), whole)
    # Rank 0 holds rows 0, 1 of the gate (rows 0-3) and rows 4, 5 of the other half (rows 4-7).
    gated = [Piece(whole[[0, 1, 4, 5]], 0, 2, 0, 2), Piece(whole[[2, 3, 6, 7]], 1, 2, 0, 2)]
    assert torch.equal(join(gated), whole)


def test_a_missing_part_is_an_error():
    with pytest.raises(AssertionError, match=r"\[0, 0\]"):
        join([Piece(torch.zeros(1), 0, 2), Piece(torch.zeros(1), 0, 2)])


def test_only_marked_parameters_are_cut():
    param = nn.Parameter(torch.zeros(2))
    assert piece_of(param, param, 1, 2).parts == 1
    param.tensor_model_parallel, param.partition_dim, param.partition_stride = True, 0, 2
    assert piece_of(param, param, 1, 2) == Piece(param, 1, 2, 0, 2)
    assert piece_of(param, param, 0, 1).parts == 1


def test_every_set_of_replicas_makes_a_tensor():
    def held(part, value):
        return {"cut": Piece(torch.full((1,), value), part, 2), "alone": Piece(torch.tensor([value]))}

    whole = assemble([held(0, 1.0), held(1, 2.0), held(0, 3.0), held(1, 4.0)])
    assert [t.tolist() for t in whole["cut"]] == [[1.0, 2.0], [3.0, 4.0]]
    assert [t.tolist() for t in whole["alone"]] == [[1.0], [2.0], [3.0], [4.0]]


def test_layers_are_numbered_over_all_stages():
    stage = nn.Module()
    stage.decoder = nn.Module()
    stage.decoder.layers = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    for layer, number in zip(stage.decoder.layers, (5, 6), strict=True):
        layer.layer_number = number
    stage.output_layer = nn.Linear(1, 1, bias=False)
    assert global_names(stage, tied=True) == {
        "decoder.layers.0.weight": "decoder.layers.4.weight",
        "decoder.layers.1.weight": "decoder.layers.5.weight",
        "output_layer.weight": "embedding.word_embeddings.weight",
    }
    assert global_names(stage, tied=False)["output_layer.weight"] == "output_layer.weight"
