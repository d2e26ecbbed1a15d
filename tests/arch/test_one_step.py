"""The page on one training step is what a traced step passes through; the figures are those of the files."""

import pytest
from house_figures import figures
from source_tree import ROOT
from step_trace import PAGE, SECTIONS, WRITE, StepTrace, Stop, page, trace


@pytest.fixture(scope="module")
def step() -> StepTrace:
    return trace(ROOT)


def test_every_path_begins_and_ends_where_the_page_says(step: StepTrace) -> None:
    ends = {name: (stops[0].function, stops[-1].function) for name, stops in step.paths.items()}
    assert ends.keys() == SECTIONS.keys()
    assert ends["loop"] == ("main", "train_step")
    assert ends["forward"] == ("train_step", "GPTModel.forward")
    assert ends["loss"] == ("train_step", "loss_func")
    assert ends["finalize"] == ("train_step", "DistributedDataParallel.finish_grad_sync")
    assert ends["update"][0] == "train_step" and step.paths["update"][-1].file.endswith("adamw.py")
    assert ends["log"] == ("train", "print_rank_last")
    assert step.files[0] == "megatron/training/training.py"


def test_the_page_on_one_step_is_what_a_step_does(step: StepTrace) -> None:
    written = (ROOT / PAGE).read_text(encoding="utf-8")
    assert written == page(step), f"{PAGE} tells of another step: {WRITE}"


def test_the_page_leaves_out_what_an_earlier_list_shows() -> None:
    first, second, third, other = (Stop(f"{name}.py", name, f"Does ``{name}``.") for name in "abcd")
    names = list(SECTIONS)
    text = page(StepTrace({names[0]: [first, second, third], names[1]: [first, second, other]}, []))
    lists = [line for line in text.splitlines() if line[:1].isdigit()]
    assert lists == [
        "1. [a.py](../a.py) `a`: Does `a`.",
        "2. [b.py](../b.py) `b`: Does `b`.",
        "3. [c.py](../c.py) `c`: Does `c`.",
        "2. [b.py](../b.py) `b`: Does `b`.",
        "3. [d.py](../d.py) `d`: Does `d`.",
    ]
    assert text.count("In all 3 functions in 3 files.") == 2


def test_figures_count_what_is_in_the_files(tmp_path, step: StepTrace) -> None:
    """A checkout of three small files, one circle through a late import."""
    package = tmp_path / "megatron"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("import megatron.two\n\n\ndef f():\n    return 1\n")
    (package / "two.py").write_text(
        "def g():\n    from megatron import one\n    return one\n" + "x = 1\n" * 40
    )
    found = figures(tmp_path, step)
    assert (found["lines"], found["files"]) == ("48", "3")
    assert (found["files of at most 35 lines"], found["of these, not __init__.py"]) == ("2", "1")
    assert found["functions per 1,000 lines"] == f"{1000 * 2 / 48:.1f}"
    assert found["lines of imports"] == f"{100 * 2 / 48:.1f} %"
    assert found["circles of imports"] == "none"
    assert found["with late and TYPE_CHECKING imports"] == "1, the largest of 2 files"
