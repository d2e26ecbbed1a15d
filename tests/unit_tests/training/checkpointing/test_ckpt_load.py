"""What a load restores, and the errors for checkpoints that do not fit."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core import accelerator, rerun_state_machine
from megatron.core.errors import CheckpointError, NotBuiltYetError
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.training import checkpointing


def draws() -> list:
    """One number from every random stream."""
    with get_cuda_rng_tracker().fork():
        from_tracker = torch.rand(1).item()
    return [random.random(), np.random.rand(), torch.rand(1).item(), from_tracker]


def rewrite(file: Path, change) -> None:
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)


def same_weights(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_load_restores_everything_that_save_wrote(run, capsys: pytest.CaptureFixture):
    run.step()
    run.args.skipped_train_samples, run.args.consumed_valid_samples = 3, 5
    run.save(4)
    expected = draws()
    run.args.consumed_train_samples = run.args.skipped_train_samples = run.args.consumed_valid_samples = 0
    fresh = run.again()
    capsys.readouterr()
    assert fresh.load() == (4, 4e9)
    assert capsys.readouterr().out == (
        f" loading checkpoint from {run.args.load} at iteration 4\n"
        " checkpoint version 3.0\n"
        f"  successfully loaded checkpoint from {run.args.load} [ t 1/1, p 1/1 ] at iteration 4\n"
    )
    assert draws() == expected
    assert same_weights(fresh.weights(), run.weights())
    assert fresh.scheduler.num_steps == 8
    old, new = run.optimizer.state_dict(), fresh.optimizer.state_dict()
    assert all(
        torch.equal(old["state"][i][key], new["state"][i][key])
        for i in old["state"]
        for key in old["state"][i]
    )
    args = run.args
    assert (args.consumed_train_samples, args.skipped_train_samples, args.consumed_valid_samples) == (8, 3, 5)
    assert run.told == [{"consumed_samples": 8, "verbose": True}]


def test_load_without_a_checkpoint_returns_zero_or_fails_on_request(run, capsys: pytest.CaptureFixture):
    before = run.weights()
    assert run.load() == (0, 0)
    assert same_weights(run.weights(), before)
    assert capsys.readouterr().out == (
        f"WARNING: could not find the metadata file {run.args.load}/latest_checkpointed_iteration.txt\n"
        "    will not load any checkpoints and will start from random\n"
    )
    run.args.exit_on_missing_checkpoint = True
    with pytest.raises(CheckpointError, match="--exit-on-missing-checkpoint"):
        run.load()


def test_ckpt_step_overrides_the_tracker(run):
    run.save(2)
    run.step()
    run.save(4)
    run.args.ckpt_step = 2
    assert run.load()[0] == 2
    os.unlink(os.path.join(run.args.save, "latest_checkpointed_iteration.txt"))
    assert run.load()[0] == 2
    run.args.ckpt_step = 3
    with pytest.raises(CheckpointError, match=r"iter_0000003 does not exist.*found: 2, 4;"):
        run.load()


def test_finetune_loads_weights_only(run):
    run.step()
    run.save(4)
    fresh = run.again()
    run.args.finetune, run.args.num_layers, run.args.consumed_train_samples = True, 7, 0
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert fresh.load()[0] == 0
    assert same_weights(fresh.weights(), run.weights())
    assert torch.equal(torch.get_rng_state(), state)
    assert fresh.optimizer.state_dict()["state"] == {} and fresh.scheduler.num_steps == 0
    assert run.args.consumed_train_samples == 0 and run.told == []


def test_release_checkpoint_starts_at_iteration_0(run):
    run.save(4)
    os.rename(os.path.join(run.args.save, "iter_0000004"), os.path.join(run.args.save, "release"))
    Path(run.args.save, "latest_checkpointed_iteration.txt").write_text("release")
    fresh = run.again()
    assert fresh.load()[0] == 0
    assert same_weights(fresh.weights(), run.weights()) and fresh.scheduler.num_steps == 0


def test_pretrained_checkpoint_is_used_until_the_run_has_one(run, tmp_path: Path):
    run.step()
    run.save(4)
    run.args.pretrained_checkpoint, run.args.load = run.args.save, str(tmp_path / "new")
    assert run.again().load()[0] == 0 and run.args.finetune
    run.args.finetune, run.args.save = False, run.args.load
    run.save(6)
    assert run.again().load()[0] == 6 and not run.args.finetune
    run.args.load, run.args.pretrained_checkpoint = str(tmp_path / "empty"), str(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"--pretrained-checkpoint .*nothing"):
        run.load()


@pytest.mark.parametrize("half", ["fp16", "bf16", None])
def test_no_load_optim_leaves_the_optimizer_as_made(run, half: str | None):
    run.step()
    run.save(4)
    run.args.no_load_optim = True
    if half:
        setattr(run.args, half, True)
    fresh = run.again()
    assert fresh.load()[0] == 4
    assert fresh.optimizer.state_dict()["state"] == {} and fresh.scheduler.num_steps == 0
    assert fresh.optimizer.reloaded == (1 if half else 0)


def test_no_load_rng_keeps_the_random_states(run):
    run.save(4)
    run.args.no_load_rng = True
    torch.manual_seed(11)
    state = torch.get_rng_state()
    run.load()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("saved_without", "advice"), [("no_save_optim", "--no-load-optim"), ("no_save_rng", "--no-load-rng")]
)
def test_missing_part_is_an_error_that_names_the_flag(run, saved_without: str, advice: str):
    setattr(run.args, saved_without, True)
    run.step()
    run.save(4)
    before = run.again()
    kept = before.weights()
    with pytest.raises(CheckpointError, match=advice):
        before.load()
    if saved_without == "no_save_optim":
        assert same_weights(before.weights(), kept)  # refused before anything was changed
    setattr(run.args, saved_without.replace("save", "load"), True)
    assert run.again().load()[0] == 4


def test_all_differing_arguments_are_named(run):
    run.save(4)
    run.args.num_layers, run.args.hidden_size, run.args.tensor_model_parallel_size = 3, 8, 2
    with pytest.raises(CheckpointError) as caught:
        run.load()
    message = str(caught.value)
    assert "--num-layers: 1 in the checkpoint, 3 in this run" in message
    assert "--hidden-size: 4 in the checkpoint, 8 in this run" in message
    assert "--tensor-model-parallel-size: 1 in the checkpoint, 2 in this run" in message


def test_vocabulary_size_is_compared_when_the_vocabulary_is_given(run):
    args = run.args
    args.vocab_file, args.max_position_embeddings, args.tokenizer_type = "v.txt", 16, "GPT2BPETokenizer"
    args.make_vocab_size_divisible_by, args.padded_vocab_size = 128, 256
    run.save(4)
    args.padded_vocab_size = 384
    with pytest.raises(CheckpointError, match="padded vocab size: 256 in the checkpoint, 384 in this run"):
        run.load()


def test_weights_of_another_shape_or_name_are_refused(run):
    run.save(4)
    other = run.again(vocabulary=16)
    with pytest.raises(CheckpointError) as caught:
        other.load()
    message = str(caught.value)
    assert "embedding.word_embeddings.weight is [8, 4] in the checkpoint and [16, 4] here" in message
    assert "--make-vocab-size-divisible-by" in message
    named = run.again(norm="decoder.layers.0.other_norm.weight")
    with pytest.raises(CheckpointError) as caught:
        named.load()
    message = str(caught.value)
    assert "not in the checkpoint (1):\n    decoder.layers.0.other_norm.weight" in message
    assert "not in this model (1):\n    decoder.layers.0.input_layernorm.weight" in message


def test_wrong_number_of_model_chunks_is_refused(run):
    run.save(4)
    with pytest.raises(CheckpointError, match=r"holds model, this run has 2 model chunk"):
        checkpointing.load_checkpoint([run.model, run.model], None, None)


def test_missing_rank_file_names_the_saved_parallel_sizes(run, golden: Path):
    """Two tensor ranks on two stages, read by a single process."""
    run.args.load = str(golden / "ckpt" / "torch_tp2pp2")
    with pytest.raises(CheckpointError) as caught:
        run.load()
    message = str(caught.value)
    assert "--tensor-model-parallel-size 2 in the checkpoint, 1 in this run" in message
    assert "--pipeline-model-parallel-size 2 in the checkpoint, 1 in this run" in message


def test_sharded_formats_are_refused_as_not_built(run, tmp_path: Path):
    (tmp_path / "ckpt" / "iter_0000004").mkdir(parents=True)
    (tmp_path / "ckpt" / "iter_0000004" / "metadata.json").write_text("{}")
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(NotBuiltYetError, match="torch_dist"):
        run.load()


@pytest.mark.parametrize("what", ["cut short", "file missing", "directory empty", "directory missing"])
def test_damaged_checkpoint_names_complete_ones(run, what: str):
    run.save(2)
    run.save(4)
    file = run.file(4)
    if what == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
        if what != "file missing":
            file.parent.rmdir()
        if what == "directory missing":
            file.parent.parent.rmdir()
    with pytest.raises(CheckpointError, match=r"iter_0000004.*--ckpt-step 2"):
        run.load()


def test_old_key_spellings_load(run):
    """Schedule, random states and iteration under the names they had before version 3."""
    run.step()
    run.save(4)

    def age(state: dict) -> None:
        state["lr_scheduler"] = state.pop("opt_param_scheduler")
        state.update(state.pop("rng_state")[0])
        state["total_iters"] = state.pop("iteration")
        state["checkpoint_version"] = 2.0
        state["args"].model_parallel_size = 1

    rewrite(run.file(4), age)
    expected = draws()
    fresh = run.again()
    assert fresh.load() == (4, 4e9)
    assert draws() == expected and fresh.scheduler.num_steps == 8


@pytest.mark.parametrize("stored", [torch.zeros(16, dtype=torch.uint8), torch.zeros(5056), None])
def test_random_states_of_another_device_are_skipped_with_a_warning(run, stored, capsys):
    run.save(4)
    rewrite(run.file(4), lambda state: state["rng_state"][0].update(cuda_rng_state=stored))
    before = get_cuda_rng_tracker().get_states()["model-parallel-rng"]
    with get_cuda_rng_tracker().fork():
        torch.rand(3)
    advanced = get_cuda_rng_tracker().get_states()["model-parallel-rng"]
    assert run.load()[0] == 4
    assert "WARNING: the checkpoint's device random states do not fit this device" in capsys.readouterr().out
    assert torch.equal(get_cuda_rng_tracker().get_states()["model-parallel-rng"], advanced)
    assert not torch.equal(advanced, before)


def test_largest_losses_seen_survive_a_load(run):
    """The fault detection compares a loss with the largest of the first ones; they survive a restart."""
    machine = rerun_state_machine.get_rerun_state_machine()
    for value in (1.0, 3.0, 2.0):
        assert not machine.is_unexpectedly_large(value, threshold=10, context="loss", num_samples=3)
    run.save(4)
    rerun_state_machine.destroy_rerun_state_machine()
    run.load()
    fresh = rerun_state_machine.get_rerun_state_machine()
    assert fresh is not machine
    assert fresh.is_unexpectedly_large(31.0, threshold=10, context="loss", num_samples=3)
    rerun_state_machine.destroy_rerun_state_machine()


def test_random_states_without_named_streams_are_refused(run):
    run.save(4)
    rewrite(run.file(4), lambda state: state["rng_state"][0].update(rng_tracker_states={}))
    with pytest.raises(CheckpointError, match="--no-load-rng"):
        run.load()


def test_checkpoint_without_iteration_is_refused(run):
    run.save(4)
    rewrite(run.file(4), lambda state: state.pop("iteration"))
    with pytest.raises(CheckpointError, match="--finetune"):
        run.load()
    run.args.finetune = True
    assert run.load()[0] == 0


def test_checkpoints_load_between_plain_and_fused_layers(run):
    """The norm stored inside the projection is found by a layer that keeps it outside, and back.

    The fused layer registers it after the projection's bias. Both are vectors of one size, so a loader that
    trusted the numbers of the optimizer state would swap their moments silently.
    """
    fused = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    plain = "decoder.layers.0.input_layernorm.weight"
    proj = "decoder.layers.0.self_attention.linear_proj.bias"
    run.step()
    state = run.optimizer.state_dict()["state"]
    plain_moments = {name: state[i]["exp_avg"].clone() for i, name in ((2, plain), (3, proj))}
    run.save(4)

    def as_fused(content: dict) -> None:
        old = content["model"]
        order = [name for name in old if name != plain]
        order.insert(order.index(proj) + 1, plain)
        content["model"] = {(fused if name == plain else name): old[name] for name in order}
        moments = content["optimizer"]["state"]
        moments[2], moments[3] = moments[3], moments[2]

    rewrite(run.file(4), as_fused)
    fresh = run.again()
    fresh.load()
    assert same_weights(fresh.weights(), run.weights())
    state = fresh.optimizer.state_dict()["state"]
    assert torch.equal(state[2]["exp_avg"], plain_moments[plain])
    assert torch.equal(state[3]["exp_avg"], plain_moments[proj])
    assert not torch.equal(plain_moments[plain], plain_moments[proj])


def test_optimizer_of_an_old_version_is_refused_without_no_load_optim(run):
    run.step()
    run.save(4)

    def age(state: dict) -> None:
        state["checkpoint_version"] = 1.0
        state["args"].model_parallel_size = 1

    rewrite(run.file(4), age)
    with pytest.raises(CheckpointError, match="--no-load-optim"):
        run.load()


def test_device_random_state_comes_from_the_accelerator(run, monkeypatch: pytest.MonkeyPatch):
    marked = torch.Generator().manual_seed(123).get_state()
    monkeypatch.setattr(accelerator, "get_rng_state", lambda: marked)
    assert checkpointing.get_rng_state("torch")[0]["cuda_rng_state"] is marked
    taken = []
    run.save(4)
    monkeypatch.setattr(accelerator, "set_rng_state", taken.append)
    run.load()
    assert torch.equal(taken[-1], marked)
