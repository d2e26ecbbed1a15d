"""The comparison of two runs: what it must notice."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.gpt_run import Result, worst_difference

REFERENCE = Result([], [[2.0, 1.0]], [{"a": [torch.tensor([3.0, 4.0])]}, {"a": [torch.tensor([1.0, 0.0])]}])


def with_gradient(step, replicas):
    gradients = [dict(each) for each in REFERENCE.gradients]
    gradients[step]["a"] = [torch.tensor(values) for values in replicas]
    return replace(REFERENCE, gradients=gradients)


def test_equal_runs_do_not_differ():
    assert worst_difference(REFERENCE, REFERENCE) == {"loss": 0.0, "a": 0.0}


def test_the_worst_step_and_the_worst_replica_count():
    found = worst_difference(with_gradient(0, [[3.0, 4.0], [3.0, 4.5]]), REFERENCE)
    assert found["a"] == pytest.approx(0.1)  # |(0, 0.5)| / |(3, 4)|
    found = worst_difference(replace(REFERENCE, losses=[[2.0, 1.0], [2.0, 1.01]]), REFERENCE)
    assert found["loss"] == pytest.approx(0.01)


def test_what_is_missing_or_not_a_number_is_an_error():
    with pytest.raises(AssertionError, match="a is not a number"):
        worst_difference(with_gradient(1, [[float("nan"), 0.0]]), REFERENCE)
    with pytest.raises(AssertionError, match="no rank knows the loss"):
        worst_difference(replace(REFERENCE, losses=[]), REFERENCE)
    missing = replace(REFERENCE, gradients=[{}, REFERENCE.gradients[1]])
    with pytest.raises(AssertionError, match="a"):
        worst_difference(missing, REFERENCE)
    with pytest.raises(ValueError, match="argument"):
        worst_difference(replace(REFERENCE, gradients=REFERENCE.gradients[:1]), REFERENCE)
