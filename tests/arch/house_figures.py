"""Prints how finely the packages are cut and how far a reader has to walk, one column per checkout.

    python tests/arch/house_figures.py [CHECKOUT ...]

No figure is a limit: they tell where to look, and a reader is the judge. Type errors are counted where
pyright is installed.
"""

import argparse
import ast
import json
import shutil
import subprocess
from pathlib import Path

from source_tree import PACKAGES, ROOT, Module, cycles, import_graph, modules
from step_trace import StepTrace, Stop, trace

SMALL_FILE_LINES = 35
# The same of others' code, as measured with other tools: read as "about".
ANCHORS = (
    "functions per 1,000 lines: 28 to 43 in torchtitan, nanotron, litgpt, picotron and Megatron core; lines "
    "of imports: 3.1 to 4.6 %;\n"
    "torchtitan takes 4 functions in 2 files to model.forward, 3 in 2 to the Adam kernel"
)


def figures(root: Path, step: StepTrace) -> dict[str, str]:
    """Name of a figure -> its value for a checkout whose step is traced, as text."""
    known = modules(root)
    lines = {module.path: module.path.read_text(encoding="utf-8").count("\n") for module in known.values()}
    total = sum(lines.values())
    functions = sum(_num_functions(module) for module in known.values())
    imports = sum(_num_import_lines(module) for module in known.values())
    return {
        "lines": f"{total:,}",
        "files": f"{len(lines)}",
        f"files of at most {SMALL_FILE_LINES} lines": str(sum(n <= SMALL_FILE_LINES for n in lines.values())),
        "of these, not __init__.py": str(
            sum(n <= SMALL_FILE_LINES and path.name != "__init__.py" for path, n in lines.items())
        ),
        "functions per 1,000 lines": f"{1000 * functions / total:.1f}",
        "lines of imports": f"{100 * imports / total:.1f} %",
        "train_step to model.forward": _length(step.paths["forward"]),
        "train_step to the Adam kernel": _length(step.paths["update"]),
        "train_step to backward": _length(step.paths["backward"]),
        "train to the log line": _length(step.paths["log"]),
        "files in one step": str(len(step.files)),
        "circles of imports": _circles(import_graph(known)),
        "with late and TYPE_CHECKING imports": _circles(import_graph(known, everywhere=True)),
        "pyright errors": _pyright_errors(root),
    }


def _num_functions(module: Module) -> int:
    return sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(module.tree))


def _num_import_lines(module: Module) -> int:
    return sum(
        node.end_lineno - node.lineno + 1
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )


def _length(stops: list[Stop]) -> str:
    return f"{len(stops)} functions in {len({stop.file for stop in stops})} files"


def _circles(graph: dict[str, set[str]]) -> str:
    found = cycles(graph)
    return f"{len(found)}, the largest of {max(map(len, found))} files" if found else "none"


def _pyright_errors(root: Path) -> str:
    """Errors in the packages, by the configuration of the checkout."""
    program = shutil.which("pyright")
    if program is None:
        return "pyright is not installed"
    done = subprocess.run(
        [program, "--outputjson", *(package for package in PACKAGES if (root / package).exists())],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return str(json.loads(done.stdout)["summary"]["errorCount"])


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT], metavar="CHECKOUT")
    roots = [path.resolve() for path in parser.parse_args().checkouts]
    columns = [figures(root, trace(root)) for root in roots]
    print("| | " + " | ".join(root.name for root in roots) + " |")
    print("|---|" + "---|" * len(roots))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")
    print(f"\n{ANCHORS}")


if __name__ == "__main__":
    main()
