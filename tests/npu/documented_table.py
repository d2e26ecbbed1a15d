"""The tables of ``docs/npu.md``, made from what the replacements declare.

``python -m tests.npu.documented_table`` writes them into the page.
"""

from megatron.core import overrides
from megatron_npu import activation
from megatron_npu.checking.cases import CASES
from megatron_npu.kept_defaults import KEPT_DEFAULTS
from megatron_npu.registry import Replacement, replacements
from tests.npu.ground import ROOT

PAGE = ROOT / "docs" / "npu.md"

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def replaced_lines() -> list[str]:
    """One line a replacement."""
    activation.declare_all()
    titles = ("point of `megatron.core`", "operator", "SoCs", "since", "largest rel. L2 error", "cases")
    head = [f"| {' | '.join(titles)} | default instead for |", "|---|---|---|---|---|---|---|"]
    return head + [_line(replacement) for replacement in replacements().values()]


def _line(replacement: Replacement) -> str:
    bounds = ", ".join(
        f"{SHORT[str(dtype).removeprefix('torch.')]} {replacement.bound[dtype]:g}"
        for dtype in replacement.dtypes
    )
    cases = sum(case.path == replacement.path for case in CASES)
    operators = ", ".join(f"`{name}`" for name in replacement.operators)
    cells = (
        f"`{replacement.path.removeprefix('megatron.core.')}`", operators, replacement.chips.label,
        replacement.since, bounds, str(cases), replacement.limits or "-",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def kept_lines() -> list[str]:
    """One line a point that keeps its default."""
    overrides.import_all_points()
    head = ["| point of `megatron.core` | why its default stays |", "|---|---|"]
    return head + [
        f"| `{path.removeprefix('megatron.core.')}` | {why} |" for path, why in KEPT_DEFAULTS.items()
    ]


def page() -> str:
    """The text of ``docs/npu.md`` with the tables as they should be."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for table in (replaced_lines(), kept_lines()):
        start = lines.index(table[0])
        end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
        lines[start:end] = table
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
