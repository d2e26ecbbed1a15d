"""Rotary embedding as user code calls it, against rotations of complex numbers in double precision."""

import math

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.errors import UsageError
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings import RotaryEmbedding, apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb_with_cos_sin
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks

HEADS, HEAD = 3, 8


def make_config(interleaved=False, **fields):
    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD,
        num_attention_heads=HEADS,
        rotary_interleaved=interleaved,
        **fields,
    )


def frequencies(width, base=10000, scaling=None):
    """``base^(-2k/width)``, slowed down as Llama 3.1 does with ``scaling``."""
    out = [base ** (-2 * k / width) for k in range(width // 2)]
    if scaling is None:
        return out
    slowed = []
    for f in out:
        waves = 8192 / (2 * math.pi / f)
        t = min(max((waves - 1) / 3, 0.0), 1.0)
        slowed.append((1 - t) * f / scaling + t * f)
    return slowed


def rotated(x, positions, width, interleaved, mscale=1.0, interpolation=None, **kind):
    """Pairs of the first ``width`` channels as complex numbers, times e^(i position frequency)."""
    x = x.double()
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        z = torch.complex(turned[..., 0::2], turned[..., 1::2])
    else:
        z = torch.complex(turned[..., : width // 2], turned[..., width // 2 :])
    places = torch.tensor(positions, dtype=torch.float64) / (interpolation or 1)
    angle = torch.outer(places, torch.tensor(frequencies(width, **kind), dtype=torch.float64))
    z = z * mscale * torch.polar(torch.ones_like(angle), angle)[:, None, None, :]
    if interleaved:
        out = torch.stack((z.real, z.imag), dim=-1).flatten(-2)
    else:
        out = torch.cat((z.real, z.imag), dim=-1)
    return torch.cat((out, rest), dim=-1)


def heads(s, b=2, dtype=torch.float32, seed=0):
    return torch.randn(s, b, HEADS, HEAD, generator=torch.Generator().manual_seed(seed)).to(dtype)


KINDS = {
    "plain": ({}, {}),
    "another base": ({"rotary_base": 500}, {"base": 500}),
    "interpolated": ({"seq_len_interpolation_factor": 4.0}, {"interpolation": 4.0}),
    "scaled": ({"rotary_base": 500000, "rope_scaling": True}, {"base": 500000, "scaling": 8.0}),
    "scaled by 32": ({"rope_scaling": True, "rope_scaling_factor": 32.0}, {"scaling": 32.0}),
    "on the CPU": ({"use_cpu_initialization": True}, {}),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_angles_and_tables_rotate_alike(kind, percent, interleaved):
    arguments, expected = KINDS[kind]
    width, x = int(HEAD * percent), heads(11)
    table = RotaryEmbedding(HEAD, percent, interleaved, **arguments)
    for offset in (0, 3):
        found = apply_rotary_pos_emb(x, table(11, offset), make_config(interleaved))
        wanted = rotated(x, range(offset, offset + 11), width, interleaved, **expected)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        cos, sin = table.get_cos_sin(11, offset)
        assert cos.shape == sin.shape == (11, width // 2)
        found = apply_rotary_pos_emb_with_cos_sin(x, cos, sin, interleaved)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        found = apply_rotary_pos_emb_with_cos_sin(x[:5], cos, sin, rotary_interleaved=interleaved)
        torch.testing.assert_close(found.double(), wanted[:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_of_whole_channels_and_gradients(interleaved):
    table = RotaryEmbedding(HEAD, 1.0, interleaved)
    angles, x = table(7), heads(7).requires_grad_()
    out = apply_rotary_pos_emb_with_cos_sin(x, angles.cos(), angles.sin(), interleaved)
    torch.testing.assert_close(
        out.double(), rotated(x.detach(), range(7), HEAD, interleaved), atol=1e-5, rtol=0
    )
    g = heads(7, seed=1)
    out.backward(g)
    # The transpose of a rotation turns back.
    backwards = rotated(g, [-place for place in range(7)], HEAD, interleaved)
    torch.testing.assert_close(x.grad.double(), backwards, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="tables of 6 positions for a sequence of 7"):
        apply_rotary_pos_emb_with_cos_sin(x, *table.get_cos_sin(6), interleaved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(dtype):
    table, x = RotaryEmbedding(HEAD, 0.5), heads(6, dtype=dtype)
    wanted = rotated(x, range(6), HEAD // 2, False)
    for found in (
        apply_rotary_pos_emb(x, table(6), make_config()),
        apply_rotary_pos_emb_with_cos_sin(x, *table.get_cos_sin(6)),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_mscale_stretches_what_is_rotated(interleaved):
    table, x = RotaryEmbedding(HEAD, 0.5, interleaved), heads(6)
    found = apply_rotary_pos_emb(x, table(6), make_config(interleaved), mscale=1.7)
    wanted = rotated(x, range(6), HEAD // 2, interleaved, mscale=1.7)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_llamas_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=HEADS * HEAD,
        num_attention_heads=HEADS,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    x = heads(50)
    theirs = llama.LlamaRotaryEmbedding(config)
    cos, sin = theirs(x, torch.arange(50)[None])
    # [s, b, n, d] -> [b, n, s, d]
    wanted, _ = llama.apply_rotary_pos_emb(x.permute(1, 2, 0, 3), x.permute(1, 2, 0, 3), cos, sin)
    ours = RotaryEmbedding(HEAD, 1.0, rotary_base=500000, rope_scaling=True)
    for found in (
        apply_rotary_pos_emb(x, ours(50), make_config()),
        apply_rotary_pos_emb_with_cos_sin(x, *ours.get_cos_sin(50)),
    ):
        torch.testing.assert_close(found.permute(1, 2, 0, 3), wanted, rtol=1e-5, atol=1e-5)


LENGTHS = [4, 12, 8]
STARTS = torch.tensor([0, 4, 16, 24], dtype=torch.int32)


@pytest.mark.parametrize("rows", [3, 4], ids=["[t, n, d]", "[t, 1, n, d]"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_sequences_start_anew(interleaved, rows):
    parallel_state.destroy_model_parallel()
    table, x = RotaryEmbedding(HEAD, 1.0, interleaved), heads(24, b=1)
    places = [place for length in LENGTHS for place in range(length)]
    wanted = rotated(x, places, HEAD, interleaved, mscale=0.5)
    given = x.squeeze(1) if rows == 3 else x
    found = apply_rotary_pos_emb(
        given, table(12, packed_seq=True), make_config(interleaved), cu_seqlens=STARTS, mscale=0.5
    )
    assert found.shape == given.shape
    torch.testing.assert_close(found.double().view(wanted.shape), wanted, rtol=1e-5, atol=1e-5)
    for starts, length in ((STARTS[:-1], 12), (STARTS, 11), (STARTS[:1], 12)):
        with pytest.raises(UsageError, match="packed sequences of lengths"):
            apply_rotary_pos_emb(given, table(length), make_config(interleaved), cu_seqlens=starts)


def on_a_part_of_the_sequences(packed):
    """Which positions this rank's rows turned by, found from rows that are all alike."""
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    config = make_config(context_parallel_size=2)
    table = RotaryEmbedding(HEAD, 1.0)
    x = heads(1, b=1).expand(12 if packed else 6, 1, HEADS, HEAD)
    if packed:
        out = apply_rotary_pos_emb(x.squeeze(1), table(12, packed_seq=True), config, cu_seqlens=STARTS)
    else:
        out = apply_rotary_pos_emb(x, table(12), config)
    everywhere = rotated(x[:1].expand(12, 1, HEADS, HEAD), range(12), HEAD, False).flatten(1)
    return torch.cdist(out.double().reshape(len(x), -1), everywhere).argmin(dim=1).tolist()


def test_context_parallel_ranks_turn_their_chunks():
    # Chunks r and 3 - r of 4
    assert run_ranks(2, on_a_part_of_the_sequences, False) == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    assert run_ranks(2, on_a_part_of_the_sequences, True) == [
        [0, 3, *range(3), *range(9, 12), 0, 1, 6, 7],
        [1, 2, *range(3, 9), 2, 3, 4, 5],
    ]


def test_length_of_a_table():
    table = RotaryEmbedding(HEAD, 1.0)
    stack = type("Stack", (), {"input_tensor": None})()
    config = make_config()
    config.context_parallel_size, config.tensor_model_parallel_size = 2, 4
    assert table.get_rotary_seq_len(None, stack, heads(3), config, None) == 6
    config.sequence_parallel = True
    assert table.get_rotary_seq_len(None, stack, heads(3), config, None) == 24
    stack.input_tensor = heads(5)
    assert table.get_rotary_seq_len(None, stack, None, config, None) == 40
    assert table.get_rotary_seq_len(InferenceParams(2, 7), stack, None, config, None) == 14
    with pytest.warns(DeprecationWarning):
        assert (
            table.get_rotary_seq_len(None, stack, None, config, None, inference_params=InferenceParams(2, 7))
            == 14
        )
    told = PackedSeqParams("thd", STARTS, STARTS, max_seqlen_q=torch.tensor(12), max_seqlen_kv=9)
    assert table.get_rotary_seq_len(None, stack, None, config, told) == 12
    assert table.get_rotary_seq_len(None, stack, None, config, PackedSeqParams("thd", STARTS, STARTS)) == 12


def test_frequencies_are_no_part_of_a_checkpoint():
    table = RotaryEmbedding(HEAD, 1.0)
    assert not table.state_dict()
    table.load_state_dict({"inv_freq": torch.zeros(4)})
    assert table.inv_freq[0] == 1.0
