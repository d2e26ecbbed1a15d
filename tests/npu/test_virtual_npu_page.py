"""``docs/virtual_npu.md`` cannot rot: its options and flags exist, its small commands run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.arguments.parsing import build_parser
from tests.npu.cann_stub.build import why_not
from tests.npu.ground import ROOT
from tests.npu.virtual.__main__ import make_parser
from tests.npu.virtual.environment import HERE
from tests.reserved_port import ReservedPort

PAGE = (ROOT / "docs" / "virtual_npu.md").read_text(encoding="utf-8")
LINES = [
    line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()
]
VIRTUAL = [line for line in LINES if "tests.npu.virtual" in line]
LAUNCHES = [line for line in VIRTUAL if "tests_gpt/" in line]
SMALL = [line for line in VIRTUAL if " -- python " in line]


def split(line: str) -> tuple[list[str], list[str]]:
    """Words before and after ``--`` of a command line with virtual NPUs."""
    words = shlex.split(line)
    start = words.index("tests.npu.virtual") + 1
    end = words.index("--")
    return words[start:end], words[end + 1 :]


def test_there_is_something_to_check() -> None:
    assert len(LAUNCHES) == 2 and len(SMALL) == 3 and len(VIRTUAL) == 6
    assert "pip install -e '.[npu-test]'" in LINES


@pytest.mark.parametrize("line", VIRTUAL)
def test_options_exist(line: str) -> None:
    options, command = split(line)
    parsed = make_parser().parse_args([*options, "--", *command])
    assert parsed.devices >= 1 and parsed.command == command


def test_every_option_has_a_row() -> None:
    for action in make_parser()._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                row = re.search(rf"^\| `{option} .*\| (\S+) \|$", PAGE, re.M)
                assert row is not None and row[1] == str(action.default), option


@pytest.mark.parametrize("line", LAUNCHES)
def test_flags_of_launches_exist(line: str) -> None:
    script, *flags = split(line)[1][1:]
    assert (ROOT / script).is_file()
    known = {spelling for action in build_parser()._actions for spelling in action.option_strings}
    assert {flag for flag in flags if flag.startswith("--")} <= known


def test_every_module_is_explained() -> None:
    modules = {path.stem for path in HERE.glob("*.py")} - {"__init__", "__main__"}
    explained = re.findall(r"^\* `(\w+)` ", PAGE, re.M)
    assert set(explained) == modules and len(explained) == len(modules)


def test_linked_from_where_it_is_looked_for() -> None:
    for page in ("README.md", "README_zh.md", "docs/npu.md"):
        assert "docs/virtual_npu.md" in (ROOT / page).read_text(encoding="utf-8"), page


def run(line: str, directory: Path, timeout: int) -> subprocess.CompletedProcess:
    if why_not() is not None:
        pytest.skip(f"no virtual NPU: {why_not()}")
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    port = ReservedPort()
    variables |= {"PYTHONPATH": str(ROOT), "CKPT_PATH": str(directory), "MASTER_PORT": str(port)}
    line = line.replace("VIRTUAL_NPU_CALLS=.", f"VIRTUAL_NPU_CALLS={shlex.quote(str(directory))}")
    return subprocess.run(
        ["bash", "-c", line],
        env=os.environ | variables,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )


@pytest.mark.parametrize("line", SMALL)
def test_small_commands_do_what_the_page_says(line: str, tmp_path: Path) -> None:
    done = run(line, tmp_path, 900)
    assert done.returncode == 0, done.stdout
    if "VIRTUAL_NPU_CALLS" in line:
        assert json.loads((tmp_path / "calls_0.json").read_text()) == {"npu_swiglu": 1}
    elif "check" in line:
        assert "1 of 1 comparisons within their bounds" in done.stdout
    else:
        assert "Ascend910A x 1, SoC 102, saturation mode" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", LAUNCHES)
def test_the_launch_trains(line: str, tmp_path: Path) -> None:
    done = run(line, tmp_path, 1800)
    assert done.returncode == 0, done.stdout
    if line == LAUNCHES[0]:  # whose output the page shows
        for printed in re.findall(r"^(?:launch: device|INFO:).*$", PAGE, re.M):
            assert printed in done.stdout
    steps = re.search(r"--train-iters (\d+)", line)[1]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == steps
