"""A save that is interrupted at any point leaves a directory that loads."""

import errno
import io
import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from megatron.core.errors import CheckpointError, NotBuiltYetError
from megatron.training import checkpointing
from megatron.training.checkpointing import durable

_CALLS = ("fsync", "rename", "replace", "makedirs")


def _in_child(action) -> int:
    """Run ``action`` in a copy of this process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_before_step(step: int, save) -> None:
    taken = []

    def dying(real):
        def call(*args, **kwargs):
            taken.append(1)
            if len(taken) == step:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(os, name, dying(getattr(os, name)))
    save()


def _loads_as(run) -> tuple[int, dict]:
    fresh = run.again()
    iteration, _ = fresh.load()
    return iteration, fresh.weights()


def _equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("new_iteration", [4, 2], ids=["new directory", "same directory again"])
def test_a_save_killed_at_any_system_call_leaves_a_loadable_directory(run, new_iteration: int):
    run.step()
    run.save(2)
    old = run.weights()
    run.step()
    new = run.weights()
    outcomes = []
    for step in range(1, 100):
        status = _in_child(lambda step=step: _die_before_step(step, lambda: run.save(new_iteration)))
        iteration, weights = _loads_as(run)
        is_new = _equal(weights, new)
        assert is_new or _equal(weights, old)
        assert iteration == (new_iteration if is_new else 2)
        outcomes.append((status, is_new))
        if status == 0:
            break
        if is_new:  # back to the state before
            for name, tensor in run.model.state_dict().items():
                tensor.copy_(old[name])
            run.save(2)
            for name, tensor in run.model.state_dict().items():
                tensor.copy_(new[name])
    assert outcomes[0] == (9, False)
    assert outcomes[-1] == (0, True)
    assert len(outcomes) >= 8
    assert [entry for entry in os.listdir(run.args.save) if entry.startswith(".")] == []


def test_a_save_killed_inside_a_file_leaves_the_old_checkpoint(run, monkeypatch: pytest.MonkeyPatch):
    run.save(2)
    old = run.weights()
    run.step()

    def half(state, file):
        whole = io.BytesIO()
        real_save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os._exit(9)

    real_save = torch.save
    monkeypatch.setattr(torch, "save", half)
    assert _in_child(lambda: run.save(4)) == 9
    monkeypatch.undo()
    assert os.path.isdir(os.path.join(run.args.save, ".iter_0000004.saving"))
    monkeypatch.setattr(checkpointing, "get_args", lambda: run.args)
    monkeypatch.setattr(checkpointing, "update_num_microbatches", lambda **given: None)
    iteration, weights = _loads_as(run)
    assert iteration == 2 and _equal(weights, old)
    run.save(4)  # the next save clears up
    assert sorted(os.listdir(run.args.save)) == [
        "iter_0000002",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
    ]
    assert _loads_as(run)[0] == 4


@pytest.mark.parametrize("saved_before", [False, True])
def test_files_are_synced_before_they_are_renamed(run, monkeypatch: pytest.MonkeyPatch, saved_before: bool):
    """What is renamed was synced before, its directory is synced after, and the tracker comes last."""
    if saved_before:
        run.save(4)
    events = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor: int) -> None:
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real["fsync"](descriptor)

    def moved(name: str):
        def move(source: str, target: str) -> None:
            events.append(("move", os.path.basename(target)))
            real[name](source, target)

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved("rename"))
    monkeypatch.setattr(os, "replace", moved("replace"))
    run.save(4)
    model = "model_optim_rng.pt"
    moves = [name for kind, name in events if kind == "move"]
    assert moves == [model if saved_before else "iter_0000004", "latest_checkpointed_iteration.txt"]
    first, last = (events.index(("move", name)) for name in moves)
    assert ("sync", model) in events[:first] and ("sync", "mp_rank_00") in events[:first]
    assert ("sync", "mp_rank_00" if saved_before else "ckpt") in events[first:last]
    assert any(name.startswith("latest") for kind, name in events[first:last] if kind == "sync")
    assert events[-1] == ("sync", "ckpt")


class _FullDisk:
    """A file on a disk with no room left after some bytes."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_full_disk_leaves_the_old_checkpoint(run, monkeypatch: pytest.MonkeyPatch, room: int):
    run.save(2)
    before = run.file(2).read_bytes()
    run.step()
    real_open = open

    def open_on_full_disk(path, mode="r", **kwargs):
        file = real_open(path, mode, **kwargs)
        return _FullDisk(file, room) if "w" in mode else file

    monkeypatch.setattr(durable, "open", open_on_full_disk, raising=False)
    with pytest.raises(CheckpointError, match=r"No space left on device\. Free space"):
        run.save(4)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.save(2)
    assert sorted(os.listdir(run.args.save)) == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    assert run.file(2).read_bytes() == before
    assert Path(run.args.save, "latest_checkpointed_iteration.txt").read_text() == "2"


def test_file_size_limit_leaves_the_old_checkpoint(run):
    """The same with a limit that the kernel enforces, on a file larger than torch's write buffer."""
    run.save(2)

    def save_under_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            run.again(hidden=64).save(4)
        except CheckpointError as error:
            os._exit(7 if "File too large" in str(error) else 8)

    assert _in_child(save_under_limit) == 7
    assert sorted(os.listdir(run.args.save)) == ["iter_0000002", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("check", [checkpointing.check_save_directory, None], ids=["early check", "save"])
def test_unwritable_directory_is_refused(run, tmp_path: Path, check):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    for path in (blocked / "ckpt", blocked, Path("/proc/ckpt")):
        run.args.save = str(path)
        with pytest.raises(CheckpointError, match="--save") as caught:
            check(run.args.save) if check else run.save(2)
        assert str(path) in str(caught.value)
    assert blocked.read_text() == "not a directory"


def test_check_save_directory_creates_an_empty_directory(tmp_path: Path):
    checkpointing.check_save_directory(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path / "a" / "b") == []


def test_unbuilt_formats_are_refused_before_anything_is_written(run):
    run.args.ckpt_format = "torch_dist"
    with pytest.raises(NotBuiltYetError, match="--ckpt-format torch_dist"):
        run.save(2)
    run.args.ckpt_format = "torch"
    with pytest.raises(NotBuiltYetError, match="--non-persistent-save-interval"):
        checkpointing.save_checkpoint(2, [run.model], None, None, 0, non_persistent_ckpt=True)
    assert not os.path.exists(run.args.save)


def test_save_prints_messages_and_writes_tracker_and_file(run, capsys: pytest.CaptureFixture):
    run.save(4)
    assert capsys.readouterr().out == (
        f"saving checkpoint at iteration       4 to {run.args.save} in torch format\n"
        f"  successfully saved checkpoint from iteration       4 to {run.args.save} [ t 1/1, p 1/1 ]\n"
    )
    assert Path(run.args.save, "latest_checkpointed_iteration.txt").read_bytes() == b"4"
    assert zipfile.is_zipfile(run.file(4))


def test_a_view_of_a_buffer_is_saved_without_the_buffer(run):
    buffer = torch.zeros(1_000_000)
    run.model._parameters["p0"].data = buffer[8:40].view(8, 4)
    run.save(2)
    assert run.file(2).stat().st_size < 200_000
