"""Auxiliary losses on many ranks have the gradients and the values of one rank."""

import pytest
import torch

from tests.distributed.pool import run_ranks
from tests.unit_tests.transformer.moe.routed_training import KINDS, expected, train_all

# Kind of loss, whether gradients are a mean per token, the loss scale of fp16.
CASES = [(kind, per_token, 1.0) for kind in KINDS for per_token in (False, True)]
CASES += [("aux_loss", per_token, 1024.0) for per_token in (False, True)]


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (1, {}),
        (2, {"tp": 2}),
        (2, {"cp": 2}),
        (4, {"cp": 4}),
        (4, {"cp": 2}),
        (4, {"tp": 2, "cp": 2}),
        (4, {"tp": 2}),
        (4, {}),
    ],
    ids=lambda value: ",".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_losses_count_as_on_one_rank(ranks: int, sizes: dict[str, int]) -> None:
    wanted = {kind: expected(kind) for kind in KINDS}
    for rank, results in enumerate(run_ranks(ranks, train_all, sizes, CASES)):
        for case, (gradients, logged) in zip(CASES, results, strict=True):
            expected_gradients, expected_losses = wanted[case[0]]
            for name, gradient in expected_gradients.items():
                bound = 1e-5 * float(gradient.abs().max())
                torch.testing.assert_close(
                    gradients[name].double(),
                    gradient,
                    rtol=1e-4,
                    atol=bound,
                    msg=lambda text, where=(rank, case, name): f"{where}: {text}",
                )
            assert logged == pytest.approx(expected_losses, rel=1e-5), (rank, case)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_no_small_part_of_the_compared_gradients(kind: str) -> None:
    """So that a wrong factor of theirs would be seen."""
    plain, _ = expected(kind, with_losses=False)
    for name, gradient in expected(kind)[0].items():
        assert (gradient - plain[name]).norm() > 0.01 * gradient.norm()
