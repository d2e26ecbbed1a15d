"""Validation of results in the mode that does not repeat iterations."""

import functools
import logging
import platform
from pathlib import Path

import pytest
import torch

from megatron.core import rerun_state_machine as rerun
from megatron.core.errors import NotBuiltYetError, TrainingError
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, RerunStateMachine


@pytest.fixture
def machine() -> RerunStateMachine:
    return RerunStateMachine()


def test_the_guard_lets_an_iteration_run_exactly_once(machine: RerunStateMachine) -> None:
    runs = []
    for _ in range(3):
        while machine.should_run_forward_backward(RerunDataIterator([1, 2])):
            runs.append(machine.current_iteration)
        assert machine.should_checkpoint_and_exit() == (False, False, 0)
    assert runs == [1, 2, 3]


@pytest.mark.parametrize("result", [torch.tensor(float("nan")), torch.tensor([float("nan")]), float("nan")])
def test_a_fatal_result_stops_with_the_documented_text(machine: RerunStateMachine, result: object) -> None:
    machine.current_iteration = 4
    assert machine.should_run_forward_backward(None)
    with pytest.raises(RuntimeError) as error:
        machine.validate_result(
            result,
            rejection_func=lambda value: value != value,
            message="found NaN in local forward loss calculation",
        )
    assert isinstance(error.value, TrainingError)
    assert str(error.value) == (
        f"Rank 0, node {platform.node()}, device 0, iteration 5: Unexpected result nan "
        "(message='found NaN in local forward loss calculation')"
    )


def test_a_result_that_is_not_fatal_is_warned_about(
    machine: RerunStateMachine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        machine.validate_result(7.0, rejection_func=lambda value: value > 5, message="too big", fatal=False)
        machine.validate_result(3.0, rejection_func=lambda value: value > 5, message="too big")
    assert len(caplog.messages) == 1
    assert "Unexpected result 7.0 (message='too big')" in caplog.messages[0]


def test_unexpectedly_large(machine: RerunStateMachine) -> None:
    is_large = functools.partial(machine.is_unexpectedly_large, threshold=10, context="loss", num_samples=3)
    assert not any(is_large(torch.tensor(value)) for value in (1.0, float("nan"), -4.0, 2.0))
    assert not is_large(torch.tensor(39.0))
    assert is_large(torch.tensor(40.0))
    assert is_large(torch.tensor(-41.0))
    assert not machine.is_unexpectedly_large(torch.tensor(100.0), 10, "grads", num_samples=3)
    assert not is_large(torch.tensor(50.0), resample=True)


def test_the_largest_values_survive_a_restart(machine: RerunStateMachine) -> None:
    for value in (1.0, 2.0):
        machine.is_unexpectedly_large(torch.tensor(value), 10, "loss", num_samples=2)
    resumed = RerunStateMachine()
    resumed.load_state_dict(machine.state_dict(None, "torch"))
    assert resumed.is_unexpectedly_large(torch.tensor(20.0), 10, "loss", num_samples=2)
    assert not resumed.is_unexpectedly_large(torch.tensor(19.0), 10, "loss", num_samples=2)


def test_the_state_is_plain_data(machine: RerunStateMachine, tmp_path: Path) -> None:
    machine.is_unexpectedly_large(torch.tensor(3.0), 10, "loss")
    torch.save(machine.state_dict(None, "torch"), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["mode"] == RerunMode.DISABLED
    assert state["max_values"] == {"loss": 3.0}


def test_states_of_other_writers_load(machine: RerunStateMachine) -> None:
    machine.load_state_dict(
        {
            "mode": RerunMode.DISABLED,
            "sharded": {
                "current_iteration": 4,
                "data_iterator_checkpoints": None,
                "large_value_counts": {"loss": 100},
                "max_values": {"loss": 2.5},
            },
        }
    )
    assert machine.current_iteration == 4
    assert machine.is_unexpectedly_large(torch.tensor(25.0), 10, "loss")


def test_modes_that_repeat_are_not_built() -> None:
    with pytest.raises(NotBuiltYetError, match=r"rerun_mode validate_results.*Use disabled"):
        RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    with pytest.raises(NotBuiltYetError):
        RerunStateMachine().set_mode(RerunMode.REPORT_DETERMINISM_STATS)


def test_rejected_results_are_tracked(tmp_path: Path) -> None:
    tracker = tmp_path / "rejected.txt"
    machine = RerunStateMachine(result_rejected_tracker_filename=str(tracker))
    for iteration in (7, 3, 7):
        machine.current_iteration = iteration
        machine.validate_result(1.0, rejection_func=lambda value: True, fatal=False)
    assert RerunStateMachine.get_skipped_iterations_from_tracker_file(str(tracker)) == [2, 6]
    assert RerunStateMachine.get_skipped_iterations_from_tracker_file(str(tmp_path / "absent")) == []


def test_one_machine_per_process() -> None:
    rerun.destroy_rerun_state_machine()
    first = rerun.get_rerun_state_machine()
    assert first.get_mode() is RerunMode.DISABLED
    assert rerun.get_rerun_state_machine() is first
    rerun.initialize_rerun_state_machine()
    assert rerun.get_rerun_state_machine() is not first
    rerun.destroy_rerun_state_machine()


def test_the_iterator_passes_batches_on() -> None:
    batches = RerunDataIterator([1, 2])
    assert list(batches) == [1, 2]
    source = iter([1])
    assert RerunDataIterator(source).iterable is source
