"""The registry of replaceable functions."""

import sys
import textwrap
import timeit

import pytest
import torch

from megatron.core import overrides
from megatron.core.fusions import fused_layer_norm
from megatron.core.overrides import OverrideError, override

PATH = "megatron.core.fusions.fused_layer_norm.rms_norm"


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """Leaves the registry of this process as it was."""
    monkeypatch.setattr(overrides, "_disabled", set())
    monkeypatch.delenv(overrides.DISABLE_VARIABLE, raising=False)
    before = {path: point.replacement for path, point in overrides._points.items()}
    yield
    overrides._disabled.clear()
    for path, point in overrides._points.items():
        point.replacement = before.get(path)
        point.refresh()


def replacement(x, weight, eps):
    return x * 0 + 42


def call():
    """Through the name that a module imported before the override knows."""
    return float(fused_layer_norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)[0, 0])


def row():
    return next(status for status in overrides.table() if status.path == PATH)


def test_replacement_reaches_earlier_imports():
    held = fused_layer_norm.rms_norm
    assert call() == pytest.approx(1.0)
    assert not row().active
    assert override(PATH)(replacement) is replacement
    assert call() == 42
    assert float(held(torch.ones(2, 4), torch.ones(4), 1e-6)[0, 0]) == 42
    assert row().active
    assert row().replacement.endswith("test_overrides.replacement")
    assert held.__doc__.startswith("``x / sqrt")


def test_second_replacement_is_refused():
    override(PATH)(replacement)
    with pytest.raises(OverrideError, match=r"already replaced by .*test_overrides.replacement"):
        override(PATH)(lambda x, weight, eps: x)
    assert call() == 42
    override(PATH)(replacement)  # a module imported twice is no conflict


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: x,
        lambda x, gamma, eps: x,
        lambda weight, x, eps: x,
        lambda x, weight, eps=1e-6: x,
        lambda x, weight, *, eps: x,
        lambda *args: args[0],
    ],
)
def test_another_signature_is_refused(function):
    with pytest.raises(OverrideError, match="same parameters"):
        override(PATH)(function)
    assert call() == pytest.approx(1.0)


def test_unknown_points():
    with pytest.raises(OverrideError, match=r"no function is marked .*fused_layer_norm\.rms_norm"):
        override("megatron.core.fusions.fused_layer_norm.rmsnorm")(replacement)
    with pytest.raises(OverrideError, match=r"cannot import 'megatron\.core\.fusion'"):
        override("megatron.core.fusion.rms_norm")(replacement)


def test_points_of_modules_not_imported_yet(tmp_path, monkeypatch):
    (tmp_path / "late_points.py").write_text(
        textwrap.dedent("""
            from megatron.core.overrides import overridable

            @overridable
            def double(x):
                return 2 * x
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    override("late_points.double")(lambda x: "replaced")
    import late_points

    assert late_points.double(1) == "replaced"
    del overrides._points["late_points.double"]


@pytest.mark.parametrize("name", ["rms_norm", PATH, "fused_layer_norm.rms_norm", "all", "swiglu, rms_norm"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_disabled_replacement_is_not_called(name, order):
    if order == "before":
        overrides.disable(name)
    override(PATH)(replacement)
    if order == "after":
        overrides.disable(name)
    assert call() == pytest.approx(1.0)
    assert row().reason == "disabled by name"
    overrides.enable_all()
    assert call() == 42


def test_disable_by_environment(monkeypatch):
    monkeypatch.setenv(overrides.DISABLE_VARIABLE, "swiglu,rms_norm")
    override(PATH)(replacement)
    assert call() == pytest.approx(1.0)


def test_disable_of_unknown_name():
    with pytest.raises(
        OverrideError, match=r"'rms_nrom'.*did you mean 'megatron.core.fusions.fused_layer_norm.rms_norm'"
    ):
        overrides.disable("rms_nrom")


def test_load_imports_the_package_of_a_device(tmp_path, monkeypatch):
    assert not overrides.load("nosuchdevice")
    package = tmp_path / "megatron_toy"
    package.mkdir()
    (package / "__init__.py").write_text(
        textwrap.dedent(f"""
            from megatron.core.overrides import override

            @override("{PATH}")
            def toy(x, weight, eps):
                return x * 0 + 7
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert overrides.load("toy")
    assert call() == 7
    assert overrides.load("toy")
    sys.modules.pop("megatron_toy")


def test_every_kernel_is_listed():
    overrides.import_all_points()
    names = {status.path.rpartition(".")[2] for status in overrides.table()}
    assert names >= {
        "accumulate_weight_gradient",
        "bias_dropout_add",
        "bias_gelu_impl",
        "cross_entropy",
        "dropout",
        "embedding_lookup",
        "fused_attention",
        "gated_gelu",
        "layer_norm",
        "rms_norm",
        "rotary",
        "scaled_masked_softmax",
        "swiglu",
    }


def test_dispatch_is_cheap():
    def plain(x, weight, eps):
        return x

    point = overrides.overridable(plain)
    count = 20_000
    best = [
        min(timeit.repeat(lambda f=f: f(1, 2, eps=3), number=count, repeat=7)) / count for f in (plain, point)
    ]
    del overrides._points[f"{plain.__module__}.{plain.__qualname__}"]
    assert best[1] - best[0] < 1e-6  # 0.1 us on an idle machine
