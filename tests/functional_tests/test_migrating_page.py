"""``docs/migrating.md``: its commands run, both languages say the same, what it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.arguments.parsing import build_parser
from megatron.training.default_data.corpus import corpus_texts, train_vocabulary, write_corpus
from megatron.training.default_data.corpus import standard_library as library

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = (ROOT / "docs" / name for name in ("migrating.md", "migrating_zh.md"))
COMMANDS = re.findall(r"^```sh\n(.*?)\n```$", ENGLISH.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
# The sizes of a trial, in the variables that the page names, and in flags of the fork's script.
SIZES = {"GPUS_PER_NODE": "2", "NUM_LAYERS": "2", "HIDDEN_SIZE": "32", "NUM_HEADS": "2", "SEQ_LENGTH": "16"}
SIZES |= {"GLOBAL_BATCH": "4", "TRAIN_ITERS": "3"}
FORK_FLAGS = "--num-layers 2 --hidden-size 32 --seq-length 16 --max-position-embeddings 16 --train-iters 3"
FORK_FLAGS += " --lr-decay-iters 3 --eval-iters 1 --log-interval 1 --num-workers 0"


def type_in(directory: Path, command: str, **variables: str) -> str:
    """What a command prints when typed in a directory that looks like a clone."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "MEGATRON_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"PYTHON": sys.executable, **variables}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", command], cwd=directory, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like a clone, with the files of the page and its first command typed."""
    import pyarrow
    import pyarrow.parquet

    directory = tmp_path_factory.mktemp("migrating")
    for name in ("tools", "examples", "tests_gpt", "pretrain_gpt.py", "megatron", "megatron_npu"):
        (directory / name).symlink_to(ROOT / name)
    (directory / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (directory / "python").chmod(0o755)
    modules = [(name, 0) for name in ("argparse.py", "textwrap.py", "shlex.py", "ast.py") * 8]
    write_corpus(library(), modules, directory / "my.jsonl")
    texts = list(corpus_texts(directory / "my.jsonl"))
    train_vocabulary(iter(texts), directory, 500)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / "my.parquet")
    for name, loss in (("gpu", 5.0), ("npu", 5.001)):
        (directory / f"{name}.log").write_text(f" iteration 1/ 1 | lm loss: {loss:.6E} | grad norm: 1.0 |\n")
    type_in(directory, COMMANDS[0])
    return directory


def test_both_languages_have_the_same_commands_and_tables() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in (ENGLISH, CHINESE))
    block = re.compile(r"^```sh\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
    assert block.findall(english) == block.findall(chinese) == COMMANDS
    for mark in ("\n## ", "\n| "):
        assert english.count(mark) == chinese.count(mark)


def test_both_readmes_point_to_it() -> None:
    assert "docs/migrating.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "docs/migrating_zh.md" in (ROOT / "README_zh.md").read_text(encoding="utf-8")


def test_files_and_flags_that_it_tells_to_use_exist() -> None:
    text = ENGLISH.read_text(encoding="utf-8")
    here = " ".join(line.rpartition(" | ")[2] for line in text.splitlines() if line.startswith("| "))
    named = set(re.findall(r"`((?:examples|docs|tools)/[\w./]+)`", here))
    assert len(named) >= 4 and not [name for name in named if not (ROOT / name).exists()]
    flags = {name for action in build_parser()._actions for name in action.option_strings}
    assert not set(re.findall(r"`(--[a-z0-9-]+)", here)) - flags


def test_data_of_the_guides_is_read_as_it_is(clone: Path) -> None:
    assert (clone / "my_data_text_document.bin").stat().st_size > 10_000


def test_gpt3_script_trains_with_four_paths_and_with_five(clone: Path, tmp_path: Path) -> None:
    flags = " --log-interval 1 --eval-iters 1 --num-workers 0"
    shown = type_in(clone, COMMANDS[1] + flags, **SIZES)
    assert "2 process(es): tensor 2, pipeline 1, data 1" in shown and "iteration        3/       3" in shown
    assert (clone / "checkpoints" / "gpt3" / "latest_checkpointed_iteration.txt").read_text() == "3"
    five = COMMANDS[1].replace("checkpoints/gpt3", f"{tmp_path}/ckpt {tmp_path}/tensorboard")
    type_in(clone, five + flags, **SIZES | {"GPUS_PER_NODE": "1"})
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_gpt3_script_says_how_many_paths_it_wants(clone: Path) -> None:
    shown = type_in(clone, f"! {COMMANDS[1].rpartition(' ')[0]}")
    assert shown.startswith("error: 3 paths before the first flag, where 4 or 5 are needed")


def test_table_of_replacements_is_printed(clone: Path) -> None:
    assert "rms_norm" in type_in(clone, COMMANDS[2])


def test_two_logs_are_compared(clone: Path) -> None:
    assert "relative" in type_in(clone, COMMANDS[3])


def test_fork_script_trains(clone: Path) -> None:
    shown = type_in(clone, f"{COMMANDS[4]} {FORK_FLAGS}")
    assert "on validation set" in shown
    # The script's own --split gives the 32 documents no test set.
    assert "the test split of my_data_text_document is empty" in shown and "on test set" not in shown
    assert (clone / "checkpoints" / "fork" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_loop_of_the_library_alone_trains(clone: Path) -> None:
    assert "loss" in type_in(clone, f"{COMMANDS[5]} 2")


def test_short_help_is_shown(clone: Path) -> None:
    assert "--num-layers N" in type_in(clone, COMMANDS[6])
    assert len(COMMANDS) == 7
