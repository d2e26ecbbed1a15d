"""Order, errors and large messages of the worker pool."""

import os
import signal
import sys
import time

import numpy as np
import pytest

from megatron.core.errors import ConfigError, DataError, MegatronError
from megatron.training.preprocessing.pool import Failure, SharedSlots, WorkerError, WorkerPool, map_here
from megatron.training.preprocessing.readers import LineBytes
from megatron.training.preprocessing.records import RecordError


class Echo:
    """Sends back its task; a few tasks are orders."""

    facts = "ready"

    def __call__(self, task):
        if isinstance(task, str):
            os._exit(7)
        if isinstance(task, BaseException):
            raise task
        if isinstance(task, float):
            time.sleep(task)
        return task


def results(pool, tasks):
    """Copies of the results: they are views of shared memory, good until the next one."""
    return [
        np.array(result) if isinstance(result, np.ndarray) else result
        for _, result in pool.map_in_order(tasks)
    ]


def test_results_have_the_order_of_the_tasks():
    tasks = [0.2, 1, 0.0, 2, 3, 0.05, 4, *range(5, 60)]
    with WorkerPool(Echo, 3) as pool:
        assert pool.facts == "ready"
        assert results(pool, iter(tasks)) == tasks
        assert results(pool, iter([])) == []
    assert [result for _, result in map_here(Echo(), iter(tasks))] == tasks


@pytest.mark.parametrize("size", [0, 1, 1000, 3_000_000, 20_000_000])
def test_arrays_and_bytes_of_every_size_are_transferred_unchanged(size):
    """Beyond 16 MiB they do not fit the shared memory and take the pipe."""
    array = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    with WorkerPool(Echo, 2) as pool:
        tasks = [LineBytes(array.tobytes()), array, {"a": array, "b": array[::-1].copy()}] * 3
        for task, result in pool.map_in_order(iter(tasks)):
            if isinstance(task, LineBytes):
                assert bytes(result.data) == task.data
            elif isinstance(task, dict):
                assert all(np.array_equal(result[key], task[key]) for key in task)
            else:
                assert np.array_equal(result, task)


def test_results_are_transferred_without_shared_memory():
    assert SharedSlots(0, 100)[5].nbytes == 0


def test_results_waiting_for_a_late_one_are_bounded():
    """No more tasks are taken than the window holds."""
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield 0.5 if number == 0 else number

    with WorkerPool(Echo, 2) as pool:
        first, _ = next(pool.map_in_order(tasks()))
    assert first == 0.5 and len(taken) <= 2 * 2 + 2 + 1


def test_failures_are_returned_in_order():
    with WorkerPool(Echo, 3) as pool:
        found = results(pool, iter([0.2, RecordError(4, "bad"), 1, ConfigError("no"), ValueError("odd")]))
    assert found[0] == 0.2 and found[2] == 1
    assert all(isinstance(found[place], Failure) for place in (1, 3, 4))
    assert isinstance(found[1].error, RecordError) and found[1].error.index == 4
    assert isinstance(found[3].error, MegatronError) and str(found[3].error) == "no"
    assert "Traceback" in str(found[4].error) and "odd" in str(found[4].error)


def test_an_error_in_making_tasks_is_raised_after_earlier_results():
    def tasks():
        yield 0.3
        yield 1
        raise DataError("cut short")

    taken = []
    with pytest.raises(DataError, match="cut short"), WorkerPool(Echo, 2) as pool:
        for _, result in pool.map_in_order(tasks()):
            taken.append(result)
    assert taken == [0.3, 1]


def test_death_of_a_worker_is_an_error():
    message = r"worker 0 .* ended by itself with exit status 7"
    with pytest.raises(WorkerError, match=message), WorkerPool(Echo, 1) as pool:
        results(pool, iter([1, "die", 2]))


def test_death_of_an_idle_worker_is_an_error():
    with pytest.raises(WorkerError, match="SIGKILL"), WorkerPool(Echo, 2) as pool:
        assert results(pool, iter([1, 2, 3])) == [1, 2, 3]
        first = pool._workers[0].process
        first.kill()
        first.join()
        results(pool, iter([30.0]))  # the other one is asleep for longer than a test may take


def test_spawned_workers_give_the_same_results(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with WorkerPool(Echo, 2) as pool:
        assert pool._workers[0].process.__class__.__name__ == "SpawnProcess"
        assert results(pool, iter([3, 1, 2])) == [3, 1, 2]


def fails_to_build():
    raise ConfigError("no such vocabulary")


def dies_while_building():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("build", "message"),
    [(fails_to_build, "^no such vocabulary$"), (dies_while_building, "SIGKILL.*out of memory")],
)
def test_failure_to_build_is_raised(build, message):
    with pytest.raises(MegatronError, match=message):
        WorkerPool(build, 2)


def test_messages_printed_while_building_appear_once(capfd):
    def build():
        os.write(1, b"built\n")
        os.write(2, b"warning\n")
        return Echo()

    with WorkerPool(build, 3):
        pass
    out, err = capfd.readouterr()
    assert (out.count("built"), err.count("warning")) == (1, 1)
