"""Ranks as processes of their own: when one of them fails, all end, and the cause is reported once."""

from pathlib import Path

from tests.functional_tests.launcher import Run, pretrain_gpt_ranks, tiny_gpt


def errors(runs: list[Run]) -> list[str]:
    return [line for run in runs for line in run.output.splitlines() if "error: " in line]


def test_a_nan_loss_on_the_last_stage_ends_all_ranks(golden: Path, tmp_path: Path):
    diverging = {"lr": 1e30, "lr-warmup-iters": 0, "clip-grad": 0}
    words = tiny_gpt(golden, tmp_path, **diverging, **{"pipeline-model-parallel-size": 2})
    runs = pretrain_gpt_ranks(2, words, tmp_path)
    assert [run.status for run in runs] == [1, 1]
    (message,) = errors(runs)
    assert "found NaN" in message or "found Inf" in message


def test_a_missing_data_set_is_reported_once(golden: Path, tmp_path: Path):
    words = tiny_gpt(golden, tmp_path)
    missing = tmp_path / "nowhere"
    words[words.index("--data-path") + 1] = str(missing)
    runs = pretrain_gpt_ranks(2, words, tmp_path)
    assert all(run.status != 0 for run in runs)
    (message,) = errors(runs)
    assert str(missing) in message


def test_a_save_directory_that_is_a_file_ends_all_ranks_before_training(golden: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    words = tiny_gpt(golden, tmp_path, save=tmp_path / "file" / "ckpt")
    runs = pretrain_gpt_ranks(2, words, tmp_path)
    assert [run.status for run in runs] == [1, 1]
    (message,) = errors(runs)
    assert "--save" in message
    assert "training ..." not in runs[0].output


def test_all_ranks_take_arguments_from_the_checkpoint(golden: Path, tmp_path: Path):
    length = {"train-iters": 4, "lr-warmup-iters": 0}
    shape = {"tensor-model-parallel-size": 2, "is-x-model": True, "ffn-hidden-size": 96}
    saving = {"save": tmp_path / "ckpt", "save-interval": 2}
    words = tiny_gpt(golden, tmp_path, **length, **shape, **saving)
    first, whole = (run.check() for run in pretrain_gpt_ranks(2, words, tmp_path))
    # Also what is said before the ranks have met.
    assert "> initializing torch distributed" in first.output and "> init" not in whole.output
    forgotten = dict.fromkeys(("num-layers", "hidden-size", "num-attention-heads"))
    flags = {"use-checkpoint-args": True, "use-mp-args-from-checkpoint-args": True}
    loading = {"load": tmp_path / "ckpt", "ckpt-step": 2}
    words = tiny_gpt(golden, tmp_path, **length, **forgotten, **flags, **loading)
    runs = [run.check() for run in pretrain_gpt_ranks(2, words, tmp_path)]
    assert runs[1].losses == {step: whole.losses[step] for step in (3, 4)}
    assert "Setting tensor_model_parallel_size to 2 from checkpoint" in runs[0].output
    assert "Setting glu_gate_last to True from checkpoint" in runs[0].output
    assert "Setting" not in runs[1].output
