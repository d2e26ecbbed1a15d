"""Sampling: distributions against float64 and hand-made cases, generation against a counting model."""

import math

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.training.generation import SamplingOptions, generate, next_token_probabilities

# Probabilities 0.4, 0.3, 0.2, 0.1, out of order so that ranks and ids differ.
KNOWN = torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=torch.float64).log()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_probabilities_without_cut_are_the_softmax(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = [[math.exp(x / temperature) for x in row] for row in logits.tolist()]
    expected = torch.tensor([[w / sum(row) for w in row] for row in weights], dtype=torch.float64)
    got = next_token_probabilities(logits, SamplingOptions(temperature=temperature))
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.2, 0.4, 0.1, 0.3]),
        ({"top_p": 0.05}, [0, 1, 0, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [2 / 9, 4 / 9, 0, 3 / 9]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"greedy": True, "top_p": 0.75}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [4 / 30, 16 / 30, 1 / 30, 9 / 30]),
    ],
)
def test_top_k_and_top_p_cut_a_known_distribution(options: dict, expected: list[float]) -> None:
    got = next_token_probabilities(KNOWN, SamplingOptions(**options))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"temperature": 0}, "--temperature"), ({"top_k": -1}, "--top-k"), ({"top_p": 1.5}, "--top-p")],
)
def test_bad_options_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        SamplingOptions(**options)


def counting_model(tokens: torch.Tensor) -> torch.Tensor:
    """Logits [1, s, 8] that make the next token the last one plus one; 6 and 7 play the padding."""
    logits = torch.nn.functional.one_hot((tokens + 1) % 6, 8).float() * 50  # [1, s] -> [1, s, 8]
    logits[..., 7] = 100.0
    return logits


@pytest.mark.parametrize(
    "options",
    [{}, {"greedy": True}, {"top_k": 1}, {"top_k": 8}, {"top_p": 0.5}, {"temperature": 100.0, "top_k": 2}],
    ids=str,
)
def test_generation_never_returns_a_padded_id(options: dict) -> None:
    choice = SamplingOptions(**options)
    out = generate(counting_model, [1], 7, choice, context_length=4, vocabulary_size=6)
    if "temperature" in options:
        assert max(out) < 6
    else:
        assert out == [2, 3, 4, 5, 0, 1, 2]


def test_generation_stops_at_the_end_token_and_respects_the_context() -> None:
    lengths = []

    def model(tokens: torch.Tensor) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return counting_model(tokens)

    options = SamplingOptions(greedy=True)
    out = generate(model, [0, 1, 2], 9, options, context_length=4, vocabulary_size=6, end_token=0)
    assert out == [3, 4, 5]
    assert lengths == [3, 4, 4, 4]


def test_a_seed_gives_the_same_text_and_the_draws_follow_the_distribution() -> None:
    def model(tokens: torch.Tensor) -> torch.Tensor:
        return KNOWN.expand(1, tokens.shape[1], 4)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        options = SamplingOptions()
        return generate(model, [0], 2000, options, context_length=1, vocabulary_size=4, generator=generator)

    tokens = draw(3)
    assert tokens == draw(3)
    assert tokens != draw(4)
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / len(tokens)
    # Five standard deviations of a share are at most 0.056 here.
    torch.testing.assert_close(shares, KNOWN.exp().float(), atol=0.056, rtol=0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one character"):
        generate(counting_model, [], 1, SamplingOptions(), context_length=4, vocabulary_size=6)
