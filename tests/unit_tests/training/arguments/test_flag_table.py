"""The flags are those of the interface: spelling, attribute, type, default, choices, arity, action, tier."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest

from megatron.training.arguments.flag import Flag
from megatron.training.arguments.flags import ALL_FLAGS
from megatron.training.arguments.parsing import build_parser

TABLE = Path(__file__).resolve().parents[3] / "golden" / "cli" / "cli_flags.tsv"
OTHER_PROGRAMS = ("preprocess_data only", "tasks/main.py only")
# Where the table leaves room, or names several defaults of several dialects.
OWN_DEFAULTS = {
    "--pre-tockens": None,
    "--next-tockens": None,
    "--context-parallel-algo": None,
    "--local-rank": 0,
    "--local_rank": 0,
}
OWN_CHOICES = {"--shape-order": ["SBH", "BSH", "BSND", "BNSD"]}
OWN_SPELLINGS = {"--moe-intermediate-size"}
ADDED_CHOICES = {
    "--tokenizer-type": ["PretrainedFromHF"],
    "--moe-router-load-balancing-type": [
        "softmax_topk",
        "pai_megatron_aux_loss",
        "group_limited_greedy",
        "sparsemixer_topk",
    ],
}
# One flag with two spellings, or one that must not be ignored and therefore stops the run.
OWN_TIERS = {
    "--noop-layers": "core",
    # Also without effect in MindSpeed-LLM 2.2.0, which the flag is from.
    "--input-jitter": "accept",
    # Accepted at least, says the table; here they work.
    "--log-straggler": "core",
    "--moe-use-legacy-grouped-gemm": "core",
    "--disable-straggler-on-startup": "core",
    "--straggler-ctrlr-port": "core",
    "--straggler-minmax-count": "core",
}


def rows() -> list[dict[str, str]]:
    with open(TABLE, encoding="utf-8") as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row for row in table if row["group"] not in OTHER_PROGRAMS]


def first_name(row: dict[str, str]) -> str:
    return row["flags"].split(",")[0]


@cache
def flags() -> dict[str, tuple[str, Flag]]:
    """(tier, flag) by spelling."""
    return {name: (tier_of(flag), flag) for flag in ALL_FLAGS for name in flag.names}


def tier_of(flag: Flag) -> str:
    if flag.is_plain:
        return "core"
    return "reject" if flag.refusal else "accept"


@cache
def actions() -> dict:
    return build_parser()._option_string_actions


def expected_default(row: dict[str, str]) -> object:
    name, text = first_name(row), row["default"]
    if name in OWN_DEFAULTS:
        return OWN_DEFAULTS[name]
    if text.startswith("auto "):
        return "auto"
    if text.startswith("(empty"):
        return ""
    literal = {"None": None, "True": True, "False": False, "[]": [], "[0]": [0], "['p2p']": ["p2p"]}
    if text in literal:
        return literal[text]
    number = {"int": int, "float": float, "moe_freq_type": int}.get(row["type"])
    return number(text) if number else text


@pytest.mark.parametrize("row", rows(), ids=first_name)
def test_flag(row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    name = first_name(row)
    tier, flag = flags()[name]
    action = actions()[name]
    assert tier == OWN_TIERS.get(name, row["tier"])
    for spelling in row["flags"].split(", "):
        assert actions()[spelling].dest == row["dest"] == flag.dest
    assert action.default == flag.default == expected_default(row)
    kind = {"_StoreTrueAction": "store_true", "_StoreFalseAction": "store_false", "_StoreAction": "store"}
    assert kind[type(action).__name__] == row["action"]
    if row["action"] != "store":
        return
    assert (action.nargs or "") == row["nargs"]
    type_name = {"AttnBackend member name": "attention_backend", "": "str"}.get(row["type"], row["type"])
    assert getattr(action.type or str, "__name__", None) == type_name
    choices = [None if word == "None" else word for word in row["choices"].split(", ") if word]
    choices = OWN_CHOICES.get(name, choices) + ADDED_CHOICES.get(name, [])
    if name != "--attention-backend":
        assert [str(c) if isinstance(c, int) else c for c in action.choices or []] == choices


def test_attention_backend_words() -> None:
    convert = actions()["--attention-backend"].type
    words = ("flash", "fused", "unfused", "local", "auto")
    assert [convert(word).value for word in words] == [1, 2, 3, 4, 5]


def test_flags_beyond_the_table_are_marked_as_added() -> None:
    names = {name for row in rows() for name in row["flags"].split(", ")}
    added = {flag.name for flag in ALL_FLAGS if names.isdisjoint(flag.names)}
    assert added == {flag.name for flag in ALL_FLAGS if flag.added}
    spellings = {name for flag in ALL_FLAGS if not flag.added for name in flag.names}
    assert spellings - names == OWN_SPELLINGS
    assert {"-h", "--help"} == set(actions()) - set(flags())


def test_every_flag_has_one_row() -> None:
    names = [name for flag in ALL_FLAGS for name in flag.names]
    assert len(names) == len(set(names))
    assert [tier for tier, _ in flags().values()].count("accept") >= 90


def test_a_row_has_one_status_for_a_value() -> None:
    for flag in ALL_FLAGS:
        assert bool(flag.notice) + bool(flag.refusal) + bool(flag.not_built) <= 1, flag.name
        for status in flag.status:
            values = getattr(status, "values", ())
            assert not any(flag.asks_for_missing(value) for value in values), flag.name
            assert set(values) <= set(flag.options.get("choices", ())), flag.name


def test_a_default_lies_in_the_range_of_its_row() -> None:
    for flag in ALL_FLAGS:
        if flag.bounds and flag.default is not None and flag.name != "--loss-scale":
            assert flag.bounds.holds(flag.default) and flag.default <= flag.most, flag.name
            assert flag.bounds.holds(flag.bounds.example()), flag.name


def test_texts_of_rows_name_flags_that_exist() -> None:
    """Also the opponents, whose names are looked up, and what a condition is made from."""
    for flag in ALL_FLAGS:
        texts = [opponent.name for opponent in flag.opponents]
        texts += [text for entry in flag.needs for text in (entry.words, entry.remedy)]
        texts += [entry.reason for entry in flag.no_effect]
        texts += [str(vars(status)) for status in flag.status]
        for name in re.findall(r"(?<![\w-])--[\w-]+", " ".join(texts)):
            assert name in flags(), f"{flag.name} speaks of {name}"


def test_conditions_of_rows_can_be_asked(check) -> None:
    args = check()
    for flag in ALL_FLAGS:
        for entry in flag.needs:
            entry.met(args)
        for entry in flag.no_effect:
            entry.acts(args)
