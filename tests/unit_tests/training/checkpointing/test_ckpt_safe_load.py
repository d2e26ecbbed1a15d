"""No function named in a file is ever called, and every kind of damage has an error message."""

import builtins
import os
import pickle
import subprocess
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.enums import ModelType
from megatron.core.errors import CheckpointError
from megatron.core.rerun_state_machine import RerunMode, RerunState
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.training.checkpointing import safe_load


def test_original_file_with_foreign_classes_loads(golden: Path):
    """Written by the original, with its own enumerations in it."""
    state = safe_load.load_file(str(golden / "ckpt/torch_tp1pp1/iter_0000004/mp_rank_00/model_optim_rng.pt"))
    args = state["args"]
    assert len(vars(args)) == 469
    assert (args.num_layers, args.hidden_size, args.swiglu, args.params_dtype) == (2, 16, True, torch.float32)
    assert args.attention_backend is AttnBackend.auto
    assert args.model_type is ModelType.encoder_or_decoder
    assert isinstance(state["model"], OrderedDict) and len(state["model"]) == 24
    assert state["rng_state"][0]["np_rng_state"][1].shape == (624,)
    assert state["rerun_state_machine"]["mode"] is RerunMode.DISABLED
    assert state["rerun_state_machine"]["sharded"]["state"] is RerunState.NOT_RUNNING_YET


def test_file_from_python_3_11_2_loads(golden: Path):
    """Written on Debian 12's Python 3.11.2, by the version before arguments were stored as plain values."""
    file = golden / "ckpt/python_3_11_2/iter_0000002/mp_rank_00/model_optim_rng.pt"
    assert b"c__builtin__\ngetattr\n" in file.read_bytes()
    state = safe_load.load_file(str(file))
    args = state["args"]
    assert args.attention_backend is AttnBackend.auto
    assert (state["iteration"], args.hidden_size, args.consumed_train_samples) == (2, 4, 4)
    assert state["rng_state"][0]["np_rng_state"][1].dtype == np.uint32


class Payload:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


PAYLOADS = {
    "os.system": lambda mark: Payload(os.system, f"touch {mark}"),
    "eval": lambda mark: Payload(builtins.eval, f"open({mark!r}, 'w')"),
    "exec": lambda mark: Payload(builtins.exec, f"open({mark!r}, 'w')"),
    "open": lambda mark: Payload(builtins.open, mark, "w"),
    "getattr": lambda mark: Payload(getattr, Path(mark), "touch"),
    "Popen": lambda mark: Payload(subprocess.Popen, ["touch", mark]),
    "torch.save": lambda mark: Payload(torch.save, {}, mark),
    "torch.hub.load": lambda mark: Payload(torch.hub.load, os.path.dirname(mark), "model", "local"),
    "touch": lambda mark: Payload(touch, mark),
}


@pytest.mark.parametrize("depth", ["alone", "inside args", "as optimizer"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_malicious_pickle_never_runs(tmp_path: Path, payload: str, depth: str):
    mark = tmp_path / "executed"
    bomb = PAYLOADS[payload](str(mark))
    content = {
        "alone": bomb,
        "inside args": {"args": [{"x": bomb}], "model": {}},
        "as optimizer": {"model": {"w": torch.ones(2)}, "optimizer": bomb},
    }[depth]
    file = tmp_path / "model_optim_rng.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="Nothing in it was executed") as caught:
        safe_load.load_file(str(file))
    assert bomb.call[0].__name__ in str(caught.value)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_plain_pickle_never_runs(tmp_path: Path, protocol: int):
    """Not even made with torch.save."""
    mark = tmp_path / "executed"
    file = tmp_path / "model_optim_rng.pt"
    file.write_bytes(pickle.dumps(Payload(os.system, f"touch {mark}"), protocol=protocol))
    with pytest.raises(CheckpointError):
        safe_load.load_file(str(file))
    assert not mark.exists()


def test_unknown_enum_values_become_stand_ins(tmp_path: Path):
    file = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {}, "x": AttnBackend.auto}, file)
    # The pickle holds the value as one byte after the opcode K.
    content = _rewrite_pickle(file, lambda data: data.replace(b"K\x05", b"K\x63"))
    assert repr(content["x"]) == "<megatron.core.transformer.enums.AttnBackend(99,)>"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_enum_members_load_as_every_python_pickles_them(tmp_path: Path, zipped: bool):
    """As a call of the class with the value, and as a call of getattr with the name."""
    content = {
        "call": Payload(AttnBackend, 2),
        "getattr": Payload(getattr, AttnBackend, "fused"),
        "again": [Payload(getattr, AttnBackend, name) for name in ("flash", "auto")],
        "text": Payload(getattr, RerunMode, "DISABLED"),
        "unknown": Payload(getattr, AttnBackend, "quantum"),
        "not a member": Payload(getattr, AttnBackend, "__class__"),
        "foreign": Payload(getattr, AttnMaskType, "causal"),
    }
    file = tmp_path / "model_optim_rng.pt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    if not zipped:
        with pytest.raises(CheckpointError, match=r"AttnMaskType.*Nothing in it was executed"):
            safe_load.load_file(str(file))
        del content["foreign"]
        torch.save(content, file, _use_new_zipfile_serialization=False)
    read = safe_load.load_file(str(file))
    assert read["call"] is read["getattr"] is AttnBackend.fused
    assert read["again"] == [AttnBackend.flash, AttnBackend.auto]
    assert read["text"] is RerunMode.DISABLED
    assert repr(read["unknown"]) == "<megatron.core.transformer.enums.AttnBackend('quantum',)>"
    assert repr(read["not a member"]) == "<megatron.core.transformer.enums.AttnBackend('__class__',)>"
    if zipped:
        assert repr(read["foreign"]) == "<megatron.core.transformer.enums.AttnMaskType('causal',)>"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize(
    "arguments",
    [(Namespace, "__init__"), (OrderedDict, "fromkeys"), (AttnBackend, "x", 1), (AttnBackend.auto, "value")],
    ids=str,
)
def test_getattr_of_anything_but_an_enum_member_is_refused(tmp_path: Path, arguments: tuple, protocol: int):
    file = tmp_path / "model_optim_rng.pt"
    torch.save({"x": Payload(getattr, *arguments)}, file, pickle_protocol=protocol)
    with pytest.raises(CheckpointError) as caught:
        safe_load.load_file(str(file))
    if protocol == 2:  # others hold instructions that torch's reader does not know
        assert "wants to run or build builtins.getattr" in str(caught.value)


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numbers_of_numpy_1_and_2_load(tmp_path: Path, core: str):
    file = tmp_path / "model_optim_rng.pt"
    values = [np.float64(0.5), np.int32(3), np.bool_(True), np.arange(3, dtype=np.float16), np.arange(2) > 0]
    torch.save({"x": values}, file)
    own, asked = (f"numpy.{name}.multiarray\n".encode() for name in (_numpy_core(), core))
    read = _rewrite_pickle(file, lambda data: data.replace(own, asked))["x"]
    assert read[:3] == [0.5, 3, True]
    for found, expected in zip(read[3:], values[3:], strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)


def _numpy_core() -> str:
    """Name of the package that NumPy's functions call their own: core before version 2."""
    return np.float64(0).__reduce__()[0].__module__.split(".")[1]


def test_classes_of_this_package_are_not_imported(tmp_path: Path):
    """A class that calls itself ours becomes a stand-in; the module it names is not touched."""
    file = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {}, "x": Payload(touch, "argument")}, file)
    # Same length, so that the archive stays intact: only the pickle's module name changes.
    own_name = f"{__name__}\n".encode()
    forged = f"megatron.{'m' * (len(__name__) - 9)}\n".encode()
    content = _rewrite_pickle(file, lambda data: data.replace(own_name, forged))
    state = content["x"]
    assert isinstance(state, safe_load.Unknown) and state.args == ("argument",)


def _rewrite_pickle(file: Path, change) -> dict:
    import zipfile

    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return safe_load.load_file(str(file))


@pytest.fixture
def good_file(tmp_path: Path) -> Path:
    for iteration in (2, 4):
        file = tmp_path / f"iter_{iteration:07d}" / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"model": {"w": torch.arange(4096.0)}, "iteration": iteration}, file)
    return file


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9, 0.99, -1])
def test_truncated_file_is_refused_with_its_size(good_file: Path, keep: float):
    whole = good_file.read_bytes()
    size = len(whole) - 1 if keep < 0 else int(len(whole) * keep)
    good_file.write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match="cut short or damaged") as caught:
        safe_load.load_file(str(good_file))
    message = str(caught.value)
    assert str(good_file) in message and f"({size} bytes)" in message and "--ckpt-step 2" in message


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02."])
def test_file_that_is_no_checkpoint_is_refused(good_file: Path, content: bytes):
    good_file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        safe_load.load_file(str(good_file))


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_flipped_bytes_in_a_tensor_are_detected(good_file: Path, place: float):
    data = bytearray(good_file.read_bytes())
    data[int(len(data) * place)] ^= 0xFF
    good_file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        safe_load.load_file(str(good_file))


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), "text"])
def test_content_must_be_a_dict(good_file: Path, content):
    torch.save(content, good_file)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        safe_load.load_file(str(good_file))


def test_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="cannot open checkpoint file"):
        safe_load.load_file(str(tmp_path / "nothing.pt"))
