"""``-h``, ``--help`` and ``--help WORD``."""

import sys

import pytest

from megatron.training.arguments import parse_args
from megatron.training.arguments.flags import ALL_FLAGS
from megatron.training.arguments.help import COMMON


@pytest.fixture
def shown(monkeypatch, capsys):
    """Function from the words of a command line to the help that they print."""

    def run(*words: str, extra_args_provider=None) -> str:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
        with pytest.raises(SystemExit) as stop:
            parse_args(extra_args_provider)
        assert stop.value.code == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def named(text: str) -> set[str]:
    """The flags that a help text is about: those that begin a line or stand in a list of names."""
    words = text.replace(",", " ").split()
    return {word for word in words if word.startswith("--")}


def test_long_form_names_every_flag_in_a_section(shown) -> None:
    text = shown("--help")
    assert {flag.name for flag in ALL_FLAGS} <= named(text)
    titles = [line[:-1] for line in text.splitlines() if line[:1].strip() and line.endswith(":")]
    assert {"network size", "checkpointing", "accepted without effect", "refused"} <= set(titles)
    assert len(titles) >= 20


def test_short_form_fits_on_two_screens_and_names_the_common_flags(shown) -> None:
    text = shown("-h")
    assert {f"--{name}" for names in COMMON.values() for name in names.split()} <= named(text)
    assert len(text.splitlines()) <= 90
    assert f"{len(ALL_FLAGS) + 1} flags" in text and "--help lists all" in text


def test_unbuilt_flags_and_values_are_marked(shown) -> None:
    text = " ".join(shown("--help").split())
    assert "[not built yet]" in text.split("--noop-layers", 1)[1].split("--", 1)[0]
    assert "[not built yet: torch_dist, zarr, torch_dcp]" in text
    assert "[not built yet]" not in text.split("--hidden-size", 1)[1].split("--", 1)[0]


def test_a_word_finds_flags_by_name_meaning_and_reason(shown) -> None:
    found = named(shown("--help", "dropout"))
    assert {"--attention-dropout", "--hidden-dropout"} <= found and "--num-layers" not in found
    refused = shown("--help", "vision")
    assert "--img-h" in refused and "not part of this project" in refused
    assert "zzzz" in shown("--help", "zzzz")


def test_flags_of_a_users_script_are_listed(shown) -> None:
    def add(parser):
        parser.add_argument("--my-own-flag", type=int, help="100% mine")
        return parser

    assert "--my-own-flag N" in shown("--help", extra_args_provider=add)
    assert "100% mine" in shown("--help", "my-own", extra_args_provider=add)
    assert "--my-own-flag" not in shown("-h", extra_args_provider=add)
