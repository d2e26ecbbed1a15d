"""tools/compare_runs.py: two logs or TensorBoard directories in, figures and a plot out."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "compare_runs.py"
LINE = (
    " [2026-01-01 10:00:00] iteration {:8d}/     100 | consumed samples: {:12d} | elapsed time per iteration "
    "(ms): 12.3 | learning rate: 1.0E-04 | global batch size:     4 | lm loss: {} | loss scale: 1.0 | "
    "grad norm: 2.5 |"
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def log(path: Path, losses: dict[int, object], noise: bool = True) -> Path:
    lines = ["> building model", "validation loss at iteration 2 | lm loss value: 9.9E+01 |"] if noise else []
    for iteration, loss in losses.items():
        lines.append(
            LINE.format(iteration, 4 * iteration, f"{loss:.6E}" if isinstance(loss, float) else loss)
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def test_differences_of_two_logs(tool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Errors 0, 0.01, 0.05 and 0.02 by hand."""
    first = log(tmp_path / "a.log", {1: 10.0, 2: 8.0, 3: 4.0, 4: 2.0, 5: 1.0})
    second = log(tmp_path / "b.log", {1: 10.0, 2: 8.08, 3: 3.8, 4: 2.04, 9: 1.0})
    assert tool.main([str(first), str(second), "--bound", "0.015"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "iterations compared: 4 (1 to 4), in one run only: 1 and 1",
        "mean relative error: 2.000e-02",
        "largest relative error: 5.000e-02 at iteration 3",
        "first iteration beyond 0.015: 3",
    ]
    assert tool.main([str(first), str(second), "--bound", "0.06"]) == 0
    assert "first iteration beyond 0.06: none" in capsys.readouterr().out


def test_iterations_of_a_resumed_run_count_once(tool, tmp_path: Path) -> None:
    path = log(tmp_path / "a.log", {1: 5.0, 2: 4.0})
    again = LINE.format(2, 8, "3.0E+00"), LINE.format(3, 12, "2.0E+00")
    path.write_text(path.read_text() + "\n".join(again))
    assert tool.read_run(path, "lm loss") == {1: 5.0, 2: 3.0, 3: 2.0}


def test_another_quantity_can_be_compared(tool, tmp_path: Path) -> None:
    assert tool.read_run(log(tmp_path / "a.log", {1: 5.0}), "grad norm") == {1: 2.5}


def test_evaluations_are_read_from_a_log_under_the_names_of_tensorboard(tool, tmp_path: Path) -> None:
    path = log(tmp_path / "a.log", {2: 5.0, 4: 4.0}, noise=False)
    path.write_text(
        path.read_text()
        + " validation loss at iteration 2 | lm loss value: 4.5E+00 | lm loss PPL: 9.0E+01 |\n"
        " validation loss at iteration 4 on validation set | lm loss value: 3.5E+00 | lm loss PPL: 33.1 |\n"
        " test loss at iteration 4 on test set | lm loss value: 3.0E+00 | lm loss PPL: 2.0E+01 |\n"
    )
    assert tool.read_run(path, "lm loss") == {2: 5.0, 4: 4.0}
    assert tool.read_run(path, "lm loss validation") == {2: 4.5, 4: 3.5}
    assert tool.read_run(path, "lm loss test") == {4: 3.0}


@pytest.mark.parametrize(
    ("reference", "other", "error"),
    [(2.0, 2.0, 0.0), (2.0, 1.0, 0.5), (-2.0, -1.0, 0.5), (0.0, 0.0, 0.0), (0.0, 1e-9, math.inf),
     (math.nan, math.nan, 0.0), (math.inf, math.inf, 0.0), (1.0, math.nan, math.inf),
     (math.inf, 1.0, math.inf)],
)  # fmt: skip
def test_relative_error_is_computed_from_the_reference(
    tool, reference: float, other: float, error: float
) -> None:
    assert tool.relative_error(reference, other) == error


def test_a_nan_on_one_side_exceeds_every_bound(tool, tmp_path: Path) -> None:
    first = log(tmp_path / "a.log", {1: 1.0, 2: 1.0})
    assert tool.main([str(first), str(log(tmp_path / "b.log", {1: 1.0, 2: "nan"})), "--bound", "1e9"]) == 1


def test_tensorboard_files_compare_with_logs(tool, tmp_path: Path) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path / "events"))
    for iteration in range(1, 40):
        writer.add_scalar("lm loss", 10.0 / iteration, iteration)
        writer.add_scalar("lm loss vs samples", 1.0, 4 * iteration)
    writer.close()
    found = tool.read_run(tmp_path / "events", "lm loss")
    assert found == pytest.approx({i: 10.0 / i for i in range(1, 40)})
    text = log(tmp_path / "a.log", {i: 10.0 / i for i in range(1, 40)})
    assert tool.main([str(tmp_path / "events"), str(text), "--bound", "1e-5"]) == 0


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_written(tool, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    first, second = (log(tmp_path / name, {i: 5.0 / i for i in range(1, 9)}) for name in ("a.log", "b.log"))
    plot = tmp_path / f"plot.{suffix}"
    assert tool.main([str(first), str(second), "--output", str(plot)]) == 0
    data = plot.read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == "png" else b"relative error" in data or b"<svg" in data


def test_inputs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    first = log(tmp_path / "a.log", {1: 1.0})
    other = log(tmp_path / "b.log", {2: 1.0})
    empty = tmp_path / "empty.log"
    empty.write_text("nothing\n")
    for words, part in (
        ([first, tmp_path / "none"], "no such file"),
        ([first, empty], "no 'lm loss' found"),
        ([first, other], "no iteration in common"),
        ([first, first, "--output", "plot.txt"], "end the name in one of"),
        ([first, first, "--bound", "-1"], "not negative"),
    ):
        done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
        assert done.returncode == 2, done
        assert part in done.stderr and "Traceback" not in done.stderr
