"""Masks and positions of a batch with several documents, against a plain loop."""

import itertools

import pytest
import torch

utils = pytest.importorskip("megatron.training.utils")

EOD = 9


def by_hand(row, reset_position_ids, reset_attention_mask, eod_mask_loss):
    """One row, token by token."""
    s = len(row)
    document, start, documents, positions = 0, 0, [], []
    for i, token in enumerate(row):
        documents.append(document)
        positions.append(i - start if reset_position_ids else i)
        if token == EOD:
            document, start = document + 1, i + 1
    hidden = [
        [j > i or (reset_attention_mask and documents[i] != documents[j]) for j in range(s)] for i in range(s)
    ]
    loss = [0.0 if eod_mask_loss and token == EOD else 1.0 for token in row]
    return hidden, loss, positions


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=3)))
def test_masks_and_positions(options):
    rows = [[1, 2, EOD, 3, EOD, EOD, 4, 5], [EOD, 1, 2, 3, 4, 5, 6, EOD], [1, 2, 3, 4, 5, 6, 7, 8]]
    mask, loss, positions = utils.get_ltor_masks_and_position_ids(torch.tensor(rows), EOD, *options)
    mask = mask.expand(len(rows), 1, 8, 8)
    for index, row in enumerate(rows):
        hidden, row_loss, row_positions = by_hand(row, *options)
        assert mask[index, 0].tolist() == hidden
        assert loss[index].tolist() == row_loss
        assert positions[index].tolist() == row_positions


def test_unwrap_strips_every_wrapper():
    inner = torch.nn.Linear(1, 1)
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module.module = inner
    assert utils.unwrap_model([wrapped], None) == [inner]
    assert utils.unwrap_model(wrapped) is wrapped
