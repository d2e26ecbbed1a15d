"""The README cannot rot: it opens with two commands, both languages say the same, the rest runs."""

import importlib.util
import re

import pytest
from source_tree import ROOT

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README_zh.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def readme_commands():
    """The module that continuous integration reads the README with; its directory is no package."""
    spec = importlib.util.spec_from_file_location("readme_commands", ROOT / ".ci" / "readme_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_opens_with_two_commands() -> None:
    train, test = readme_commands().opening_commands(ENGLISH.read_text(encoding="utf-8"))
    assert train.endswith("&& bash tests_gpt/pretrain_gpt_distributed_fp16.sh --shape_order=SBH")
    assert test.endswith("&& bash tests/test.sh")


def test_both_languages_give_the_same_commands_and_sections() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in (ENGLISH, CHINESE))
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    for mark in ("\n## ", "\n| "):
        assert english.count(mark) == chinese.count(mark)


def test_every_path_it_names_exists() -> None:
    named = re.findall(r"`([\w./]+(?:/|\.(?:py|sh|md)))`", ENGLISH.read_text(encoding="utf-8"))
    missing = {name for name in named if not name.startswith("...") and not (ROOT / name).exists()}
    assert missing <= {"checkpoints/", "set_env.sh"}, missing  # made by training; part of CANN


@pytest.mark.parametrize(
    "text",
    [
        "# T\n```sh\na\n```\n",
        "# T\n```sh\na\n```\n```sh\nb\n```\n```sh\nc\n```\n",
        "# T\n```sh\na\nb\n```\n```sh\nc\n```\n",
        "# T\n```sh\na\n```\n## S\n```sh\nb\n```\n",
    ],
)
def test_readme_without_two_commands_first_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="two sh blocks"):
        readme_commands().opening_commands(text)
