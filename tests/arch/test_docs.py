"""The pages hold together: a test for every command, a target for every link, a place in the navigation."""

import ast
import re
from pathlib import PurePosixPath

import pytest

from megatron.training.arguments.parsing import build_parser
from tests.docs.commands import RUN_ELSEWHERE, TYPED_IN_ORDER, Row
from tests.docs.pages import ROOT, START, TYPED, Page, all_pages, navigation

README = Page("README.md")
PAGES = [README, *all_pages()]
NAMES = [page.name for page in PAGES]
# Flags on the pages that pretrain_gpt.py does not have: those of the tools, the launch scripts and torchrun.
OF_OTHER_PROGRAMS = {
    "--help",
    "--shape_order",
    "--nproc-per-node",
    "--input",
    "--output-prefix",
    "--append-eod",
}
OF_OTHER_PROGRAMS |= {"--workers", "--prompt", "--max-new-tokens", "--bound", "--output", "--schedule"}


def rows_for(page: str, command: str) -> list[Row]:
    return [row for row in RUN_ELSEWHERE if row.fits(page, command)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_is_run_by_a_test(page: Page) -> None:
    if page.name not in TYPED_IN_ORDER:
        missing = [command for command in page.commands if not rows_for(page.name, command)]
        assert not missing, f"give each a test, and a row in tests/docs/commands.py: {missing}"


@pytest.mark.parametrize("row", RUN_ELSEWHERE, ids=lambda row: f"{row.page}: {row.command}"[:60])
def test_every_row_names_a_command_and_a_test_that_exist(row: Row) -> None:
    commands = [command for command in Page(row.page).commands if row.fits(row.page, command)]
    assert commands, "no such command on the page"
    file, _, function = row.test.partition("::")
    assert (ROOT / file).is_file()
    if file == README.name:
        assert set(commands) <= set(README.commands), "README.md shows another command"
    elif function:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_pages_that_are_typed_in_order_exist() -> None:
    assert set(TYPED_IN_ORDER) <= set(NAMES)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_say_whether_they_are_typed(page: Page) -> None:
    known = {*TYPED, "text", "", "{toctree}", "{include}"}
    assert {block.language for block in page.blocks} <= known


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Page) -> None:
    for target in page.links:
        path, _, heading = target.partition("#")
        file = (ROOT / page.name).parent / path if path else ROOT / page.name
        assert file.exists(), f"{target}: no such file"
        if heading and file.suffix == ".md":
            assert heading in Page(str(file.resolve().relative_to(ROOT))).anchors, (
                f"{target}: no such heading"
            )


def test_every_page_is_in_the_navigation() -> None:
    pages = {page.name for page in all_pages()}
    assert navigation() == pages, f"list each page in a toctree of {START}, and no other"


def test_both_start_pages_show_the_same_commands() -> None:
    english, chinese = Page(START), Page("docs/index_zh.md")
    assert english.commands == chinese.commands
    links = [
        {PurePosixPath(target).name.replace("_zh", "") for target in page.links}
        for page in (english, chinese)
    ]
    assert links[0] - {"index.md"} <= links[1] | {"decisions.md"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name in TYPED_IN_ORDER], ids=lambda page: page.name
)
def test_flags_that_a_page_names_exist(page: Page) -> None:
    known = {spelling for action in build_parser()._actions for spelling in action.option_strings}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]*[a-z0-9])(?![\w*-])", page.text))
    assert not named - known - OF_OTHER_PROGRAMS
