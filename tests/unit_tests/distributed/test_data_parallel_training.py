"""Data-parallel training gives what one process gives, under every switch of the wrapper."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import run_ranks
from tests.unit_tests.distributed.small_training import Training, reference

STEPS = 5
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 200}
SHARDED = {"use_distributed_optimizer": True}
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": OVERLAP,
    "mean in the collective": {"average_in_collective": True},
    "overlap, mean in the collective": {**OVERLAP, "average_in_collective": True},
    "sharded": SHARDED,
    "sharded, overlap": {**SHARDED, **OVERLAP},
    "sharded, overlap both": {**SHARDED, **OVERLAP, "overlap_param_gather": True},
    "sharded, overlap both, mean": {
        **SHARDED,
        **OVERLAP,
        "overlap_param_gather": True,
        "average_in_collective": True,
        "align_param_gather": True,
    },
    "sharded, padded": {**SHARDED, **OVERLAP, "pad_buckets_for_high_nccl_busbw": True},
}


def train(
    ddp: dict[str, Any], **options: Any
) -> tuple[list[dict[str, Tensor]], list[Any], dict[str, Tensor]]:
    training = Training({"check_for_nan_in_grad": True, **ddp}, **options)
    gradients, results = [], []
    for step in range(STEPS):
        training.backward(step)
        gradients.append(training.gradients())
        results.append(training.optimizer.step())
    return gradients, results, training.parameters()


def assert_equals_reference(ranks: list[tuple], tolerance: float = 2e-6) -> None:
    expected_gradients, norms, expected = reference(STEPS)
    for gradients, results, parameters in ranks:
        for step in range(STEPS):
            for name, gradient in expected_gradients[step].items():
                torch.testing.assert_close(
                    gradients[step][name].double(), gradient, rtol=tolerance, atol=tolerance, msg=name
                )
        assert [norm for _, norm, _ in results] == pytest.approx(norms, rel=tolerance)
        for name, parameter in expected.items():
            torch.testing.assert_close(
                parameters[name].double(), parameter, rtol=10 * tolerance, atol=10 * tolerance
            )
    # All ranks hold the same bits.
    for _, _, parameters in ranks[1:]:
        assert all(torch.equal(parameters[name], ranks[0][2][name]) for name in parameters)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("switches", SWITCHES)
def test_equals_one_process_on_the_whole_batch(switches: str, ranks: int) -> None:
    assert_equals_reference(run_ranks(ranks, train, SWITCHES[switches]))


@pytest.mark.parametrize("switches", ["plain", "sharded, overlap both"])
def test_one_rank_alone(switches: str) -> None:
    assert_equals_reference([train(SWITCHES[switches])])  # without process groups
    assert_equals_reference(run_ranks(1, train, SWITCHES[switches]))


@pytest.mark.parametrize("switches", ["overlap", "sharded, overlap both"])
def test_mean_per_token(switches: str) -> None:
    """Losses are sums, gradients are divided by the tokens of all ranks: the same mean."""
    assert_equals_reference(run_ranks(2, train, SWITCHES[switches], per_token=True))
