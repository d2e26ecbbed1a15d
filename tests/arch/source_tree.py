"""What the architecture tests look at: the project's files, and who imports whom."""

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron", "megatron_npu", "mindspeed")
NOT_OURS = {".git", ".venv", "build", "dist", "checkpoints", "logs", "runs", "golden", "__pycache__"}


def project_files(*suffixes: str, root: Path = ROOT) -> list[Path]:
    """Files with one of the suffixes, without caches, environments, outputs and golden data."""
    files = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        ours = not any(part in NOT_OURS or part.endswith((".egg-info", "_cache")) for part in parts)
        if ours and path.suffix in suffixes and path.is_file():
            files.append(path)
    return files


@dataclass(frozen=True)
class Module:
    """One Python file of the packages in the checkout at ``root``."""

    path: Path
    root: Path = ROOT

    @property
    def name(self) -> str:
        """Dotted name: ``megatron/core/__init__.py`` is ``megatron.core``."""
        parts = self.path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))

    def imports(self, *, everywhere: bool) -> set[str]:
        """Dotted names this module imports, ``from a import b`` as ``a.b``.

        Args:
            everywhere: also inside functions and ``if TYPE_CHECKING``; else only what runs on import.
        """
        nodes = ast.walk(self.tree) if everywhere else _run_on_import(self.tree)
        names = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                names |= {f"{base}.{alias.name}" for alias in node.names}
        return names

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module
        parts = self.package.split(".")
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])


def _run_on_import(tree: ast.AST):
    """Nodes outside functions and outside ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _run_on_import(child)


def modules(root: Path = ROOT) -> dict[str, Module]:
    """Every module of the packages by its dotted name."""
    paths = [path for package in PACKAGES for path in project_files(".py", root=root / package)]
    found = [Module(path, root) for path in paths]
    return {module.name: module for module in found}


def import_graph(known: dict[str, Module], *, everywhere: bool = False) -> dict[str, set[str]]:
    """Imports between modules of the project: those that run on import, or all that are written anywhere.

    ``from package import name`` is an edge to the submodule ``package.name`` if there is one, else to
    the package itself.
    """
    return {
        name: {
            target for wanted in module.imports(everywhere=everywhere) if (target := _resolve(wanted, known))
        }
        - {name}
        for name, module in known.items()
    }


def _resolve(wanted: str, known: dict[str, Module]) -> str | None:
    while wanted:
        if wanted in known:
            return wanted
        wanted = wanted.rpartition(".")[0]
    return None


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules that import each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            cut = stack.index(node)
            group = stack[cut:]
            del stack[cut:]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return groups
