"""Pages typed from top to bottom, as they stand, in a directory that looks like a clone.

``pretrain_gpt.py`` and ``torchrun`` start processes forked from one that has imported torch already, with the
words that the shell makes of the line; everything else, and the first torchrun line, goes through the shell.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import RUN_ELSEWHERE, TYPED_IN_ORDER
from tests.docs.pages import ROOT, Page
from tests.functional_tests.launcher import Run, pretrain_gpt, pretrain_gpt_ranks

TIMEOUT_S = 900


class Reader:
    """Someone who types what a page shows, and remembers the variables that it sets.

    Args:
        directory: like a clone, with a ``python`` of its own first in the search path.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.assignments: list[str] = []

    def type(self, command: str, in_the_shell: bool = False) -> str:
        """What a command prints; the test fails where it fails."""
        if re.match(r"[A-Z]+=\"", command):
            self.assignments.append(command)
            return ""
        launched = re.match(
            r"(?:MEGATRON_DEVICE=cpu )?(python|torchrun --nproc-per-node (\d+)) pretrain_gpt.py", command
        )
        if launched is None or in_the_shell or re.search(r"-h$|--help", command):
            return self.shell(command)
        line, _, file = command[launched.end() :].partition(" > ")
        words = self.shell(f"printf '%s\\n' {line}").split("\n")[:-1]
        if launched[2] is None:
            runs = [pretrain_gpt(words, self.directory)]
        else:
            runs = pretrain_gpt_ranks(int(launched[2]), words, self.directory)
        printed = "".join(run.check().output for run in runs)
        if file:
            (self.directory / file).write_text(printed)
        return printed

    def shell(self, command: str) -> str:
        """The same through bash."""
        variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHONPATH")}
        variables |= {"PATH": f"{self.directory}:{os.environ['PATH']}", "MEGATRON_DEVICE": "cpu"}
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", "\n".join([*self.assignments, command])],
            cwd=self.directory, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def python(self, program: str) -> str:
        """A program in Python."""
        (self.directory / "program.py").write_text(program)
        return self.shell(f"PYTHONPATH={ROOT} python program.py")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Reader:
    """A reader in a directory with the project's files, a data set, and one in two parts."""
    directory = tmp_path_factory.mktemp("reader")
    for name in ("tools", "examples", "pretrain_gpt.py", "megatron", "megatron_npu"):
        (directory / name).symlink_to(ROOT / name)
    for name, words in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        (directory / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (directory / name).chmod(0o755)
    (directory / "parts").mkdir()
    for suffix in (".bin", ".idx"):
        source = golden / "data" / f"u16_text_document{suffix}"
        shutil.copy(source, directory / f"my_text_document{suffix}")
        for part in ("a", "b"):
            shutil.copy(source, directory / "parts" / f"{part}_text_document{suffix}")
    return Reader(directory)


def typed(page: str) -> list[str]:
    """The commands of a page that no other test runs."""
    return [
        command
        for command in Page(page).commands
        if not any(row.fits(page, command) for row in RUN_ELSEWHERE)
    ]


def losses(output: str) -> dict[int, float]:
    return Run(0, output).losses


def type_page(reader: Reader, page: str) -> list[str]:
    """What each command of a page printed, but for the lines that set a variable."""
    reader.assignments.clear()
    return [printed for command in typed(page) if (printed := reader.type(command))]


def test_start_page(reader: Reader) -> None:
    short, long, about, trained = type_page(reader, "docs/index.md")
    assert "--num-layers N" in short and len(long) > 2 * len(short) and "--ckpt-format" in about
    assert sorted(losses(trained)) == [5, 10] and "on validation set" in trained


def test_concepts_show_what_the_tool_prints(reader: Reader) -> None:
    shown = [block.text for block in Page("docs/concepts.md").blocks if block.language == "text"]
    assert type_page(reader, "docs/concepts.md") == shown and len(shown) == 3


def test_own_data_page(reader: Reader) -> None:
    (merged,) = type_page(reader, "docs/own_data.md")
    assert "Merged 2 data sets" in merged
    sizes = [(reader.directory / f"{name}.bin").stat().st_size for name in ("whole", "my_text_document")]
    assert sizes[0] == 2 * sizes[1]


@pytest.fixture(scope="module")
def resumed(reader: Reader) -> list[str]:
    """What the commands of the page about resuming print; its checkpoints stay for the page on formats."""
    return type_page(reader, "docs/resume.md")


def test_resume_page(reader: Reader, resumed: list[str]) -> None:
    first, second, longer, tuned = resumed
    assert "exiting program at iteration 10" in first
    tracker = reader.directory / "demo" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "30"
    for printed, iteration in ((second, 10), (longer, 20)):
        assert re.search(rf"loaded checkpoint .* at iteration {iteration}\b", printed), printed
    assert re.search(r"loaded checkpoint .* at iteration 0\b", tuned), tuned


def test_formats_page(reader: Reader, resumed: list[str]) -> None:
    reader.assignments.clear()
    library, numpy_alone, _, checkpoint = [reader.python(program) for program in typed("docs/formats.md")]
    sequences, tokens = (int(re.search(rf"(\d+) {word}", library)[1]) for word in ("sequences", "tokens"))
    assert numpy_alone.startswith(rf"b'MMIDIDX\x00\x00' 1 {sequences} ")
    assert tokens * 2 == (reader.directory / "my_text_document.bin").stat().st_size
    # Both print the first ids, in NumPy's form.
    assert re.search(r"\[[\d ]+\]", library)[0] == re.search(r"\[[\d ]+\]", numpy_alone)[0]
    assert (reader.directory / "written.bin").read_bytes() == b"\x05\0\x08\0\x0d\0\x15\0"
    assert "iteration 10 hidden size 32" in checkpoint
    assert "decoder.layers.1.mlp.linear_fc2.weight (32, 128) torch.float32" in checkpoint


def test_api_page(reader: Reader) -> None:
    (printed,) = type_page(reader, "docs/api.md")
    assert printed.count("loss ") == 20


def test_parallel_page(reader: Reader) -> None:
    reader.assignments.clear()
    commands = typed("docs/parallel.md")
    lines = [command for command in commands if command.startswith("torchrun ")]
    for command in commands:
        printed = reader.type(command, in_the_shell=command == lines[0])
        assert not printed or sorted(losses(printed)) == [1, 2, 3, 4], printed
    assert len(lines) == 7


def test_experts_page(reader: Reader) -> None:
    by_loss, by_bias = type_page(reader, "docs/experts.md")
    for printed in (by_loss, by_bias):
        lines = re.findall(r"experts of layer +(\d+) \| largest load over mean: ([\d.]+) \|", printed)
        assert [layer for layer, _ in lines] == ["1", "2", "1", "2"]
        assert all(1.0 <= float(load) <= 8.0 for _, load in lines)
    assert by_loss.count("| load_balancing_loss: ") == 2
    assert "load_balancing_loss" not in by_bias


def test_page_about_debugging_without_a_card(reader: Reader) -> None:
    eight, one, two, compared = type_page(reader, "docs/without_a_card.md")
    assert sorted(losses(eight)) == [1, 2, 3]
    assert sorted(losses(one)) == sorted(losses(two)) == [1, 2, 3, 4, 5]
    assert "mean relative error" in compared


def test_every_page_that_is_typed_has_its_test_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert not [page for page in TYPED_IN_ORDER if f'"{page}"' not in text]
