"""Every public name of Megatron-LM core_r0.12.1: it imports, and takes its arguments under their names.

``tests/golden/api/public_names.tsv`` lists what scripts import: module, kind, name, and the parameters with
their defaults. Rows of parts that are not built yet are compared from the day they are.
"""

import ast
import dataclasses
import enum
import importlib
import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron import unbuilt
from megatron.core.enums import Fp8Recipe

TABLE = Path(__file__).parents[1] / "golden" / "api" / "public_names.tsv"
KINDS = inspect.Parameter
# A name to import; it refuses to be made.
_NULL_MULTIMODAL = "megatron.training.tokenizer.tokenizer:_NullMultimodalTokenizer"
# Rows that are another way here, and why. "module:name"
OTHERWISE = {
    # Parts that are not built yet, as methods of classes that are.
    "megatron.core.transformer.attention:Attention.flash_decode": "generation without a key/value cache",
    "megatron.core.transformer.attention:Attention.flash_decode_and_prefill": "the same",
    "megatron.core.transformer.transformer_layer:TransformerLayer.get_layer_static_inputs": "CUDA graphs",
    "megatron.core.transformer.transformer_layer:TransformerLayer.setup_manual_hooks": "CUDA graphs",
    "megatron.core.transformer.module:Float16Module.sharded_state_dict": "distributed checkpoints",
    # One more place for what another row demands.
    "megatron.core.transformer.enums:ModelType": "megatron.core.enums.ModelType itself",
    # Named parameters where the original takes anything.
    "megatron.core.transformer.transformer_layer:TransformerLayer.forward": "hidden_states and what follows",
}
OTHERWISE |= {
    f"{_NULL_MULTIMODAL}.{name}": "there are no multimodal models"
    for name in ("additional_special_tokens_ids", "convert_tokens_to_ids", "tokenize")
}
_SHARDED = "distributed checkpoints are not built yet"
OTHERWISE |= {
    f"megatron.core.{name}": _SHARDED
    for name in (
        "models.common.language_module.language_module:LanguageModule.tie_embeddings_and_output_weights_state_dict",
        "optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_fs_bucket_space",
        "optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state_from_dp_zero_legacy",
        "optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state_from_fs_bucket_space",
        "optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state_from_fs_model_space",
        "optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_dp_zero",
        "optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fs_bucket_space",
        "optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fs_model_space",
        "optimizer.distrib_optimizer:DistributedOptimizer.split_state_dict_if_needed",
    )
}


class Row(NamedTuple):
    module: str
    kind: str
    name: str
    parameters: str

    @property
    def key(self) -> str:
        return f"{self.module}:{self.name}"


def read_rows() -> list[Row]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()[1:]
    return [Row(*line.split("\t")) for line in lines]


ROWS = read_rows()
BY_MODULE: dict[str, list[Row]] = defaultdict(list)
for each in ROWS:
    BY_MODULE[each.module].append(each)


class Wanted(NamedTuple):
    """A parameter as the table has it; ``default`` is None for "none" and "..." for "some"."""

    name: str
    kind: Any
    default: str | None


def wanted_parameters(text: str) -> list[Wanted]:
    found = ast.parse(f"def f{text}: pass").body[0].args

    def words(default: ast.expr | None) -> str | None:
        return None if default is None else ast.unparse(default)

    defaults = [None] * (len(found.args) - len(found.defaults)) + list(found.defaults)
    wanted = [
        Wanted(arg.arg, KINDS.POSITIONAL_OR_KEYWORD, words(default))
        for arg, default in zip(found.args, defaults, strict=True)
    ]
    if found.vararg:
        wanted.append(Wanted(found.vararg.arg, KINDS.VAR_POSITIONAL, None))
    wanted += [
        Wanted(arg.arg, KINDS.KEYWORD_ONLY, words(default))
        for arg, default in zip(found.kwonlyargs, found.kw_defaults, strict=True)
    ]
    if found.kwarg:
        wanted.append(Wanted(found.kwarg.arg, KINDS.VAR_KEYWORD, None))
    return wanted


def as_words(value: Any) -> str:
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)


def same_default(module: Any, words: str, ours: Any) -> bool:
    """Whether the default is what the words say, read with the names of the module."""
    names = {
        "torch": torch,
        "F": torch.nn.functional,
        "Fp8Recipe": Fp8Recipe,
        "numpy": importlib.import_module("numpy"),
    }
    value = eval(words, names | vars(module))
    return as_words(value) == as_words(ours)


def differences(module: Any, wanted: list[Wanted], ours: list[inspect.Parameter]) -> list[str]:
    """What keeps a call that the original takes from being taken here with the same meaning."""
    by_name = {parameter.name: parameter for parameter in ours}
    found = []
    for each in wanted:
        mine = by_name.get(each.name)
        if mine is None:
            found.append(f"no parameter {each.name}")
        elif mine.kind is not each.kind:
            found.append(f"{each.name} is {mine.kind.description}, not {each.kind.description}")
        elif each.default is not None and mine.default is KINDS.empty:
            found.append(f"{each.name} has no default")
        elif each.default not in (None, "...") and not same_default(module, each.default, mine.default):
            found.append(f"{each.name} defaults to {mine.default!r}, not {each.default}")
    # Parameters of our own come after the original's, or by name alone, and may be left out.
    positional = [each.name for each in wanted if each.kind is KINDS.POSITIONAL_OR_KEYWORD]
    mine = [each.name for each in ours if each.kind is KINDS.POSITIONAL_OR_KEYWORD]
    if mine[: len(positional)] != positional:
        found.append(f"positional order {mine}, not {positional}")
    names = {each.name for each in wanted}
    extras = [each for each in ours if each.name not in names]
    found += [
        f"{each.name} is of our own and must be given"
        for each in extras
        if each.default is KINDS.empty and each.kind not in (KINDS.VAR_POSITIONAL, KINDS.VAR_KEYWORD)
    ]
    return found


def parameters_of(row: Row, owner: Any, value: Any) -> list[inspect.Parameter]:
    """Ours, without the instance that a method is bound to."""
    found = list(inspect.signature(value).parameters.values())
    short = row.name.rpartition(".")[2]
    is_bound = inspect.isclass(owner) and isinstance(
        inspect.getattr_static(owner, short), (staticmethod, classmethod)
    )
    return found[1:] if row.kind == "method" and not is_bound else found


def compare(row: Row) -> list[str]:
    """What is wrong with the name of a row; nothing for names of parts that are not built yet."""
    module = importlib.import_module(row.module)
    if row.kind == "module":
        return []
    first, _, rest = row.name.partition(".")
    if first in unbuilt.rows().get(row.module, {}):
        getattr(module, first)
        return []
    if not hasattr(module, first):
        try:
            importlib.import_module(f"{row.module}.{first}")
        except ModuleNotFoundError:
            return ["missing"]
        return []
    owner = getattr(module, first) if rest else module
    value = getattr(owner, rest or first, None)
    if row.kind == "field":
        return compare_field(module, owner, rest, row.parameters)
    if not hasattr(owner, rest or first):
        return ["missing"]
    if row.kind == "enum":
        return compare_enum(module, value, row.parameters)
    if row.kind == "autograd":
        forward = getattr(value, "forward", None) or value.apply
        ours = list(inspect.signature(forward).parameters.values())
        if hasattr(value, "forward"):
            ours = ours[1:]  # the context
        return differences(module, wanted_parameters(row.parameters), ours)
    if row.kind in ("name", "property") or not row.parameters:
        return []
    return differences(module, wanted_parameters(row.parameters), parameters_of(row, owner, value))


def compare_field(module: Any, owner: Any, name: str, words: str) -> list[str]:
    field = (
        {field.name: field for field in dataclasses.fields(owner)}.get(name)
        if dataclasses.is_dataclass(owner)
        else None
    )
    if field is None:
        return [] if name in getattr(owner, "_fields", ()) else ["no such field"]
    if words == "not an argument":
        return [f"{name} is an argument of the constructor"] if field.init else []
    if words == "own copy":
        return [] if field.default_factory is dict else ["not a dict of its own"]
    if not words:
        return []
    if field.default is dataclasses.MISSING:
        return ["no default"]
    return [] if same_default(module, words, field.default) else [f"default {field.default!r}, not {words}"]


def compare_enum(module: Any, value: Any, words: str) -> list[str]:
    wanted = dict(word.split("=", 1) for word in words.split())
    if list(value.__members__) != list(wanted):
        return [f"members {list(value.__members__)}, not {list(wanted)}"]
    fixed = {name: text for name, text in wanted.items() if text != "auto()"}
    return [
        f"{name} is {value[name].value!r}" for name, text in fixed.items() if repr(value[name].value) != text
    ]


def problems_in(*modules: str) -> list[str]:
    """What differs from the table in these modules and those inside them."""
    inside = [m for m in BY_MODULE if any(m == name or m.startswith(f"{name}.") for name in modules)]
    assert inside, f"the table has no row of {modules}"
    rows = [row for module in inside for row in BY_MODULE[module] if row.key not in OTHERWISE]
    return [f"{row.name}{row.parameters}: {problem}" for row in rows for problem in compare(row)]


@pytest.mark.parametrize("module", BY_MODULE)
def test_names_and_parameters_are_the_original_ones(module: str) -> None:
    found = problems_in(module)
    assert not found, "\n".join(found)


def callables() -> list[tuple[Row, Any, list[inspect.Parameter]]]:
    found = []
    for row in ROWS:
        first, _, rest = row.name.partition(".")
        if row.kind not in ("function", "method", "static", "classmethod", "class") or row.key in OTHERWISE:
            continue
        if not row.parameters or first in unbuilt.rows().get(row.module, {}):
            continue
        module = importlib.import_module(row.module)
        owner = getattr(module, first) if rest else module
        value = getattr(owner, rest or first)
        found.append((row, value, parameters_of(row, owner, value)))
    return found


def test_every_call_can_be_written_with_keywords() -> None:
    refused = []
    found = callables()
    for row, _, ours in found:
        wanted = wanted_parameters(row.parameters)
        named = (KINDS.POSITIONAL_OR_KEYWORD, KINDS.KEYWORD_ONLY)
        try:
            inspect.Signature(ours).bind(**{each.name: None for each in wanted if each.kind in named})
        except (TypeError, ValueError) as error:
            refused.append(f"{row.key}: {error}")
    assert len(found) > 700
    assert not refused, "\n".join(refused)


def test_exceptions_from_the_table_are_still_needed() -> None:
    """What came to be like the original is compared from then on."""
    known = {row.key: row for row in ROWS}
    assert set(OTHERWISE) <= set(known)
    met = [key for key in OTHERWISE if not key.startswith(_NULL_MULTIMODAL) and not compare(known[key])]
    assert not met


def test_the_comparison_notices_every_kind_of_difference() -> None:
    def ours(a, b=1, *, d=2, extra=None): ...

    def check(text: str) -> list[str]:
        return differences(
            inspect.getmodule(Row), wanted_parameters(text), list(inspect.signature(ours).parameters.values())
        )

    assert check("(a, b=1, *, d=2)") == []
    assert check("(a, b=1)") == []
    assert check("(a, c, b=1)") == ["no parameter c", "positional order ['a', 'b'], not ['a', 'c', 'b']"]
    assert check("(b, a)") == ["positional order ['a', 'b'], not ['b', 'a']"]
    assert check("(a, b=2)") == ["b defaults to 1, not 2"]
    assert check("(a=1, b=1)") == ["a has no default"]
    assert check("(b=1)") == ["positional order ['a', 'b'], not ['b']", "a is of our own and must be given"]
    assert check("(a, b=1, d=2)")[0].startswith("d is keyword-only")
