"""What Weights & Biases is told, by a module that stands in for it and keeps the calls."""

import math
import sys
import types
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from tests.distributed.gpt_run import NO_DROPOUT, command_line
from tests.distributed.layouts import GLOBAL_BATCH, Layout
from tests.distributed.pool import run_ranks
from tests.distributed.real_loop import train


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def recorder():
    """A module ``wandb`` whose ``init`` and ``log`` do nothing, and a list of its calls about artifacts.

    The service "does not know" the artifact of iteration 4.
    """
    wandb, calls = types.ModuleType("wandb"), []
    wandb.init = wandb.log = lambda *args, **options: None

    class Artifact:
        def __init__(self, name, type, metadata):
            self.about = {"name": name, "type": type, **metadata}

        def add_reference(self, uri, checksum):
            self.about |= {"reference": uri, "checksum": checksum}

        def add_file(self, path):
            self.about["tracker"] = Path(path).read_text()

    def use_artifact(name):
        if name.endswith("iter_0000004"):
            raise TypeError(f"artifact {name} is not known")
        calls.append(("use", name))

    wandb.Artifact = Artifact
    wandb.run = types.SimpleNamespace(
        log_artifact=lambda artifact, aliases: calls.append(("log", artifact.about, aliases)),
        use_artifact=use_artifact,
    )
    return wandb, calls


def artifacts(argv):
    """On a rank: what a run says about artifacts, and what it prints."""
    wandb, calls = recorder()
    with mock.patch.dict(sys.modules, wandb=wandb):
        record = train(argv, with_gradients=False)
    return calls, record.output


def logged(argv):
    """On a rank: keyword arguments of ``init``, and every (step, name, value) logged; losses of the steps."""
    wandb = types.ModuleType("wandb")
    started, points = [], []
    wandb.init = lambda **options: started.append((options["project"], options["name"]))
    wandb.log = lambda figures, step: points.extend((step, *figure) for figure in figures.items())
    with mock.patch.dict(sys.modules, wandb=wandb):
        record = train(argv, with_gradients=False)
    return started, points, record.losses


@pytest.mark.parametrize("tensorboard", [False, True], ids=["alone", "beside-tensorboard"])
def test_the_last_rank_logs_each_figure_once(tensorboard, data_cache, tmp_path):
    flags = (
        f"--wandb-project p --wandb-exp-name e --wandb-save-dir {tmp_path} --eval-iters 1 --eval-interval 2"
    )
    if tensorboard:
        flags += f" --tensorboard-dir {tmp_path / 'tb'} --log-validation-ppl-to-tensorboard"
    argv = command_line(Layout(dp=2), data_cache, f"{NO_DROPOUT} {flags}")
    (first_started, first_points, _), (started, points, losses) = run_ranks(2, logged, argv)
    assert (first_started, first_points) == ([], [])
    assert started == [("p", "e")]
    assert max(Counter((step, name) for step, name, _ in points).values()) == 1
    steps = [step for step, _, _ in points]
    assert steps == sorted(steps), "wandb drops what comes for an earlier step"
    curves = {}
    for step, name, value in points:
        curves.setdefault(name, {})[step] = value
    assert curves["lm loss"] == pytest.approx(dict(enumerate(losses, 1)), rel=1e-6)
    assert curves["samples vs steps"] == {step: GLOBAL_BATCH * step for step in (1, 2, 3, 4)}
    assert list(curves["lm loss validation"]) == [2, 4]
    assert list(curves["lm loss test"]) == [4]
    assert not [name for name in curves if name.endswith(" vs samples")]
    if tensorboard:
        for split in ("validation", "test"):
            expected = {step: math.exp(loss) for step, loss in curves[f"lm loss {split}"].items()}
            assert curves[f"lm loss {split} ppl"] == pytest.approx(expected)


def test_saved_and_loaded_checkpoints_are_artifacts_of_the_run(data_cache, tmp_path):
    save = tmp_path / "a run" / "checkpoints"
    flags = (
        f"--wandb-project p --wandb-exp-name e --wandb-save-dir {tmp_path / 'wandb'} --save-interval 2 "
        f"{NO_DROPOUT}"
    )
    argv = [*command_line(Layout(dp=2), data_cache, flags), "--save", str(save), "--load", str(save)]

    def saved(iteration):
        directory = save / f"iter_{iteration:07d}"
        about = {"name": "a-run-checkpoints", "type": "model", "iteration": iteration}
        about |= {"reference": f"file://{directory}", "checksum": False, "tracker": str(iteration)}
        return "log", about, [directory.name]

    (first, _), (last, _) = run_ranks(2, artifacts, [*argv, "--exit-interval", "2"])
    assert (first, last) == ([], [saved(2)])
    _, (resumed, _) = run_ranks(2, artifacts, argv)
    assert resumed == [("use", "a-run-checkpoints:iter_0000002"), saved(4)]
    # What the service refuses is said, and the run goes on.
    _, (extended, output) = run_ranks(
        2, artifacts, [*argv, "--train-iters", "6", "--override-opt_param-scheduler"]
    )
    assert extended == [saved(6)]
    assert "a-run-checkpoints:iter_0000004 of the Weights & Biases run: artifact" in output
