"""What goes into a file: readable by plain torch, by the original, and by our own restricted reader."""

import types
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.enums import Fp8Recipe, ModelType
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.training.checkpointing import safe_load, state

STORED = {
    "number": 3,
    "text": "ä",
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
    "model_type": ModelType.encoder_or_decoder,
    "attention_backend": AttnBackend.auto,
}
LEFT_OUT = {
    "function": lambda: 0,
    "module": types,
    "other_enum": AttnMaskType.causal,
    "text_enum": Fp8Recipe.delayed,
    "nested_function": [1, print],
    "object": object(),
    "tensor": torch.ones(2),
}


def test_arguments_that_any_reader_can_unpickle(tmp_path: Path):
    args = Namespace(**STORED, **LEFT_OUT, path=Path("a/b"), numpy=np.float64(0.5))
    kept = state.storable_args(args)
    assert vars(kept) == {**STORED, "path": "a/b", "numpy": 0.5}
    torch.save({"args": kept}, tmp_path / "file.pt")
    assert vars(safe_load.load_file(str(tmp_path / "file.pt"))["args"]) == vars(kept)
    assert torch.load(tmp_path / "file.pt", weights_only=False)["args"] == kept
    assert args.function is LEFT_OUT["function"]  # the run's own arguments are untouched


def test_tensors_on_their_way_to_disk():
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
def test_names_of_chunks(chunks: int, expected: list[str]):
    assert state.model_keys(chunks) == expected


def test_order_and_conditions_of_the_parts(run):
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
