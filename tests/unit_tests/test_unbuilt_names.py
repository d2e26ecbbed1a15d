"""Names of parts without code: they import everywhere, and say what they are when they are used."""

import abc
import dataclasses
import enum
import importlib
import importlib.machinery
import inspect
import pickle
import pkgutil
import subprocess
import sys
import typing

import pytest
import torch

import megatron
from megatron import unbuilt
from megatron.core import dist_checkpointing
from megatron.core.errors import MegatronError, NotBuiltYetError
from megatron.core.inference.contexts import ContextOverflowError, TokenOverflowError
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.unbuilt.placeholders import make
from megatron.unbuilt.table import FEATURES, Feature
from megatron.unbuilt.values import VALUES

ROWS = [
    (module, name, feature) for module, names in unbuilt.rows().items() for name, feature in names.items()
]


def home(name: str, feature: Feature) -> str:
    """The path under which a placeholder of several paths introduces itself."""
    return next(module for module, names in feature.modules.items() if name in names)


def has_a_file(module: str) -> bool:
    """Whether the import system finds it without the table."""
    path = None
    for count in range(1, module.count(".") + 2):
        spec = importlib.machinery.PathFinder.find_spec(".".join(module.split(".")[:count]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


@pytest.mark.parametrize("module", unbuilt.rows())
def test_every_name_imports_and_says_that_it_is_not_built(module: str) -> None:
    for name, feature in unbuilt.rows()[module].items():
        value = getattr(importlib.import_module(module), name)
        if f"{home(name, feature)}:{name}" in VALUES or name == "logger":
            continue
        with pytest.raises(NotBuiltYetError) as caught:
            value(1, any_keyword=2)
        text = str(caught.value)
        assert text.startswith(f"{home(name, feature)}.{name} ({feature.what}) is not built yet. ")
        assert text.endswith(feature.instead)
        assert isinstance(caught.value, MegatronError)


def test_a_row_goes_when_its_name_is_built() -> None:
    stale = []
    for module, name, _ in ROWS:
        if has_a_file(module) and (
            name in vars(importlib.import_module(module)) or has_a_file(f"{module}.{name}")
        ):
            stale.append(f"{module}:{name}")
    stale += [
        module
        for feature in FEATURES
        for module, names in feature.modules.items()
        if not names and has_a_file(module)
    ]
    assert not stale, f"built, so their rows in megatron/unbuilt/table.py have to go: {stale}"


def test_every_value_belongs_to_a_row() -> None:
    assert set(VALUES) <= {f"{home(name, feature)}:{name}" for _, name, feature in ROWS}


def test_no_module_is_listed_for_the_same_name_twice() -> None:
    pairs = [(module, name) for each in FEATURES for module, names in each.modules.items() for name in names]
    assert len(pairs) == len(set(pairs))


def test_a_submodule_can_be_imported_from_its_package_and_by_its_path() -> None:
    from megatron.core.ssm import mamba_block, mamba_mixer

    assert mamba_block is sys.modules["megatron.core.ssm.mamba_block"]
    assert mamba_mixer is sys.modules["megatron.core.ssm.mamba_mixer"]
    assert dist_checkpointing is sys.modules["megatron.core.dist_checkpointing"]
    for path in (
        "megatron.core.models.multimodal.context_parallel",
        "megatron.legacy.fp16_deprecated.loss_scaler",
    ):
        assert importlib.import_module(path).__doc__ == "Not built yet."


def test_one_placeholder_under_all_paths_of_a_part() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    assert dist_checkpointing.ShardedTensor is ShardedTensor


def test_a_placeholder_class_serves_as_annotation_and_as_base() -> None:
    class Mine(MambaLayer):
        def forward(self, x: MambaLayer | None, y: typing.Optional[MambaLayer]) -> "list[MambaLayer]":  # noqa: UP045
            raise AssertionError

    class Module(MambaLayer, torch.nn.Module):
        pass

    class Abstract(MambaLayer, abc.ABC):
        pass

    @dataclasses.dataclass
    class Parts(MambaLayerSubmodules):
        mixer: int = 0

    for each in (MambaLayer, Mine, Module, Abstract):
        assert not isinstance(torch.nn.Linear(1, 1), each)
        assert issubclass(each, MambaLayer)
        with pytest.raises(NotBuiltYetError, match=r"mamba_layer\.MambaLayer \(.*\) is not built"):
            each()
    with pytest.raises(NotBuiltYetError, match=r"MambaLayerSubmodules .* is not built"):
        Parts(mixer=2)
    assert not issubclass(torch.nn.Linear, MambaLayer)


def test_attributes_of_a_placeholder_are_missing_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols

    assert not hasattr(Symbols, "parse")
    assert getattr(Symbols, "parse", 5) == 5
    with pytest.raises(NotBuiltYetError, match=r"Symbols\.parse .* is not built yet"):
        Symbols.parse("M*-")
    with pytest.raises(NotBuiltYetError, match="Symbols"):
        _ = 1 in Symbols
    # Other projects patch methods onto classes.
    monkeypatch.setattr(Symbols, "parse", lambda text: text, raising=False)
    assert Symbols.parse(3) == 3


def test_exceptions_enumerations_and_constants_are_what_they_are_called() -> None:
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.export.data_type import DataType
    from megatron.core.models.multimodal.llava_model import IGNORE_INDEX, IMAGE_TOKEN
    from megatron.legacy.model.enums import AttnMaskType

    with pytest.raises(ContextOverflowError):
        raise TokenOverflowError("too many")
    assert StrictHandling("log_all") is StrictHandling.LOG_ALL
    assert isinstance(DataType.bfloat16, enum.Enum)
    assert (IMAGE_TOKEN, IGNORE_INDEX) == ("<image>", -100)
    assert AttnMaskType.causal.value == 2
    with pytest.raises(ValueError):
        StrictHandling("whatever")


def test_pickles_name_placeholders_and_never_make_instances() -> None:
    from megatron.core.export.data_type import DataType

    for value in (MambaLayer, DataType.float16, dist_checkpointing.save):
        assert pickle.loads(pickle.dumps(value)) is value
    made = b"cmegatron.core.ssm.mamba_layer\nMambaLayer\n)R."
    with pytest.raises(NotBuiltYetError):
        pickle.loads(made)


def test_unknown_modules_and_names_stay_ordinary_import_errors() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'megatron.core.nonsense'"):
        importlib.import_module("megatron.core.nonsense")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("megatron.core.ssm.nonsense")
    for module in (
        "megatron.core.optimizer",
        "megatron.core.ssm.mamba_layer",
        "megatron.core.utils",
    ):
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            _ = importlib.import_module(module).nonsense
        with pytest.raises(ImportError):
            exec(f"from {module} import nonsense", {})


def test_walking_the_packages_finds_files_only() -> None:
    found = {module.name for module in pkgutil.walk_packages(megatron.__path__, "megatron.")}
    assert "megatron.core.utils" in found
    assert not {name for name in found if not has_a_file(name)}


def test_a_file_wins_over_the_table(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real module that appears inside an unbuilt package is used, and its neighbours stay placeholders."""
    package = tmp_path / "ssm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mamba_mixer.py").write_text("class MambaMixer:\n    built = True\n")
    import megatron.core

    for name in [name for name in sys.modules if name.startswith("megatron.core.ssm")]:
        monkeypatch.delitem(sys.modules, name)
    # Importing sets these attributes; they are put back with the others.
    monkeypatch.setattr(megatron.core, "ssm", None, raising=False)
    monkeypatch.setattr(megatron.core, "__path__", [*megatron.core.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    assert importlib.import_module("megatron.core.ssm.mamba_mixer").MambaMixer.built
    neighbour = importlib.import_module("megatron.core.ssm.mamba_block")
    assert inspect.isclass(neighbour.MambaStack)
    for name in [name for name in sys.modules if name.startswith("megatron.core.ssm")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "first",
    [
        "megatron.core.models.mamba",
        "megatron.legacy.model",
        "megatron.inference.text_generation",
        "megatron.post_training.arguments",
    ],
)
def test_a_placeholder_may_be_the_first_import(first: str) -> None:
    check = f"import sys, {first}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_table_is_read_only_when_a_module_is_missing() -> None:
    check = "import sys, megatron, megatron.core; assert 'megatron.unbuilt' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_functions_keep_their_names() -> None:
    feature = next(each for each in FEATURES if "megatron.core.dist_checkpointing" in each.modules)
    assert make("save", feature).__qualname__ == "save"
    assert dist_checkpointing.save.__module__ == "megatron.core.dist_checkpointing"
