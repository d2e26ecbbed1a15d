"""Every example runs as written."""

import re
import subprocess
import sys

import pytest


@pytest.fixture
def run(repo_root, tmp_path):
    def start(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)

    return start


def test_training_with_core_alone(run, repo_root):
    process = run(repo_root / "examples" / "train_gpt_with_core.py", 12)
    assert process.returncode == 0, process.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", process.stdout)]
    assert len(losses) == 12
    assert min(losses[6:]) < losses[0] - 0.2


def test_no_example_is_forgotten(repo_root):
    examples = {path.name for path in (repo_root / "examples").rglob("*.py")}
    assert examples == {"train_gpt_with_core.py"}, "give each new example a test here"
