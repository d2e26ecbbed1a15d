"""Text generation from any model that maps token ids to logits: one token after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.errors import ConfigError


@dataclass(frozen=True)
class SamplingOptions:
    """Choice of the next token.

    Args:
        temperature: logits are divided by it; below 1 the likely tokens gain.
        top_k: only the k likeliest tokens may be chosen; 0 means all.
        top_p: only the likeliest tokens that together reach this probability may be chosen
            (nucleus sampling, Holtzman et al. 2020, section 3.1); 1 means all.
        greedy: always the likeliest token; the other three do not matter then.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        rules = [
            ("temperature", self.temperature, self.temperature > 0, "a number above 0, or --greedy"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (no limit) or a positive number of tokens"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "a probability above 0 and at most 1"),
        ]
        problems = [
            f"--{name} {value}: {wanted} is needed" for name, value, good, wanted in rules if not good
        ]
        if problems:
            raise ConfigError("\n".join(problems))


def next_token_probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Distribution that the next token is drawn from.

    Top-k cuts first, then top-p cuts what top-k left, renormalised; both keep the likeliest token.

    Args:
        logits: [..., v] of any floating dtype.
        options: the cuts and the temperature.

    Returns:
        probabilities [..., v], float32 (float64 for float64 logits), zero for tokens that are cut.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    ranked, order = (logits / options.temperature).sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        ranked[..., options.top_k :] = -torch.inf
    probabilities = ranked.softmax(-1)
    if options.top_p < 1:
        # A token is kept if the sum before it is below top_p: the one that crosses the limit is kept.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)


@torch.no_grad()
def generate(
    forward: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    max_new_tokens: int,
    options: SamplingOptions,
    *,
    context_length: int,
    vocabulary_size: int,
    end_token: int | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continue ``prompt`` until ``end_token`` or ``max_new_tokens``.

    Args:
        forward: token ids [1, s] -> logits [1, s, v], with v >= vocabulary_size.
        prompt: at least one token id.
        max_new_tokens: how many tokens to add at most.
        options: how each is chosen.
        context_length: the longest s; of a longer text only the end is seen.
        vocabulary_size: ids from here on are padding of the embedding and are never chosen.
        end_token: id that ends the text; it is not returned.
        device: where ``forward`` wants its ids.
        generator: CPU generator the draws come from, so that a seed gives the same text on any device.

    Returns:
        the new token ids, without the prompt.
    """
    if not prompt:
        raise ConfigError("the prompt has no tokens: give a text of at least one character")
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-context_length:]], dtype=torch.long, device=device)  # [1, s]
        logits = forward(window)[0, -1, :vocabulary_size]  # [1, s, v] -> [vocabulary_size]
        probabilities = next_token_probabilities(logits.cpu(), options)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == end_token:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
