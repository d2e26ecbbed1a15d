"""``docs/flags.md`` is what the rows of the flags say."""

import re
from pathlib import Path

from megatron.training.arguments import reference
from megatron.training.arguments.flags import ALL_FLAGS, GROUPS

PAGE = Path(__file__).resolve().parents[4] / "docs" / "flags.md"


def test_the_page_is_what_the_rows_generate() -> None:
    again = "python -m megatron.training.arguments.reference > docs/flags.md"
    assert PAGE.read_text(encoding="utf-8") == reference.page(), f"write it anew: {again}"


def rows() -> dict[str, list[str]]:
    """The cells of every flag on the page, by its first spelling."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {line[0].split("`")[1]: line for line in cells}


def test_every_flag_has_a_row_of_four_cells() -> None:
    assert list(rows()) == [flag.name for flag in ALL_FLAGS]
    assert {len(cells) for cells in rows().values()} == {4}
    titles = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [title.lower() for title in titles] == [group.title.lower() for group in GROUPS]


def test_a_row_says_what_the_flag_takes_and_what_it_needs() -> None:
    cells = rows()
    assert cells["--save-interval"][0] == "`--save-interval` `--persistent-save-interval`"
    assert cells["--rotary-percent"][1:3] == ["X, above 0 and at most 1", "`1.0`"]
    assert cells["--sequence-parallel"][1:3] == ["switch", ""]
    assert "Has no effect without `--profile`." in cells["--profile-ranks"][3]
    assert "Needs `--bf16`." in cells["--reuse-fp32-param"][3]
    assert "Excludes `--bf16`." in cells["--fp16"][3]
    assert "Refused: vision models are not part of this project." in cells["--img-h"][3]
    assert "Not built yet, with torch_dist, zarr, torch_dcp: " in cells["--ckpt-format"][3]
    assert "Accepted without effect: there is no fp8 arithmetic" in cells["--fp8-format"][3]
    assert "An alias: taken as `--deterministic-mode`." in cells["--npu-deterministic"][3]
    assert "Read in every step." in cells["--manual-gc"][3]


def test_the_page_does_not_depend_on_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert PAGE.read_text(encoding="utf-8") == reference.page()
