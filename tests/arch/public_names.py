"""Which of Megatron-LM's public names this project runs itself, and which it keeps for the scripts of others.

    python tests/arch/public_names.py --write           write docs/public_names.md of this checkout

A function or class counts as used when its name occurs in code that is used itself: at the top level of a
module, in a program's ``main``, or in a function that is used in turn. Names are not resolved: one
that another object shares counts as used.
"""

import argparse
import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from source_tree import ROOT, Module, modules

PAGE = "docs/public_names.md"
TABLE = ROOT / "tests" / "golden" / "api" / "public_names.tsv"
WRITE = f"python tests/arch/public_names.py --write writes {PAGE} anew"
# Below this line a module holds what only scripts of others call.
HEADING = "# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----"
# Programs that use the packages without being part of one.
PROGRAMS = ("tools", "benchmarks")
ROOT_NAMES = {"main", "run"}
# Methods that torch calls on any class that has them.
CALLED_BY_TORCH = {"forward", "backward", "step"}
INTRODUCTION = """\
# Public names

Functions and classes of Megatron-LM core_r0.12.1 that can be imported here under their own paths. Some run
in training or in a program of this project. The others are kept for scripts that call them; they stand at the
end of their module, below a heading that says so, or in a module `compat.py`. Of methods, only those are
listed that are kept although their class runs. `tests/golden/api/public_names.tsv` has the signatures, and
`megatron/unbuilt/table.py` the names of parts that are not built yet.

This page is generated: `python tests/arch/public_names.py --write`."""
KINDS = {"function", "class", "autograd", "enum", "method", "static", "classmethod", "property"}


@dataclass(frozen=True, eq=False)
class Definition:
    """A function or class at the top level of a module, or a method of such a class."""

    file: Path
    owner: str
    """Class of a method; empty for the top level."""
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    mentions: frozenset[str]
    """Names that its own code says; of a class without its methods."""

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def qualified_name(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name


def mentioned(*nodes: ast.AST) -> set[str]:
    """Names, attributes, and last parts of dotted names in strings."""
    found = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.replace(":", ".").split(".")
            if all(part.isidentifier() for part in parts):
                found.add(parts[-1])
    return found


@dataclass(frozen=True)
class Code:
    """Definitions of the product, and the names that run when its modules are imported."""

    definitions: list[Definition]
    on_import: set[str]

    def read(self, path: Path, body: list[ast.stmt]) -> None:
        """Add the statements of a module."""
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                own = mentioned(node) - {node.name}
                self.definitions.append(Definition(path, "", node, frozenset(own)))
                self.on_import.update(mentioned(*node.decorator_list))
                if any("override" in mentioned(each) for each in node.decorator_list):
                    self.on_import.add(node.name)
            elif isinstance(node, ast.ClassDef):
                self._read_class(path, node)
            elif isinstance(node, (ast.If, ast.Try)):
                self.on_import.update(mentioned(node.test) if isinstance(node, ast.If) else ())
                self.read(path, [*node.body, *node.orelse, *getattr(node, "finalbody", ())])
            elif not isinstance(node, (ast.Import, ast.ImportFrom)) and not _lists_exports(node):
                self.on_import.update(mentioned(node))

    def _read_class(self, path: Path, node: ast.ClassDef) -> None:
        methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
        rest = [each for each in node.body if each not in methods]
        own = mentioned(*node.decorator_list, *node.bases, *node.keywords, *rest) - {node.name}
        self.definitions.append(Definition(path, "", node, frozenset(own)))
        for method in methods:
            own = mentioned(method) - {method.name}
            self.definitions.append(Definition(path, node.name, method, frozenset(own)))

    def unused(self) -> list[Definition]:
        """Definitions that no running code names."""
        names, left = self.on_import | ROOT_NAMES, list(self.definitions)
        while True:
            used = [each for each in left if _is_named(each, names)]
            if not used:
                return left
            left = [each for each in left if not _is_named(each, names)]
            names = names.union(*(each.mentions for each in used))


def _lists_exports(node: ast.stmt) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def _is_named(definition: Definition, names: set[str]) -> bool:
    if definition.owner and definition.owner not in names:
        return False
    name = definition.name
    is_implicit = name in CALLED_BY_TORCH or (name.startswith("__") and name.endswith("__"))
    return name in names or bool(definition.owner and is_implicit)


@functools.cache
def code(root: Path = ROOT) -> Code:
    """The product's code, with the programs beside it."""
    found = Code([], set())
    files = [module.path for module in modules(root).values()]
    for path in [*files, *(each for program in PROGRAMS for each in sorted((root / program).rglob("*.py")))]:
        found.read(path, Module(path, root).tree.body)
    return found


def public_rows() -> Iterator[tuple[str, str, str]]:
    """(module, kind, name) of everything that scripts import or call."""
    for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]:
        module, kind, name, _ = line.split("\t")
        yield module, kind, name


def misplaced() -> list[str]:
    """Public functions and classes without a caller that stand among what runs."""
    public = {name for _, kind, name in public_rows() if kind in KINDS}
    found = []
    for each in code().unused():
        text = each.file.read_text(encoding="utf-8").splitlines()
        first = min([each.node.lineno, *(decorator.lineno for decorator in each.node.decorator_list)])
        stands_apart = each.file.name == "compat.py" or HEADING in text[:first]
        is_ours = each.file.is_relative_to(ROOT / "megatron")
        if is_ours and not each.owner and each.name in public and not stands_apart:
            found.append(f"{each.file.relative_to(ROOT)}: {each.name}")
    return found


def _place(value: Any) -> tuple[str, str]:
    """File and qualified name of a function, class, method or property."""
    value = inspect.unwrap(value.fget if isinstance(value, property) else value)
    try:
        return str(Path(inspect.getsourcefile(value)).resolve()), value.__qualname__
    except (TypeError, AttributeError):
        return "", ""


def _comes_from_a_library(owner: Any, name: str) -> bool:
    """True for a method that a base class of torch or Python has: the base calls it."""
    bases = owner.__mro__ if inspect.isclass(owner) else ()
    return any(name in vars(base) for base in bases if not base.__module__.startswith("megatron"))


def table() -> dict[str, tuple[list[str], list[str]]]:
    """Public module -> (names that run here, names kept for scripts); methods only of classes that run."""
    from megatron import unbuilt

    unused = {(str(each.file), each.qualified_name) for each in code().unused()}
    found: dict[str, tuple[list[str], list[str]]] = {}
    for module, kind, name in public_rows():
        first, _, rest = name.partition(".")
        if kind not in KINDS or first in unbuilt.rows().get(module, {}):
            continue
        owner = getattr(importlib.import_module(module), first, None)
        value = inspect.getattr_static(owner, rest, None) if rest else owner
        file, qualified = _place(getattr(value, "__func__", value))
        if not file.startswith(str(ROOT)):
            continue
        if not rest:
            found.setdefault(module, ([], []))[(file, qualified) in unused].append(name)
        elif (file, qualified) in unused and not (
            _place(owner) in unused or _comes_from_a_library(owner, rest)
        ):
            found.setdefault(module, ([], []))[1].append(name)
    return found


def page() -> str:
    """The page, from the code of this checkout."""
    lines = [INTRODUCTION]
    for module, (run, kept) in table().items():
        rows = [f"| {_words(run)} | {_words(kept)} |"]
        lines += ["", f"## {module}", "", "| runs here | kept for scripts |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _words(names: list[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    if parser.parse_args().write:
        (ROOT / PAGE).write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
