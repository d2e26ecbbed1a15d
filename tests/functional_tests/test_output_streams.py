"""A log that cannot be written does not end a run: a full disk, a reader that leaves, a closed stdout."""

import os
import subprocess
import sys

import pytest

# Prints more than any buffer holds, then leaves proof that it came to its end.
PROGRAM = """
import sys
from pathlib import Path
from megatron.training.entry import run_main

def main():
    for number in range(20_000):
        print("line", number, "with \\u4e2d\\u6587")
    sys.stdout.flush()
    Path("proof").write_text("the end")

run_main(main)
"""


def run(repo_root, directory, command: str, **environment: str) -> subprocess.CompletedProcess:
    """A shell command in which ``$PROGRAM`` is a Python process that prints a lot."""
    (directory / "program.py").write_text(PROGRAM, encoding="utf-8")
    variables = {
        **os.environ,
        "PYTHONPATH": str(repo_root),
        "PROGRAM": f"{sys.executable} program.py",
        **environment,
    }
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=directory,
        env=variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("command", "warning"),
    [
        ("$PROGRAM > /dev/full", "WARNING: stdout cannot be written (No space left on device)"),
        ("$PROGRAM | true", "WARNING: stdout cannot be written (Broken pipe)"),
        ("$PROGRAM > /dev/full 2>&1", ""),
        ("$PROGRAM >&-", ""),
        ("$PROGRAM >&- 2>&- <&-", ""),
        ("$PROGRAM 2> /dev/full >&-", ""),
    ],
)
def test_a_run_ends_well_although_its_output_is_lost(repo_root, tmp_path, command, warning) -> None:
    done = run(repo_root, tmp_path, command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "proof").read_text() == "the end"
    assert done.stderr.count("\n") == (1 if warning else 0)
    assert warning in done.stderr


def test_a_locale_without_the_characters_does_not_end_a_run(repo_root, tmp_path) -> None:
    done = run(repo_root, tmp_path, "$PROGRAM > out", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text(encoding="ascii").splitlines()[7] == "line 7 with \\u4e2d\\u6587"


def test_a_file_opened_by_a_run_does_not_take_the_number_of_a_closed_stdout(repo_root, tmp_path) -> None:
    program = PROGRAM.replace(
        'Path("proof")', 'import os; file = open("data", "w"); os.write(1, b"x"); Path("proof")'
    )
    (tmp_path / "other.py").write_text(program, encoding="utf-8")
    done = run(repo_root, tmp_path, f"{sys.executable} other.py >&-")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "proof").exists() and (tmp_path / "data").read_text() == ""


def test_a_launch_script_trains_on_when_nobody_reads_its_log(repo_root, tmp_path) -> None:
    environment = {
        "CKPT_PATH": str(tmp_path / "ckpt"),
        "PYTHON": sys.executable,
        "MEGATRON_DEVICE": "cpu",
        "MEGATRON_CACHE": str(tmp_path / "cache"),
    }
    script = repo_root / "tests_gpt" / "pretrain_gpt_distributed_bf16.sh"
    flags = "--mock-data --num-layers 1 --hidden-size 16 --train-iters 2 --eval-iters 0 --vocab-size 4200 "
    flags += "--tokenizer-type NullTokenizer --seq-length 16 --max-position-embeddings 16"
    done = run(repo_root, tmp_path, f"bash {script} {flags} 2>&1 | true", **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
