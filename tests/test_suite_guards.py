"""The guards of the suite notice what they are there for."""

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron.core import overrides, parallel_state
from tests import process_state, session_guard
from tests.conftest import shuffle
from tests.reserved_port import ReservedPort


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A guard of its own, as at the start of a run, inside of which pytest makes no folder."""
    monkeypatch.setattr(session_guard, "PATIENCE_S", 0.3)
    guard = session_guard.SessionGuard()
    yield guard
    guard.pytest_unconfigure()
    guard.remove_folder()


def test_a_clean_run_has_left_nothing(guard: session_guard.SessionGuard) -> None:
    done = subprocess.run([sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert Path(done.stdout.strip()) == guard.folder
    (guard.folder / "pytest-of-someone").mkdir()
    assert guard.leftovers() == []


def test_a_run_that_was_killed_leaves_its_folder_to_the_next_one(guard: session_guard.SessionGuard) -> None:
    code = "import os, tests.session_guard as g; print(g.SessionGuard().folder, flush=True); os._exit(1)"
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    folder = Path(killed.stdout.strip())
    assert folder.parent == guard.folder and (folder / session_guard.LOCK).exists()
    another = session_guard.SessionGuard()
    assert not folder.exists() and another.folder.exists()
    session_guard.SessionGuard().remove_folder()  # the folder of a run that goes on stays
    assert another.folder.exists()
    another.pytest_unconfigure()
    another.remove_folder()


def test_files_and_processes_that_stay_are_named_and_removed(guard: session_guard.SessionGuard) -> None:
    (guard.folder / "forgotten").mkdir()
    own = os.environ | {"TMPDIR": str(guard.folder / "forgotten")}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], env=own)
    process, file = guard.leftovers()
    assert process.startswith(f"process {child.pid}: ") and "time.sleep(1000)" in process
    assert file == str(guard.folder / "forgotten")
    guard.pytest_unconfigure()
    assert child.wait(60) == -signal.SIGKILL


@pytest.mark.skipif(not session_guard.SHARED_MEMORY.is_dir(), reason="has no folder of shared memory")
def test_shared_memory_that_stays_is_named(guard: session_guard.SessionGuard) -> None:
    path = session_guard.SHARED_MEMORY / f"forgotten_by_a_test_{os.getpid()}"
    path.touch()
    try:
        assert str(path) in guard.leftovers()
    finally:
        path.unlink()


def change_handlers() -> None:
    logging.getLogger().addHandler(logging.StreamHandler())


def start_a_world() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


# Also begins a process group of torch.
START = "megatron.core.parallel_state: initialized"
CHANGES = {
    "working directory": lambda: os.chdir("/"),
    "environment": lambda: os.environ.update(LEFT_BEHIND="1"),
    "sys.argv": lambda: sys.argv.append("--left"),
    "umask": lambda: os.umask(0o077),
    "signal handlers": lambda: signal.signal(signal.SIGUSR2, print),
    "logging": change_handlers,
    "torch: default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch: gradients enabled": lambda: torch.set_grad_enabled(False),
    "torch: deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "megatron.core.overrides: switched off": lambda: overrides.disable("all"),
    START: start_a_world,
}


def print_what_is_noticed() -> None:
    """The name of each change, and what the guard says after it: nothing before, one line after."""
    for name, change in CHANGES.items():
        before = process_state.take()
        quiet = process_state.differences(before, process_state.take())
        change()
        print(json.dumps([name, quiet, process_state.differences(before, process_state.take())]))


def test_what_a_test_leaves_changed_is_named(repo_root: Path) -> None:
    """In a process of its own, whose state nobody minds."""
    code = "import tests.test_suite_guards as here; here.print_what_is_noticed()"
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in rows] == list(CHANGES)
    for name, quiet, lines in rows:
        assert quiet == [] and lines and all(name in line or name == START for line in lines), (name, lines)


def test_streams_that_a_model_makes_are_put_back() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    before = process_state.PassingState()
    had = set(get_cuda_rng_tracker().get_states())
    model_parallel_cuda_manual_seed(1)
    assert set(get_cuda_rng_tracker().get_states()) > had
    before.put_back()
    assert set(get_cuda_rng_tracker().get_states()) == had


def test_a_seed_gives_one_order_that_keeps_files_together() -> None:
    def order(seed: int) -> list[tuple[str, int]]:
        items = [SimpleNamespace(path=f"file{number // 5}", number=number) for number in range(40)]
        shuffle(items, random.Random(seed))
        return [(item.path, item.number) for item in items]

    first, again, other = order(1), order(1), order(2)
    assert first == again != other
    assert sorted(number for _, number in first) == list(range(40))
    assert [number for _, number in first] != list(range(40))
    files = [path for path, _ in first]
    assert all(files[5 * place : 5 * place + 5] == [files[5 * place]] * 5 for place in range(8))
    assert [number % 5 for _, number in first[:5]] != [number % 5 for _, number in first[5:10]]


def test_a_reserved_port_is_given_to_a_server_that_asks_for_it_and_to_nobody_else() -> None:
    with ReservedPort() as port:
        store = dist.TCPStore("127.0.0.1", port.number, 1, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert store.get("key") == b"value"
        del store
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port.number))
        with ReservedPort() as another:
            assert another.number != port.number
