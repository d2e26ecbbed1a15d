"""The README's section on own data, typed as it stands, with smaller numbers; then the generation tool."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.default_data.corpus import corpus_texts, write_corpus
from megatron.training.default_data.corpus import standard_library as library
from megatron.training.default_data.vocabulary import train_vocabulary

ROOT = Path(__file__).resolve().parents[2]
SMALLER = {
    "--hidden-size 256": "--hidden-size 32",
    "--seq-length 256": "--seq-length 32",
    "--max-position-embeddings 256": "--max-position-embeddings 32",
    "--train-iters 200": "--train-iters 4",
    "--lr-warmup-iters 10": "--lr-warmup-iters 1",
    "--eval-iters 5": "--eval-iters 1",
    "--max-new-tokens 100": "--max-new-tokens 40",
}


def own_data_commands() -> list[str]:
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own data\n")[1].split("\n## ")[0]
    )
    commands = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(commands) == 3
    for old, new in SMALLER.items():
        assert old in section
        commands = [command.replace(old, new) for command in commands]
    return commands


def type_in(directory: Path, command: str) -> subprocess.CompletedProcess:
    """Run a line as a user would, in a directory that looks like a clone."""
    environment = os.environ | {"PATH": f"{directory}:{os.environ['PATH']}", "MEGATRON_DEVICE": "cpu"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        ["bash", "-c", command], cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory in which the first two lines have been typed, and what each of the two printed."""
    directory = tmp_path_factory.mktemp("clone of mine")
    for name in ("tools", "pretrain_gpt.py"):
        (directory / name).symlink_to(ROOT / name)
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    modules = [
        (name, 0) for name in ("argparse.py", "textwrap.py", "shlex.py", "json/decoder.py", "ast.py") * 8
    ]
    write_corpus(library(), modules, directory / "my.jsonl")
    train_vocabulary(corpus_texts(directory / "my.jsonl"), directory, 500)
    printed = []
    for command in own_data_commands()[:2]:
        run = type_in(directory, command)
        assert run.returncode == 0, run.stdout + run.stderr
        printed.append(run.stdout)
    return directory, printed


def test_training_ends_with_losses_and_a_checkpoint(trained) -> None:
    directory, (_, training) = trained
    assert "validation loss at iteration 4 on validation set" in training
    assert (directory / "my_checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_the_same_line_again_goes_on(trained, tmp_path: Path) -> None:
    directory, _ = trained
    shutil.copytree(directory, tmp_path / "again", symlinks=True)
    longer = own_data_commands()[1].replace(
        "--train-iters 4", "--train-iters 6 --override-opt_param-scheduler"
    )
    run = type_in(tmp_path / "again", longer)
    assert run.returncode == 0, run.stdout + run.stderr
    iterations = [int(n) for n in re.findall(r"iteration +(\d+)/ +6 \|", run.stdout)]
    assert all(n > 4 for n in iterations)
    assert (tmp_path / "again" / "my_checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_generation_prints_the_text_alone_and_a_seed_repeats_it(trained) -> None:
    directory, _ = trained
    command = own_data_commands()[2].strip()
    first, second, other = (type_in(directory, command + seed) for seed in ("", "", " --seed 5"))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Once")
    assert "iteration" not in first.stdout
    assert len(first.stdout) > len("Once") + 20
    assert first.stdout == second.stdout != other.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--prompt a", "--load is needed"),
        ("--load nowhere --prompt a", "nowhere"),
        ("--load my_checkpoints --prompt ''", "the prompt has no tokens"),
        ("--load my_checkpoints --prompt a --top-p 2", "--top-p 2.0"),
        ("--load my_checkpoints --prompt a --max-new-tokens 0", "--max-new-tokens 0"),
        ("--load my_checkpoints --prompt a --vocab-file /gone.json", "give --vocab-file its place now"),
    ],
)
def test_generation_says_what_is_wrong(trained, words: str, said: str) -> None:
    run = type_in(trained[0], f"python tools/generate.py {words}")
    assert run.returncode == 1
    assert said in run.stderr
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_generation_follows_a_vocabulary_that_moved(trained, tmp_path: Path) -> None:
    """Relative paths in a checkpoint belong to the directory training ran in."""
    directory, _ = trained
    files = f"--vocab-file {directory}/vocab.json --merge-file {directory}/merges.txt"
    files = files.replace(str(directory), "'" + str(directory) + "'")
    tool = f"'{sys.executable}' '{ROOT}/tools/generate.py' --load '{directory}/my_checkpoints' --prompt a"
    lost = type_in(tmp_path, tool)
    assert lost.returncode == 1
    assert "--vocab-file" in lost.stderr
    found = type_in(tmp_path, f"{tool} {files}")
    assert found.returncode == 0, found.stderr
