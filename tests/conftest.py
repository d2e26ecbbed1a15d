"""Shared fixtures: the golden figures, and the switch for slow sweeps."""

import os
from pathlib import Path

# Before torch is imported: test models are tiny, and xdist workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A device's package that is installed without its driver would end "import torch". Tests are for the CPU
# unless MEGATRON_DEVICE says otherwise.
if os.environ.get("MEGATRON_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the slow sweeps")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    items[:] = [item for item in items if "slow" not in item.keywords]
    config.hook.pytest_deselected(items=slow)


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
