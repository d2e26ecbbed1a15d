"""``docs/virtual_npu.md`` cannot rot: its options and flags exist, its small commands run."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.arguments.parsing import build_parser
from megatron_npu.virtual.__main__ import make_parser
from megatron_npu.virtual.cann import why_not
from megatron_npu.virtual.environment import HERE
from tests.npu.ground import ROOT
from tests.reserved_port import ReservedPort

PAGE = (ROOT / "docs" / "virtual_npu.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
VIRTUAL = [line for line in LINES if "megatron_npu.virtual" in line]
LAUNCHES = [line for line in VIRTUAL if "tests_gpt/" in line]
SMALL = [line for line in VIRTUAL if " -- python " in line]
SHELLS = [line for line in VIRTUAL if line.endswith(" -- bash")]


def split(line: str) -> tuple[list[str], list[str]]:
    """Words before and after ``--`` of a command line with virtual NPUs."""
    words = shlex.split(line)
    start = words.index("megatron_npu.virtual") + 1
    end = words.index("--")
    return words[start:end], words[end + 1 :]


def test_every_command_of_the_page_is_sorted_into_a_kind() -> None:
    assert len(LAUNCHES) == 2 and len(SMALL) == 3 and len(SHELLS) == 1
    assert sorted(VIRTUAL) == sorted([*LAUNCHES, *SMALL, *SHELLS])


def test_the_other_commands_are_run_before_every_change_lands() -> None:
    """Those of the installation need a network: continuous integration types them, as they stand."""
    spec = importlib.util.spec_from_file_location("readme_commands", ROOT / ".ci" / "readme_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    install = module.commands_below(PAGE, "## Install")
    assert install[-1] == "pip install -e '.[npu-test]'"
    assert sorted(LINES) == sorted([*install, *VIRTUAL])
    assert "readme_commands.py docs/virtual_npu.md '## Install'" in (ROOT / ".ci" / "run").read_text("utf-8")


@pytest.mark.parametrize("line", VIRTUAL)
def test_options_exist(line: str) -> None:
    options, command = split(line)
    parsed = make_parser().parse_args([*options, "--", *command])
    assert parsed.devices >= 1 and parsed.command == command


def test_every_option_has_a_row() -> None:
    for action in make_parser()._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                row = re.search(rf"^\| `{option} .*\| (\S+) \|$", PAGE, re.MULTILINE)
                assert row is not None and row[1] == str(action.default), option


@pytest.mark.parametrize("line", LAUNCHES)
def test_flags_of_launches_exist(line: str) -> None:
    script, *flags = split(line)[1][1:]
    assert (ROOT / script).is_file()
    known = {spelling for action in build_parser()._actions for spelling in action.option_strings}
    assert {flag for flag in flags if flag.startswith("--")} <= known


def test_every_module_is_explained() -> None:
    modules = {path.stem for path in HERE.glob("*.py")} - {"__init__", "__main__"}
    explained = re.findall(r"^\* `(\w+)` ", PAGE, re.MULTILINE)
    assert set(explained) == modules and len(explained) == len(modules)


def test_linked_from_where_it_is_looked_for() -> None:
    for page in ("README.md", "README_zh.md", "docs/npu.md"):
        assert "docs/virtual_npu.md" in (ROOT / page).read_text(encoding="utf-8"), page


def run(line: str, directory: Path, timeout: int, typed: str = "") -> subprocess.CompletedProcess:
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
        input=typed,
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


@pytest.mark.parametrize("line", SHELLS)
def test_everything_in_a_shell_runs_on_virtual_npus(line: str, tmp_path: Path) -> None:
    typed = "python -c 'import torch; print(torch.npu.device_count())'\npython -m megatron_npu | head -n 1\n"
    done = run(line, tmp_path, 900, typed)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0] == split(line)[0][1], done.stdout
    assert "Ascend910B2 x 8" in done.stdout.splitlines()[1], done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", LAUNCHES)
def test_the_launch_trains(line: str, tmp_path: Path) -> None:
    done = run(line, tmp_path, 1800)
    assert done.returncode == 0, done.stdout
    if line == LAUNCHES[0]:  # whose output the page shows
        for printed in re.findall(r"^(?:launch: device|INFO:).*$", PAGE, re.MULTILINE):
            assert printed in done.stdout
    steps = re.search(r"--train-iters (\d+)", line)[1]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == steps
