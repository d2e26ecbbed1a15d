"""The README's section on own data, typed as it stands, with smaller numbers; then the generation tool."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from launcher import pretrain_gpt
from megatron.core.errors import ConfigError
from megatron.training.default_data.corpus import corpus_texts, train_vocabulary, write_corpus
from megatron.training.default_data.corpus import standard_library as library

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
        ["bash", "-c", command], cwd=directory, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory in which the first two lines have been typed, and what training printed."""
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
    preprocess, train, _ = own_data_commands()
    run = type_in(directory, preprocess)
    assert run.returncode == 0, run.stdout + run.stderr
    assert train.startswith("python pretrain_gpt.py ")
    return directory, pretrain_gpt(words_of(train), directory).check().output


def words_of(command: str) -> list[str]:
    """The arguments of a ``python pretrain_gpt.py`` line, with every loss shown.

    A forked test run cannot start the loader's workers as a user's process does, so there are none.
    """
    return [*shlex.split(command.replace("\\\n", " "))[2:], "--log-interval", "1", "--num-workers", "0"]


def test_training_ends_with_losses_and_a_checkpoint(trained) -> None:
    directory, training = trained
    assert "validation loss at iteration 4 on validation set" in training
    assert (directory / "my_checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_the_same_command_again_resumes(trained, tmp_path: Path) -> None:
    directory, _ = trained
    shutil.copytree(directory, tmp_path / "again", symlinks=True)
    longer = words_of(own_data_commands()[1].replace("--train-iters 4", "--train-iters 6"))
    run = pretrain_gpt([*longer, "--override-opt_param-scheduler"], tmp_path / "again")
    assert sorted(run.check().losses) == [5, 6]
    assert (tmp_path / "again" / "my_checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_generation_prints_the_text_alone(trained) -> None:
    directory, _ = trained
    run = type_in(directory, own_data_commands()[2])
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Once")
    assert "iteration" not in run.stdout
    assert len(run.stdout) > len("Once") + 20


def test_generation_help_lists_its_flags(trained) -> None:
    run = type_in(trained[0], "python tools/generate.py --help")
    assert run.returncode == 0 and "--top-p" in run.stdout and "--load" in run.stdout
    assert "--num-layers" not in run.stdout
    run = type_in(trained[0], "python tools/generate.py")
    assert run.returncode == 2 and "the following arguments are required: --load, --prompt" in run.stderr


def test_generation_fails_with_one_line(trained) -> None:
    run = type_in(trained[0], "python tools/generate.py --load nowhere --prompt a")
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert "nowhere" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_tool", ROOT / "tools" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOAD = "--load my_checkpoints --prompt a"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{LOAD} --top-p 2", "--top-p 2.0"),
        (f"{LOAD} --max-new-tokens 0", "--max-new-tokens 0"),
        (f"{LOAD} --vocab-file /gone.json", "--vocab-file /gone.json, which is not there"),
        (f"{LOAD} --merge-file gone.txt", "--merge-file gone.txt, which is not there"),
    ],
)
def test_generation_names_bad_arguments(trained, tool, monkeypatch, words: str, said: str) -> None:
    monkeypatch.chdir(trained[0])
    monkeypatch.setattr(sys, "argv", ["generate.py", *words.split()])
    with pytest.raises(ConfigError, match=re.escape(said)):
        tool.main()


@pytest.mark.parametrize("size", [100, 5000])
def test_generation_never_prints_a_padded_id(golden, tool, monkeypatch, tmp_path, size: int) -> None:
    """The model was trained on 64 ids; a larger --vocab-size would make tokens of the rows behind them."""
    monkeypatch.chdir(tmp_path)
    checkpoint = golden / "ckpt" / "torch_tp1pp1"
    words = ["generate.py", "--load", str(checkpoint), "--prompt", "1", "--vocab-size", str(size)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ConfigError, match=rf"--vocab-size {size}: the checkpoint was trained with 63"):
        tool.main()


def test_generation_takes_model_and_tokenizer_from_the_checkpoint(trained, tool, monkeypatch) -> None:
    """The command line may still say where the vocabulary is now."""
    monkeypatch.chdir(trained[0])
    moved = str(trained[0] / "vocab.json")
    monkeypatch.setattr(sys, "argv", ["generate.py", *LOAD.split(), "--vocab-file", moved])
    args = tool.arguments()
    assert (args.hidden_size, args.seq_length, args.num_layers) == (32, 32, 4)
    assert args.bf16
    assert not args.fp16
    assert (args.vocab_file, args.merge_file, args.tokenizer_type) == (
        moved,
        "merges.txt",
        "GPT2BPETokenizer",
    )
