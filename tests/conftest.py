"""Shared fixtures: the golden figures, the switch for slow sweeps, their order, and what they leave."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: test models are tiny, and xdist workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before a tokenizer is built, which would set it for good.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A device's package that is installed without its driver would end "import torch". Tests are for the CPU
# unless MEGATRON_DEVICE says otherwise.
if os.environ.get("MEGATRON_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import pytest

from tests import process_state, session_guard

# A shell starts what runs in the background with Ctrl-C ignored, nohup with a hang-up ignored, and programs
# that tests send signals to would inherit that. A handler that does nothing stays behind at the next exec.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        _answer = {signal.SIGINT: signal.default_int_handler, signal.SIGQUIT: signal.SIG_DFL}
        signal.signal(_number, _answer.get(_number, lambda number, frame: None))

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the slow sweeps")
    parser.addoption(
        "--random-order", type=int, metavar="SEED", help="shuffle the files, and the tests of each file"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not a worker of xdist
        config.pluginmanager.register(session_guard.SessionGuard(), "session guard")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        session_guard.end_helpers()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--random-order")) is not None:
        shuffle(items, random.Random(seed))
    if config.getoption("--all"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    items[:] = [item for item in items if "slow" not in item.keywords]
    config.hook.pytest_deselected(items=slow)


def shuffle(items: list[pytest.Item], generator: random.Random) -> None:
    """Shuffle files, and tests within their file: fixtures of a file are made once."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = list(files)
    generator.shuffle(order)
    for tests in files.values():
        generator.shuffle(tests)
    items[:] = [item for path in order for item in files[path]]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Also in a random order: what a test draws must not depend on the tests before it.
    process_state.seed(item.config.getoption("--random-order") or 0)


def _unchanged_process() -> Iterator[None]:
    before, passing = process_state.take(), process_state.PassingState()
    yield
    passing.put_back()
    changes = process_state.differences(before, process_state.take())
    assert not changes, "left changed for the tests that come next:\n" + "\n".join(changes)


@pytest.fixture(autouse=True, scope="module")
def unchanged_by_file() -> Iterator[None]:
    """A file of tests leaves the process as it found it, its own wider fixtures included."""
    yield from _unchanged_process()


@pytest.fixture(autouse=True)
def unchanged_by_test(unchanged_by_file: None) -> Iterator[None]:
    """A test leaves the process as it found it."""
    yield from _unchanged_process()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--all"):
        terminalreporter.write_line("Slow sweeps were left out: --all runs them too.")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the figures measured on Megatron-LM core_v0.12.1."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT
