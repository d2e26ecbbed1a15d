"""No tool imports what it does not need: torch takes a second, and gigabytes on a disk."""

import os
import re
import subprocess
import sys

import pytest
from source_tree import ROOT

WITHOUT_TORCH = ["compare_runs.py", "draw_schedule.py", "merge_datasets.py", "preprocess_data.py"]


def imported_by(*words: str) -> set[str]:
    """Modules that a Python command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("tool", WITHOUT_TORCH)
def test_a_tool_for_text_or_pictures_needs_no_torch(tool: str) -> None:
    modules = imported_by(f"tools/{tool}", "--help")
    assert "argparse" in modules and "torch" not in modules


def test_flags_need_no_torch() -> None:
    assert "torch" not in imported_by("-c", "from megatron.training.arguments import parse_args")
    assert "torch" in imported_by("-c", "import megatron.core.accelerator")
