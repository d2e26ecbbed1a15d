"""The house rules that a machine can check: packages, globals, device names, sizes, paths."""

import ast
import re
from pathlib import Path

import pytest
from source_tree import ROOT, Module, cycles, modules, project_files

LONGEST_FILE_LINES = 600
LONGEST_FUNCTION_LINES = 100

# Who may not import whom, also not inside a function.
UPWARD = [
    (
        "megatron.core",
        ("megatron.cli", "megatron.training", "megatron.legacy", "megatron_npu", "tools", "tests"),
    ),
    ("megatron.training", ("megatron.cli", "megatron_npu", "tools", "tests")),
    ("megatron_npu", ("megatron.cli", "megatron.training", "megatron.legacy", "tools", "tests")),
]
# Process-wide state that the public interface demands; nothing else is declared ``global``.
MAY_HOLD_GLOBALS = {
    "megatron.core.parallel_state",
    "megatron.core.num_microbatches_calculator",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel.rng_tracker",
    "megatron.core.timers",
    "megatron.training.global_vars",
}
KNOWS_DEVICES = "megatron.core.accelerator"
DEVICE_NAMES = {"cuda", "npu", "xpu", "mps"}
# Directories of one machine or one person; where CANN and devices are is the same everywhere.
MACHINE_PATH = re.compile(r"""(?<![\w.}$/*-])/(home|root|Users|work|tmp|mnt|data\d)/\w""")


@pytest.fixture(scope="module")
def known() -> dict[str, Module]:
    return modules()


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def where(module: Module, node: ast.AST) -> str:
    return f"{module.path.relative_to(ROOT)}:{node.lineno}"


def test_imports_point_down(known: dict[str, Module]) -> None:
    arrows = [
        f"{name} imports {target}"
        for floor, above in UPWARD
        for name, module in known.items()
        if inside(name, floor)
        for target in sorted(module.imports(everywhere=True))
        if any(inside(target, package) for package in above)
    ]
    assert not arrows, "\n".join(arrows)


def test_globals_only_where_the_interface_demands_them(known: dict[str, Module]) -> None:
    found = [
        f"{where(module, node)}: global {', '.join(node.names)}"
        for name, module in known.items()
        if name not in MAY_HOLD_GLOBALS
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Global)
    ]
    assert not found, "\n".join(found)


def test_one_module_knows_the_device(known: dict[str, Module]) -> None:
    found = []
    for name, module in known.items():
        if name == KNOWS_DEVICES or inside(name, "megatron_npu"):
            continue
        for node in ast.walk(module.tree):
            literal = isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.npu")
            compared = isinstance(node, ast.Compare) and any(
                isinstance(word, ast.Constant) and word.value in DEVICE_NAMES for word in ast.walk(node)
            )
            if literal or compared:
                found.append(f"{where(module, node)}: {ast.unparse(node)}")
        if any(inside(target, "torch_npu") for target in module.imports(everywhere=True)):
            found.append(f"{name} imports torch_npu")
    assert not found, "\n".join(found)


def test_every_package_directory_is_a_package() -> None:
    """An installation that is not editable leaves out directories without ``__init__.py``."""
    directories = {path.parent for path in project_files(".py")}
    bare = [
        str(path.relative_to(ROOT))
        for path in directories
        if path.relative_to(ROOT).parts[:1] in (("megatron",), ("megatron_npu",))
        and not (path / "__init__.py").exists()
    ]
    assert not bare, bare


def test_no_path_of_one_machine() -> None:
    found = []
    for path in project_files(".py", ".sh", ".md", ".toml", ".txt", ".yaml", ".json"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def function_lengths(path: Path) -> list[tuple[int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.name}")
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def test_sizes(capsys: pytest.CaptureFixture) -> None:
    """Prints the ten longest files and functions; fails only when one is far out."""
    sources = project_files(".py")
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in sources}
    files = sorted(((count, str(path.relative_to(ROOT))) for path, count in lines.items()), reverse=True)
    functions = sorted((pair for path in sources for pair in function_lengths(path)), reverse=True)
    with capsys.disabled():
        print(f"\n{len(files)} Python files, {sum(count for count, _ in files)} lines")
        for title, rows in (("files", files), ("functions", functions)):
            print(f"longest {title}: " + ", ".join(f"{name} {count}" for count, name in rows[:10]))
    assert files[0][0] <= LONGEST_FILE_LINES, files[0]
    assert functions[0][0] <= LONGEST_FUNCTION_LINES, functions[0]


def test_files_of_tests_have_names_of_their_own() -> None:
    """Pytest imports them, and what lies beside them, by the last part of their path."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert {name for name in names if names.count(name) > 1} <= {"conftest.py", "__init__.py"}


def test_checks_find_violations_made_on_purpose(tmp_path: Path) -> None:
    """A cycle, an upward arrow, a lazy import and a machine path, made on purpose."""
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"]]
    source = "import x.y\nfrom . import near\nfrom ..up import name\ndef f():\n    import lazy\n"
    path = ROOT / "megatron" / "core" / "imaginary.py"
    module = Module(path)
    module.__dict__["tree"] = ast.parse(source)
    top = {"x.y", "megatron.core.near", "megatron.up.name"}
    assert module.imports(everywhere=False) == top
    assert module.imports(everywhere=True) == top | {"lazy"}
    assert MACHINE_PATH.search('open("/home' + '/someone/file")')
    assert not MACHINE_PATH.search("/usr/local/Ascend a/home/b ${X}/tmp/file")
