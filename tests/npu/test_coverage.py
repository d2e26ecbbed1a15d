"""Nothing replaces a function of ``megatron.core`` without a proof on both levels; needs no torch_npu.

Both levels run every case of ``megatron_npu.checking.cases``, so a replacement is proven if it has cases.
"""

import ast
import re

import pytest
import torch

from megatron.core import overrides
from megatron_npu import activation
from megatron_npu.checking import compare
from megatron_npu.checking.case import Call, Case, Draw
from megatron_npu.checking.cases import CASES
from megatron_npu.kept_defaults import KEPT_DEFAULTS
from megatron_npu.registry import Replacement, replacements
from tests.npu import documented_table
from tests.npu.ground import INNER, ROOT

activation.declare_all()
overrides.import_all_points()
DIFFERENTIABLE = "a result that autograd goes through"


def test_every_replacement_has_cases_in_every_type() -> None:
    for path, replacement in replacements().items():
        cases = [case for case in CASES if case.path == path]
        assert cases, f"{path}: add a case to megatron_npu.checking"
        for dtype in replacement.dtypes:
            assert dtype in replacement.bound, (path, dtype)
            assert any(dtype in (case.dtypes or replacement.dtypes) for case in cases), (path, dtype)


def test_every_case_is_of_a_replacement() -> None:
    assert {case.path for case in CASES} == set(replacements())


def test_both_levels_run_every_case() -> None:
    for file in ("shapes_of_replacements.py", "numbers_of_replacements.py"):
        text = (INNER / file).read_text(encoding="utf-8")
        assert re.search(r"^TRIED = \[\(case, dtype\) for case in CASES for dtype in", text, re.MULTILINE), (
            file
        )
        assert "parametrize" in text and "TRIED" in text


def test_every_point_is_replaced_or_kept_for_a_reason() -> None:
    points = {status.path for status in overrides.table() if status.path.startswith("megatron.core.")}
    replaced, kept = set(replacements()), set(KEPT_DEFAULTS)
    assert not replaced & kept
    assert points == replaced | kept, points ^ (replaced | kept)


def test_gradients_are_compared_where_autograd_goes_through() -> None:
    """In place, or inside an autograd function of the caller: these have none. All others must."""
    without = {
        "adamw_step", "unscale_and_check", "watch_overflow",
        "block_attention", "block_attention_backward", "merge_attention",
        "all_gather_matmul", "matmul_reduce_scatter",
        "grouped_mm", "grouped_weight_gradient", "accumulate_grouped_weight_gradient",
    }  # fmt: skip
    for case in CASES:
        wanted = bool(case.make(Draw()).wanted)
        assert wanted == (case.path.rpartition(".")[2] not in without), case


def test_a_replacement_lives_where_its_default_does() -> None:
    for path, replacement in replacements().items():
        module = path.rpartition(".")[0].removeprefix("megatron.")
        assert replacement.function.__module__ == f"megatron_npu.{module}"


def judged(function, bound: float = 1e-5) -> compare.Finding:
    """The comparison of a made-up replacement of RMSNorm."""
    path = "megatron.core.fusions.fused_layer_norm.rms_norm"
    made_up = Replacement(path, function, (), "", bound={torch.float32: bound})
    case = next(case for case in CASES if case.path == path)
    return compare.judge(made_up, case, torch.float32, torch.device("cpu"))


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def test_the_comparison_sees_errors() -> None:
    assert judged(rms).good
    assert not judged(lambda x, w, eps: rms(x, w, eps) * 1.001).good
    forward_only = judged(lambda x, w, eps: rms(x, w, eps).detach() + 1.01 * (x - x.detach()) + 0 * w.sum())
    assert forward_only.forward.relative < 1e-5 and not forward_only.good
    assert not judged(lambda x, w, eps: rms(x, w, eps) * torch.nan).good
    assert not judged(lambda x, w, eps: rms(x, w, eps)[:-1]).good
    broken = judged(lambda x, w, eps: 1 / 0)
    assert not broken.good and broken.failure.startswith("ZeroDivisionError")


def test_the_reference_gets_the_rounded_operands() -> None:
    case = Case("", "", lambda draw: Call((draw.normal(5), draw.positive(1).float(), draw.ids(3, below=9))))
    call, reference = case.call(torch.bfloat16, "cpu"), case.reference_call(torch.bfloat16)
    assert [t.dtype for t in call.args] == [torch.bfloat16, torch.float32, torch.int64]
    assert [t.dtype for t in reference.args] == [torch.float64, torch.float64, torch.int64]
    for some, other in zip(call.args, reference.args, strict=True):
        assert torch.equal(some.double(), other.double())


# --- who may name the device ------------------------------------------------------------------------------

NAMES = re.compile(r"(?<![\w-])(torch_npu|npu|NPU|Ascend|hccl|HCCL|CANN|910[AB]\w*)(?![\w-])")
# The project's own description, and the module that knows devices.
MAY_NAME_IT = {"megatron/core/accelerator.py", "megatron/core/package_info.py"}


def test_nothing_else_names_the_device() -> None:
    """Flags that carry the name (``--use-ascend-mc2``), their values (HCCL where NCCL may stand) and the
    project's own name are not meant.
    """
    found = []
    for path in sorted([*ROOT.glob("megatron/**/*.py"), *ROOT.glob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if name in MAY_NAME_IT or name == "setup.py":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            text = re.sub(r"(?i)megatron[-_ ]npu|--[\w-]+", "", line)
            if "nccl" in text.lower():
                text = re.sub("(?i)hccl", "", text)
            found += [f"{name}:{number}: {line.strip()}" for _ in NAMES.findall(text)[:1]]
    assert not found, "\n".join(found)


def test_the_pattern_sees_names() -> None:
    seen = [
        "import torch_npu",
        'device == "npu"',
        "on an Ascend NPU",
        'backend="hccl"',
        "CANN is missing",
        "a 910B2",
    ]
    assert all(NAMES.search(line) for line in seen)
    assert not any(NAMES.search(line) for line in ("input_num", "ascending order", "cannot", "scan", "1910"))


def test_replacements_never_import_the_library_on_import() -> None:
    """``torch.ops.npu`` is enough: the table and the tests work where torch_npu is not installed."""
    for path in ROOT.glob("megatron_npu/**/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("torch_npu" in ast.unparse(node) for node in top), path


@pytest.mark.parametrize("path", sorted(KEPT_DEFAULTS))
def test_a_kept_default_says_why(path: str) -> None:
    assert len(KEPT_DEFAULTS[path]) > 20


def test_the_document_says_what_the_code_does() -> None:
    text = documented_table.PAGE.read_text(encoding="utf-8")
    missing = set(documented_table.page().splitlines()) - set(text.splitlines())
    assert not missing, "write the tables anew: python -m tests.npu.documented_table"
    assert text == documented_table.page()
    for name in re.findall(r"`((?:tests|megatron_npu|tools|tests_gpt)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
