"""The tables at the entrance of a model, and private forms of rotary embeddings, by plain formulas."""

import pytest
import torch

from megatron.core.errors import DataError, UsageError
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

V, H, S = 11, 8, 5
IDS = torch.tensor([[1, 10, 0, 3, 3], [2, 2, 5, 9, 1]])
PLACES = torch.arange(S).expand(2, S)
TYPES = torch.tensor([[0, 0, 1, 1, 2], [2, 1, 0, 0, 0]])


def embedding(kind="learned_absolute", types=0, **fields):
    model_parallel_cuda_manual_seed(4)
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=2, **fields)
    return LanguageModelEmbedding(config, V, S, kind, types)


@pytest.mark.parametrize("types", [0, 3])
@pytest.mark.parametrize("kind", ["learned_absolute", "rope", "none"])
def test_sum_of_the_tables(kind, types):
    layer = embedding(kind, types, hidden_dropout=0.0)
    found = layer(IDS, PLACES, TYPES if types else None)
    wanted = layer.word_embeddings.weight[IDS]
    assert (layer.position_embeddings is None) == (kind != "learned_absolute")
    if kind == "learned_absolute":
        wanted = wanted + layer.position_embeddings.weight[PLACES]
    assert (layer.tokentype_embeddings is None) == (types == 0)
    if types:
        assert layer.tokentype_embeddings.weight.shape == (3, H)
        wanted = wanted + layer.tokentype_embeddings.weight[TYPES]
    torch.testing.assert_close(found, wanted.transpose(0, 1))
    assert found.is_contiguous() and found.dtype == torch.float32


def test_dropout_is_of_training_only():
    layer = embedding("none", hidden_dropout=0.5)
    wanted = layer.word_embeddings.weight[IDS].transpose(0, 1)
    dropped = layer(IDS, None)
    kept = dropped != 0
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * wanted[kept], rtol=1e-4, atol=1e-6)
    assert torch.equal(layer.eval()(IDS, None), wanted)


def test_a_wide_residual_begins_here():
    narrow, wide = (
        embedding(
            "none",
            hidden_dropout=0.0,
            params_dtype=torch.bfloat16,
            bf16=True,
            fp32_residual_connection=is_wide,
        )
        for is_wide in (False, True)
    )
    assert narrow(IDS, None).dtype == torch.bfloat16 and wide(IDS, None).dtype == torch.float32
    assert torch.equal(narrow(IDS, None).float(), wide(IDS, None))


def test_tables_of_a_copy_are_zero():
    layer = embedding(types=2)
    layer.zero_parameters()
    for table in (layer.word_embeddings, layer.position_embeddings, layer.tokentype_embeddings):
        assert not table.weight.any() and table.weight.shared is True
    embedding("none").zero_parameters()


def test_missing_token_types_and_positions_out_of_range_are_refused():
    with pytest.raises(UsageError, match="pass tokentype_ids"):
        embedding(types=2)(IDS, PLACES)
    with pytest.raises(DataError, match="position 5 is beyond the 5 learned"):
        embedding()(IDS, PLACES + 1)


N, D, ROT = 3, 10, 6


def turned(x, angles, interleaved, scale=1.0):
    """Pairs of the first channels as complex numbers times ``scale e^(i angle)``."""
    first, rest = x[..., :ROT].double(), x[..., ROT:].double()
    z = torch.complex(*((first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)))
    z = z * torch.polar(torch.full_like(angles, scale), angles)
    parts = (z.real, z.imag)
    out = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((out, rest), -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_forms_for_rows_and_for_packed_sequences(interleaved):
    generator = torch.Generator().manual_seed(1)
    angles = 6 * torch.rand(S, 1, 1, ROT // 2, generator=generator, dtype=torch.float64)
    both = rope_utils.angles_of_channels(angles, interleaved)
    x = torch.randn(S, 2, N, D, generator=generator, dtype=torch.float64)
    found = rope_utils._apply_rotary_pos_emb_bshd(x, both, interleaved, mscale=1.5)
    torch.testing.assert_close(found, turned(x, angles, interleaved, 1.5))
    torch.testing.assert_close(
        rope_utils._apply_rotary_pos_emb_bshd(x, both, interleaved), turned(x, angles, interleaved)
    )
    # The first channels times the cosine, and their partners times the sine.
    part = x[..., :ROT]
    by_partners = part * both.cos() + rope_utils._rotate_half(part, interleaved) * both.sin()
    torch.testing.assert_close(by_partners, turned(x, angles, interleaved)[..., :ROT])
    packed = torch.randn(7, N, D, generator=generator, dtype=torch.float64)
    found = rope_utils._apply_rotary_pos_emb_thd(packed, torch.tensor([0, 3, 7]), both, interleaved)
    places = [0, 1, 2, 0, 1, 2, 3]
    torch.testing.assert_close(found, turned(packed, angles[places].squeeze(1), interleaved))


def test_latent_attention_takes_even_channels_first():
    angles = torch.rand(S, 1, 1, ROT // 2, dtype=torch.float64)
    both, x = torch.cat((angles, angles), -1), torch.randn(S, 1, N, D, dtype=torch.float64)
    found = rope_utils._apply_rotary_pos_emb_bshd(x, both, multi_latent_attention=True)
    ordered = x[..., [0, 2, 4, 1, 3, 5, *range(ROT, D)]]
    torch.testing.assert_close(found, turned(ordered, angles, False))
