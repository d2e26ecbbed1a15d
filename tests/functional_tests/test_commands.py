"""``megatron-npu``, installed from a wheel, in directories that hold no checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.default_data.corpus import (
    corpus_texts,
    standard_library,
    train_vocabulary,
    write_corpus,
)
from megatron_npu.virtual import cann
from tests.functional_tests.wheel import install_wheel

TOKENIZER = "--tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt"
TRAIN = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --train-iters 2 --lr 1e-3 --split 100,0,0 --eval-iters 0 --log-interval 1 "
    f"--save model --save-interval 2 --num-workers 0 {TOKENIZER}"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a wheel built from these sources is installed, without the libraries it needs."""
    target = tmp_path_factory.mktemp("installed")
    install_wheel(tmp_path_factory.mktemp("source"), target)
    return target


@pytest.fixture(scope="module")
def command(installed: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs ``megatron-npu WORDS``, in an empty directory unless told another."""

    def run(words: str, directory: Path | None = None, start: tuple = ()) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*(start or (str(installed / "bin" / "megatron-npu"),)), *words.split()],
            cwd=directory or tmp_path_factory.mktemp("empty"),
            env=os.environ | {"PYTHONPATH": str(installed), "MEGATRON_DEVICE": "cpu"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory with a model, and the log of its training, made by the commands alone."""
    directory = tmp_path_factory.mktemp("work")
    for name in ("first", "second"):
        modules = [(module, 0) for module in ("argparse.py", "textwrap.py")]
        write_corpus(standard_library(), modules, directory / f"{name}.jsonl")
        if name == "first":
            train_vocabulary(corpus_texts(directory / "first.jsonl"), directory, 300)
        (directory / name).mkdir()
        done = command(f"preprocess --input {name}.jsonl --output-prefix {name}/part {TOKENIZER}", directory)
        assert done.returncode == 0, done.stderr
        (directory / name / "part_text_document.bin").rename(directory / f"parts_{name}.bin")
        (directory / name / "part_text_document.idx").rename(directory / f"parts_{name}.idx")
    (directory / "parts").mkdir()
    for part in directory.glob("parts_*"):
        part.rename(directory / "parts" / part.name)
    done = command("merge --input parts --output-prefix whole", directory)
    assert done.returncode == 0 and "Merged 2 data sets" in done.stdout, done.stderr
    done = command(f"train --data-path whole {TRAIN}", directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


def test_an_installation_trains_and_generates(command, trained) -> None:
    directory, log = trained
    assert re.findall(r"iteration +(\d+)/", log) == ["1", "2"]
    assert (directory / "model" / "latest_checkpointed_iteration.txt").read_text() == "2"
    done = command("generate --load model --prompt def --max-new-tokens 5", directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def") and len(done.stdout) > len("def\n")


def test_two_logs_are_compared(command, trained) -> None:
    directory, log = trained
    (directory / "a.log").write_text(log)
    (directory / "b.log").write_text(re.sub(r"lm loss: \S+", "lm loss: 1.0E+00", log))
    assert "mean relative error: 0.000e+00" in command("compare a.log a.log", directory).stdout
    done = command("compare a.log b.log", directory)
    assert done.returncode == 1 and "first iteration beyond 0.01: 1" in done.stdout


def test_a_schedule_is_drawn(command) -> None:
    done = command("draw -p 4 -m 8")
    assert done.returncode == 0 and "0.3750" in done.stdout  # (p - 1) / m


def test_replacements_are_checked_where_there_is_an_npu(command) -> None:
    done = command("check")
    assert done.returncode == 2
    assert done.stderr == "error: nothing to compare, MEGATRON_DEVICE=cpu\n"


@pytest.mark.parametrize("name", ["train", "preprocess", "merge", "generate", "compare", "draw", "virtual"])
def test_help_of_every_command_shows_its_name(command, name: str) -> None:
    done = command(f"{name} --help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"usage: megatron-npu {name} ")


def test_virtual_npu_runs_or_names_the_missing_package(command) -> None:
    """The rest of this command is tested where torch_npu is installed."""
    done = command("virtual --devices 1 -- printenv MEGATRON_DEVICE")
    if cann.why_not() is None:
        assert (done.returncode, done.stdout) == (0, "npu\n"), done.stderr
    else:
        assert (done.returncode, done.stderr) == (1, f"error: no virtual NPU here: {cann.why_not()}\n")


def test_help_lists_all_commands(command) -> None:
    done = command("")
    assert done.returncode == 0
    names = re.findall(r"^  (\w+) +\w", done.stdout, re.MULTILINE)
    assert names == ["train", "preprocess", "merge", "generate", "compare", "draw", "check", "virtual"]
    done = command("trian --num-layers 2")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: megatron-npu has no command trian. Did you mean train?")
    version = command("--version").stdout.split()
    assert version[0] == "megatron-npu" and re.fullmatch(r"0\.12\.\S+", version[1])


def test_commands_run_as_a_module(command) -> None:
    done = command("draw -p 2 -m 2", start=(sys.executable, "-m", "megatron.cli"))
    assert done.returncode == 0 and "0.5000" in done.stdout


def test_the_default_data_is_made_without_a_checkout(command, tmp_path: Path) -> None:
    """The launch scripts' data set, here of two modules."""
    (tmp_path / "library").mkdir()
    for name in ("argparse.py", "ast.py"):
        shutil.copy(standard_library() / name, tmp_path / "library")
    (tmp_path / "make.py").write_text(
        "from pathlib import Path\n"
        "from megatron.training.default_data.recipe import ensure_default_data\n"
        "print(ensure_default_data(Path('cache'), Path('library')).data_path)\n"
    )
    done = command("make.py", tmp_path, start=(sys.executable,))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.strip()).with_suffix(".idx").is_file()
