"""What goes into a file: readable by plain torch, by the original, and by our own restricted reader."""

import enum
import functools
import types
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.enums import Fp8Recipe, ModelType
from megatron.core.errors import CheckpointError
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.training.checkpointing import safe_load, state

STORED = {
    "number": 3,
    "umlaut": "ä",
    "flag": True,
    "nothing": None,
    "list": [1, "a", None],
    "tuple": (0.9, 0.95),
    "dict": {"a": [1], 2: {"b": 1.5}},
    "set": {1, 2},
    "bytes": b"\x00\xff",
    "dtype": torch.bfloat16,
    "big": 2**70,
    "infinite": float("inf"),
    "complex": 1 - 2j,
    "shape": torch.Size([2, 3]),
}


class Name(str):
    """Text of a class of its own, as YAML readers and option types make it."""


class Level(enum.IntEnum):
    HIGH = 7


class Options(enum.Flag):
    A = 1
    B = 2


Pair = namedtuple("Pair", "left right")

# name: (what a run may hold, what is stored)
MADE_PLAIN = {
    "model_type": (ModelType.encoder_or_decoder, 1),
    "attention_backend": (AttnBackend.auto, 5),
    "other_enum": (AttnMaskType.causal, 2),
    "text_enum": (Fp8Recipe.delayed, "delayed"),
    "number_enum": (Level.HIGH, 7),
    "flags": (Options.A | Options.B, 3),
    "nested_enum": ([{"a": (AttnBackend.local,)}], [{"a": (4,)}]),
    "enum_key": ({AttnBackend.flash: 1}, {1: 1}),
    "path": (Path("a/b"), "a/b"),
    "double": (np.float64(0.5), 0.5),
    "single": (np.float32(0.5), 0.5),
    "int64": (np.int64(3), 3),
    "truth": (np.bool_(True), True),
    "numpy_text": (np.str_("a"), "a"),
    "text": (Name("a"), "a"),
    "ordered": (OrderedDict(a=1), OrderedDict(a=1)),
    "counted": (Counter("aab"), {"a": 2, "b": 1}),
    "defaults": (defaultdict(list, a=[1]), {"a": [1]}),
    "pair": (Pair(1, Path("x")), (1, "x")),
    "frozen": (frozenset({1}), {1}),
    "queue": (deque([1, 2]), [1, 2]),
    "range": (range(3), [0, 1, 2]),
    "bytearray": (bytearray(b"a"), b"a"),
    "namespace": (Namespace(backend=AttnBackend.auto), Namespace(backend=5)),
}
LEFT_OUT = {
    "function": lambda: 0,
    "partial": functools.partial(print, 1),
    "module": types,
    "class": AttnBackend,
    "nested_function": [1, print],
    "object": object(),
    "tensor": torch.ones(2),
    "numpy_type": np.float32,
    "long_double": np.longdouble(1),
}


def kinds_in(value) -> set[type]:
    """Types of a structure's values, keys and containers."""
    found = {type(value)}
    if isinstance(value, Namespace):
        return found | kinds_in(vars(value))
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set)) and not isinstance(value, torch.Size):
        found = found.union(*map(kinds_in, value))
    return found


def test_arguments_are_stored_as_plain_values(tmp_path: Path):
    made = {name: before for name, (before, _) in MADE_PLAIN.items()}
    expected = STORED | {name: after for name, (_, after) in MADE_PLAIN.items()}
    args = Namespace(**STORED | made | LEFT_OUT)
    kept = state.storable_args(args)
    assert vars(kept) == expected
    assert kinds_in(kept) == {
        Namespace, dict, OrderedDict, list, tuple, set, type(None), bool, int, float, complex, str, bytes,
        torch.dtype, torch.Size,
    }  # fmt: skip
    assert all(getattr(args, name) is value for name, value in made.items())  # the run's own are untouched

    torch.save({"args": kept}, tmp_path / "file.pt")
    with torch.serialization.safe_globals([Namespace]):  # which is all that a reader has to know
        assert torch.load(tmp_path / "file.pt", weights_only=True)["args"] == kept
    read = safe_load.load_file(str(tmp_path / "file.pt"))["args"]
    members = {"model_type": ModelType.encoder_or_decoder, "attention_backend": AttnBackend.auto}
    assert vars(read) == expected | members


def test_to_host_returns_plain_values():
    content = state.to_host(
        {
            "iteration": np.int64(4),
            "optimizer": {"param_groups": [{"lr": np.float64(0.5), "mode": AttnBackend.flash}]},
            "rng_state": [{"np_rng_state": ("MT19937", np.arange(3, dtype=np.uint32), 1)}],
        }
    )
    assert type(content["iteration"]) is int and content["iteration"] == 4
    (group,) = content["optimizer"]["param_groups"]
    assert type(group["lr"]) is float and group == {"lr": 0.5, "mode": 1}
    assert content["rng_state"][0]["np_rng_state"][1].dtype == np.uint32


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"optimizer": {"groups": [1, object()]}}, r"\['optimizer'\]\['groups'\]\[1\] is a builtins.object"),
        ({"model": {"_extra_state": functools.partial(print)}}, r"_extra_state'\] is a functools.partial"),
        ({"model": {"x": np.array([object()])}}, r"\['model'\]\['x'\] is a numpy.ndarray"),
    ],
)
def test_objects_of_other_classes_are_refused_on_save(content: dict, place: str):
    with pytest.raises(CheckpointError, match=place):
        state.to_host(content)


def test_to_host_copies_views_and_keeps_shared_tensors():
    buffer = torch.arange(100.0)
    window, whole = buffer[10:14].view(2, 2), torch.ones(3)
    model = OrderedDict(a=window, tied=window.view(2, 2), b=whole, extra=None)
    model._metadata = {"": {"version": 1}}
    copied = state.to_host({"model": model, "list": [whole, (buffer[10:14], 5)]})
    result = copied["model"]
    assert type(result) is OrderedDict and result._metadata == model._metadata and result["extra"] is None
    assert torch.equal(result["a"], window) and result["a"].untyped_storage().nbytes() == 16
    assert result["tied"] is result["a"]
    assert result["b"].data_ptr() == whole.data_ptr() and copied["list"][0] is result["b"]
    assert torch.equal(copied["list"][1][0], buffer[10:14]) and copied["list"][1][1] == 5


@pytest.mark.parametrize(("chunks", "expected"), [(1, ["model"]), (3, ["model0", "model1", "model2"])])
def test_model_chunks_are_stored_under_numbered_keys(chunks: int, expected: list[str]):
    assert state.model_keys(chunks) == expected


def test_state_dict_has_the_parts_that_flags_ask_for(run):
    run.step()

    def keys(**settings) -> list[str]:
        args = Namespace(**{**vars(run.args), **settings})
        return list(
            state.generate_state_dict(
                args,
                [run.model],
                run.optimizer,
                run.scheduler,
                [{}],
                iteration=4,
                rerun_state=settings.get("rerun"),
            )
        )

    full = [
        "args",
        "checkpoint_version",
        "iteration",
        "model",
        "optimizer",
        "opt_param_scheduler",
        "rng_state",
    ]
    assert keys() == full
    assert keys(no_save_optim=True) == [*full[:4], "rng_state"]
    assert keys(no_save_rng=True) == full[:-1]
    assert keys(rerun={"mode": 0}) == [*full[:-1], "rerun_state_machine", "rng_state"]
