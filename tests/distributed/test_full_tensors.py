"""Putting pieces together, against tensors cut by hand."""

import pytest
import torch
from torch import nn

from tests.distributed.full_tensors import Experts, Piece, assemble, global_names, join, piece_of


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


def test_experts_of_all_layouts_of_weights_come_under_one_name():
    """Two experts of three inner features each, gate above the other half, on the second of two ranks."""
    first = torch.arange(2 * 6 * 2.0).reshape(2, 6, 2)  # [expert, gate and other half, h]
    second = torch.arange(2 * 2 * 3.0).reshape(2, 2, 3)  # [expert, h, inner]
    experts = Experts(ep_rank=1, ep_size=2, part=0, parts=1, count=4, gated=True)

    def found(**held):
        pieces = {}
        for name, value in held.items():
            name = "mlp.experts." + name.replace("__", ".")
            pieces |= experts.pieces(name, nn.Parameter(value), value)
        return {name: join([piece]) for name, piece in pieces.items()}

    # In memory expert by expert: [h, 2 * 3] each, then [3, h] each.
    grouped = found(
        weight1=torch.cat([each.t().flatten() for each in first]).reshape(2, 12),
        weight2=torch.cat([each.t() for each in second]),
    )
    one_by_one = found(
        linear_fc1__weight0=first[0],
        linear_fc1__weight1=first[1],
        linear_fc2__weight0=second[0],
        linear_fc2__weight1=second[1],
    )
    for name, value in grouped.items():
        torch.testing.assert_close(one_by_one[name], value, rtol=0, atol=0)
    assert sorted(grouped) == sorted(one_by_one)
    assert torch.equal(grouped["mlp.experts.3.linear_fc1.weight"], first[1])
    assert torch.equal(grouped["mlp.experts.2.linear_fc2.weight"], second[0])


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
