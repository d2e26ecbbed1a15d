"""TikTokenizer: special ids first, ranks after them."""

import json
from pathlib import Path

import pytest

from megatron.core.errors import ConfigError, DataError
from megatron.training.tokenizer.tokenizer import (
    PATTERN_TIKTOKEN,
    PATTERN_TIKTOKEN_V2,
    CustomTikTokenizer,
    reload_mergeable_ranks,
)

SPECIALS = ["<unk>", "<s>", "</s>", "<tool>"]


@pytest.fixture
def vocab_file(tmp_path, tik_entries) -> str:
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(tik_entries), encoding="utf-8")
    return str(path)


@pytest.fixture
def tokenizer(vocab_file) -> CustomTikTokenizer:
    return CustomTikTokenizer(vocab_file, PATTERN_TIKTOKEN_V2, 290, 10, SPECIALS)


def test_special_ids_come_before_ranks(tokenizer, vocab_file) -> None:
    assert tokenizer.vocab_size == 290 == len(tokenizer.inv_vocab)
    assert [tokenizer.inv_vocab[n] for n in range(10)] == [
        *SPECIALS,
        *(f"<SPECIAL_{n}>" for n in range(4, 10)),
    ]
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.eod) == (0, 1, 2, 2)
    # Rank 0 is the byte 0; 280 ranks fit, so the last is rank 279.
    assert tokenizer.inv_vocab[10 + ord("a")] == "a" and tokenizer.inv_vocab[289] == "z11"
    assert tokenizer.vocab["<tool>"] == 3 and tokenizer.vocab["hello"] == 10 + 259
    identifiers = dict(tokenizer.unique_identifiers)
    assert identifiers["class"] == "CustomTikTokenizer" and identifiers["tokenizer_path"] == [vocab_file]
    assert (identifiers["vocab_size"], identifiers["num_special_tokens"]) == ("290", "10")
    assert (identifiers["pattern"], identifiers["special_tokens"]) == (PATTERN_TIKTOKEN_V2, str(SPECIALS))


def test_ids_equal_hand_written_ones(tokenizer) -> None:
    # Ranks: 256 he, 257 ll, 258 hell, 259 hello, 260 " w", 261 or, 262 ld, 263 " wor", 264 " world".
    assert tokenizer.tokenize("hello world") == [269, 274]
    assert tokenizer.tokenize("hello", bos=True, eos=True) == [1, 269, 2]
    # A special token's text is text; digits come one by one.
    assert tokenizer.tokenize("<s>") == [10 + ord(c) for c in "<s>"]
    assert tokenizer.tokenize("12") == [10 + ord("1"), 10 + ord("2")]
    ids, lengths = tokenizer.tokenize_flat(["hello world", "", "12"])
    assert ids.tolist() == [269, 274, 59, 60] and lengths.tolist() == [2, 0, 2]


@pytest.mark.parametrize("text", ["", "hello world", "中文 été 😀\r\n", "a  b\n\n c...", "<s>x</s>"])
@pytest.mark.parametrize("pattern", [PATTERN_TIKTOKEN, PATTERN_TIKTOKEN_V2])
def test_round_trip_and_tiktoken(vocab_file, pattern, text) -> None:
    import tiktoken

    tokenizer = CustomTikTokenizer(vocab_file, pattern, 300, 10, SPECIALS)
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    ranks = {key: rank for key, rank in reload_mergeable_ranks(vocab_file).items() if rank < 290}
    oracle = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert ids == [10 + index for index in oracle.encode_ordinary(text)]
    raw = [index - 10 for index in ids]
    assert tokenizer.offsets(ids, text) == oracle.decode_with_offsets(raw)[1]


def test_special_ids_decode_to_their_names(tokenizer) -> None:
    ids = [1, *tokenizer.tokenize("hello"), 3, 2]
    assert tokenizer.detokenize(ids) == "<s>hello<tool></s>"
    assert tokenizer.offsets(ids, "<s>hello<tool></s>") == [0, 3, 8, 14]
    with pytest.raises(DataError, match="token id 290 is outside"):
        tokenizer.detokenize([290])
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.tokenize("\ud800")


def test_ranks_beyond_the_vocabulary_size_are_dropped(vocab_file, tik_entries) -> None:
    ranks = reload_mergeable_ranks(vocab_file, max_vocab=260)
    assert len(ranks) == 260 and ranks[b"hello"] == 259 and b" w" not in ranks
    assert len(reload_mergeable_ranks(vocab_file)) == len(tik_entries)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: "no list", "str instead of a list"),
        (lambda e: e[:100], "100 entries are fewer than the 256 single bytes"),
        (
            lambda e: [*e[:5], {"rank": 5}, *e[6:]],
            "entry 5 is not an object with rank, token_bytes and token_str",
        ),
        (lambda e: [*e[:7], *e[8:]], "entry 7 has rank 8"),
        (lambda e: [{**e[0], "token_bytes": "*"}, *e[1:]], "entry 0: token_bytes is not base64"),
        (lambda e: [{**e[0], "token_bytes": "QQ=="}, *e[1:]], "entry 0 must be the single byte 0x00"),
        (lambda e: [*e, {**e[256], "rank": 300}], "entries 256 and 300 are the same bytes"),
    ],
)
def test_malformed_vocabulary_is_named(vocab_file, tik_entries, damage, message) -> None:
    Path(vocab_file).write_text(json.dumps(damage(tik_entries)), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        reload_mergeable_ranks(vocab_file)


@pytest.mark.parametrize(
    ("size", "count", "specials", "error", "message"),
    [
        (290, 10, ["<s>", "</s>"], ConfigError, "lacks <unk>"),
        (290, 3, SPECIALS, ConfigError, "4 special tokens are named"),
        (290, 10, [*SPECIALS, "<s>"], ConfigError, "every name may be there once"),
        (200, 10, None, ConfigError, "too few for the 256 bytes"),
        (400, 10, None, DataError, "give --vocab-size 310"),
        (None, 10, None, DataError, "fewer than the vocabulary of 131072"),
    ],
)
def test_inconsistent_sizes_are_named(vocab_file, size, count, specials, error, message) -> None:
    with pytest.raises(error, match=message):
        CustomTikTokenizer(vocab_file, PATTERN_TIKTOKEN, size, count, specials)
