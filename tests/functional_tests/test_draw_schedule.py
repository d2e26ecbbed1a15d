"""tools/draw_schedule.py as a user calls it: figures on the screen, pictures on request."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "draw_schedule.py"


def figure_of(output, label):
    (line,) = [line for line in output.splitlines() if line.startswith(label)]
    return float(line.split(":")[1])


@pytest.mark.parametrize(
    ("arguments", "expected", "suffix", "start"),
    [
        ("-p 4 -m 8", 3 / 8, ".svg", b"<?xml"),
        ("-p 4 -m 8 -v 2", 3 / 16, ".png", b"\x89PNG"),
        # (p - 1) (T_F + T_B - T_W) / (m (T_F + T_B + T_W)) with T_F = T_B = T_W
        ("-p 4 -m 8 --schedule zb-h1", 1 / 8, None, None),
        ("-p 3 -m 6 --schedule zb-h1 --backward-time 3 --weight-time 1", 2 * 2 / (6 * 4), None, None),
    ],
)
def test_prints_the_bubble_and_draws_it(tmp_path, capsys, arguments, expected, suffix, start):
    path = tmp_path / f"timeline{suffix}"
    runpy.run_path(TOOL)["main"]([*arguments.split(), *(["--output", str(path)] if suffix else [])])
    output = capsys.readouterr().out
    assert figure_of(output, "bubble fraction") == pytest.approx(expected, abs=1e-4)
    assert figure_of(output, "published formula") == pytest.approx(expected, abs=1e-4)
    if suffix:
        assert path.read_bytes().startswith(start)
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-p 2 -m 4 --output timeline.gif", "end the name in .svg or .png"),
        ("-p 2 -m 4 --schedule 1f1b -v 2", "use interleaved"),
        ("-p 2 -m 4 --weight-time 3", "weight a part of backward"),
        ("-p 2 -m 4 --output /no/such/directory/timeline.svg", "No such file"),
    ],
)
def test_invalid_layouts_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        runpy.run_path(TOOL)["main"](arguments.split())


def test_command_line_errors_are_one_line():
    command = [sys.executable, TOOL, "-p", "2", "-m", "4", "--schedule", "1f1b", "-v", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: pipeline_schedule 1f1b") and done.stderr.count("\n") == 1
