"""The floors of megatron.core: who may know whom, also inside functions and for type checkers only.

Core does not know the command line either: its texts speak of config fields, and the application adds flags.
"""

import ast
import re

import pytest
from source_tree import Module, cycles, import_graph, modules

CORE = "megatron.core"
# The lowest first. A room imports from its own floor and from those below; a longer name wins over a shorter.
FLOORS = {
    "config and process groups": (
        "accelerator",
        "collectives",
        "config",
        "config_logger",
        "device_backends",
        "enums",
        "errors",
        "inference_params",
        "jit",
        "model_parallel_config",
        "overrides",
        "package_info",
        "packed_seq_params",
        "parallel_state",
        "process_groups",
        "process_groups_config",
        "rank_grid",
        "timers",
        "transformer.config_fields",
        "transformer.config_rules",
        "transformer.enums",
        "transformer.pipeline_layout",
        "transformer.transformer_config",
        "utils",
    ),
    "tensors in parallel": ("fusions", "tensor_parallel"),
    # Embeddings are layers, whatever the public path of their files says.
    "layers": ("context_parallel", "extensions", "models.common.embeddings", "transformer"),
    "models": ("models",),
    "gradients over ranks": ("distributed", "num_microbatches_calculator", "rerun_state_machine"),
    "schedules and optimizer": ("optimizer", "optimizer_param_scheduler", "pipeline_parallel"),
}
# Beside the tower: it stands on the lowest floor, and only the application knows it.
BESIDE = "datasets"
A_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]+(?:[-_][a-z0-9]+)*")
ROOM_FLOORS = {room: number for number, rooms in enumerate(FLOORS.values()) for room in rooms}


def floor_of(module: str) -> int | None:
    """Number of the floor of a module of core; None for what stands beside, or for no module of core.

    Raises:
        KeyError: the module has no floor yet.
    """
    if module == CORE:
        return 0
    parts = module.removeprefix(f"{CORE}.").split(".")
    if not module.startswith(f"{CORE}.") or parts[0] == BESIDE:
        return None
    rooms = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    found = next((room for room in rooms if room in ROOM_FLOORS), None)
    if found is None:
        raise KeyError(f"{module} has no floor: name it in FLOORS")
    return ROOM_FLOORS[found]


def is_beside(module: str) -> bool:
    return f"{module}.".startswith(f"{CORE}.{BESIDE}.")


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    """Imports that lead to a higher floor, or between the tower and what stands beside it."""
    found = []
    for name, targets in graph.items():
        inside_core = [target for target in targets if f"{target}.".startswith(f"{CORE}.")]
        for target in inside_core if f"{name}.".startswith(f"{CORE}.") else []:
            mine, theirs = floor_of(name), floor_of(target)
            if mine is None:
                allowed = is_beside(target) or theirs == 0
            else:
                allowed = theirs is not None and theirs <= mine
            if not allowed:
                found.append(f"{name} imports {target}")
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Every import of the project, wherever it stands."""
    return import_graph(modules(), everywhere=True)


def test_imports_of_core_lead_down(graph: dict[str, set[str]]) -> None:
    found = arrows_up(graph)
    assert not found, "\n".join(found)


def test_no_circle_even_through_late_imports(graph: dict[str, set[str]]) -> None:
    found = cycles(graph)
    assert not found, "\n".join(" <-> ".join(group) for group in found)


def flags_in_texts(module: Module) -> list[str]:
    """Flags in docstrings and messages, with their lines."""
    return [
        f"{module.name}:{node.lineno} {flag}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for flag in A_FLAG.findall(node.value)
    ]


def test_texts_of_core_name_no_flags() -> None:
    core = [module for name, module in modules().items() if name.startswith(f"{CORE}.")]
    found = [flag for module in core for flag in flags_in_texts(module)]
    assert not found, "\n".join(found)
    assert flags_in_texts(modules()["megatron.training.arguments.spellings"]), "flags are seen where they are"


def test_imports_upward_and_sideways_are_found(known_names: set[str]) -> None:
    """Every entry is a module, and arrows up, sideways and down are told apart."""
    assert {f"{CORE}.{room}" for room in [*ROOM_FLOORS, BESIDE]} <= known_names
    config, layer, data = (
        f"{CORE}.{name}" for name in ("utils.tensors", "transformer.mlp", "datasets.utils")
    )
    assert arrows_up({layer: {config}, data: {config}, "megatron.training.training": {layer, data}}) == []
    assert arrows_up({config: {layer}}) == [f"{config} imports {layer}"]
    assert arrows_up({layer: {data}}) == [f"{layer} imports {data}"]
    assert arrows_up({data: {layer}}) == [f"{data} imports {layer}"]
    assert floor_of(f"{CORE}.transformer.enums") < floor_of(f"{CORE}.transformer.mlp")
    with pytest.raises(KeyError, match="has no floor"):
        floor_of(f"{CORE}.imaginary")


@pytest.fixture(scope="module")
def known_names() -> set[str]:
    return set(modules())


def test_late_imports_are_counted() -> None:
    late: dict[str, Module] = modules()
    everywhere, on_import = (import_graph(late, everywhere=each) for each in (True, False))
    assert all(on_import[name] <= everywhere[name] for name in late)
    assert any(on_import[name] < everywhere[name] for name in late)
