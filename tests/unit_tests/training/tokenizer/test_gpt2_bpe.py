"""GPT-2 BPE: ids against transformers and tiktoken, and the helpers scripts import."""

import json
from pathlib import Path

import numpy as np
import pytest
from texts_to_tokenize import HARD_TEXTS, TEXTS

from megatron.core.errors import DataError
from megatron.training.tokenizer.gpt2_tokenization import GPT2Tokenizer, bytes_to_unicode, get_pairs
from megatron.training.tokenizer.tokenizer import _GPT2BPETokenizer

ALL_TEXTS = TEXTS + HARD_TEXTS


@pytest.fixture(scope="module")
def tokenizer(byte_level_files) -> _GPT2BPETokenizer:
    return _GPT2BPETokenizer(*byte_level_files)


@pytest.fixture(scope="module")
def tiktoken_ids(byte_level_ranks):
    """The oracle that knows no special tokens: GPT-2's split expression over the ranks."""
    tiktoken = pytest.importorskip("tiktoken")
    pattern = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding(
        "oracle", pat_str=pattern, mergeable_ranks=byte_level_ranks, special_tokens={}
    ).encode_ordinary


def test_ids_equal_those_of_transformers(tokenizer, byte_level_files) -> None:
    from transformers import GPT2Tokenizer as Oracle

    vocab, merges = (Path(file).read_text(encoding="utf-8") for file in byte_level_files)
    merges = [tuple(line.split(" ")) for line in merges.split("\n")[1:] if line]
    oracle = Oracle(vocab=json.loads(vocab), merges=merges)
    for text in ALL_TEXTS:
        if "<|endoftext|>" not in text:
            assert tokenizer.tokenize(text) == oracle(text)["input_ids"], repr(text[:40])


@pytest.mark.parametrize("text", ALL_TEXTS, ids=range(len(ALL_TEXTS)))
def test_ids_are_those_of_ranks_and_split_expression(tokenizer, tiktoken_ids, text) -> None:
    assert tokenizer.tokenize(text) == tiktoken_ids(text)


def test_text_of_the_end_token_is_ordinary_text(tokenizer) -> None:
    ids = tokenizer.tokenize("a<|endoftext|>")
    assert tokenizer.eod not in ids and len(ids) > 2
    assert tokenizer.eod == tokenizer.vocab_size - 1 == tokenizer.vocab["<|endoftext|>"]


@pytest.mark.parametrize("text", ALL_TEXTS, ids=range(len(ALL_TEXTS)))
def test_round_trip_gives_the_text(tokenizer, text) -> None:
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.detokenize(np.array(tokenizer.tokenize(text), dtype=np.int64)) == text


def test_flat_batch_is_the_texts_end_to_end(tokenizer) -> None:
    ids, lengths = tokenizer.tokenize_flat(ALL_TEXTS)
    assert ids.dtype == np.int32 and lengths.dtype == np.int64
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    assert [part.tolist() for part in parts] == [tokenizer.tokenize(text) for text in ALL_TEXTS]
    assert [list(ids) for ids in tokenizer.tokenize_batch(["a b", ""])] == [tokenizer.tokenize("a b"), []]
    for texts, expected in (([], []), ([""], [0]), (["", ""], [0, 0])):
        ids, lengths = tokenizer.tokenize_flat(texts)
        assert (ids.tolist(), lengths.tolist()) == ([], expected)


@pytest.mark.parametrize("texts", [["ok", "bad \ud83d"], ["\udc00"]])
def test_lone_surrogate_is_named(tokenizer, texts) -> None:
    with pytest.raises(DataError, match=r"lone surrogate U\+D"):
        tokenizer.tokenize_flat(texts)
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.tokenize(texts[-1])


def test_identifiers_are_class_and_paths(tokenizer, byte_level_files) -> None:
    assert dict(tokenizer.unique_identifiers) == {
        "class": "_GPT2BPETokenizer",
        "tokenizer_path": list(byte_level_files),
    }


def test_id_outside_the_vocabulary_is_named(tokenizer) -> None:
    with pytest.raises(DataError, match="token id 5000 is outside the vocabulary of 800"):
        tokenizer.detokenize([1, 5000])


def test_bytes_to_unicode_by_hand() -> None:
    table = bytes_to_unicode()
    assert len(set(table.values())) == 256
    # GPT-2's files write a blank as Ġ and a line end as Ċ.
    assert [table[byte] for byte in (0x20, 0x0A, 0x41, 0xAD, 0xFF)] == ["Ġ", "Ċ", "A", "\u0143", "ÿ"]
    assert get_pairs("abca") == {("a", "b"), ("b", "c"), ("c", "a")}


def test_gpt2_tokenizer_tokens_specials_and_files(byte_level_files, tmp_path) -> None:
    tokenizer = GPT2Tokenizer(*byte_level_files, special_tokens=["<a>", "<b>"])
    assert len(tokenizer) == 802
    tokens = tokenizer.tokenize("Hello world")
    assert "".join(tokens) == "HelloĠworld"
    assert tokenizer.convert_tokens_to_ids(tokens) == tokenizer.encode("Hello world")
    assert tokenizer.bpe("Ġworld").replace(" ", "") == "Ġworld"
    assert [tokenizer.encoder[piece] for piece in tokenizer.bpe("Ġworld").split()] == tokenizer.encode(
        " world"
    )
    assert tokenizer.convert_tokens_to_ids("<b>") == 801
    assert tokenizer.convert_ids_to_tokens([800, 5], skip_special_tokens=True) == [tokenizer.decoder[5]]
    assert tokenizer.convert_ids_to_tokens([800]) == ["<a>"]
    tokenizer.save_vocabulary(str(tmp_path))
    again = GPT2Tokenizer.from_pretrained(str(tmp_path))
    assert again.encoder == tokenizer.encoder and again.special_tokens == tokenizer.special_tokens
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    with pytest.raises(DataError, match="nothing is downloaded"):
        GPT2Tokenizer.from_pretrained("gpt2")


def test_sequences_longer_than_the_model_are_reported(byte_level_files, caplog) -> None:
    tokenizer = GPT2Tokenizer(*byte_level_files, max_len=3)
    tokenizer.convert_tokens_to_ids(["a"] * 3)
    assert not caplog.records
    tokenizer.convert_tokens_to_ids(["a"] * 4)
    assert "4 tokens is longer than the model's 3" in caplog.text


def test_merges_need_no_header_and_may_have_windows_line_ends(byte_level_files, tmp_path) -> None:
    vocab_file, merge_file = byte_level_files
    bare = tmp_path / "merges.txt"
    bare.write_bytes(b"\r\n".join(Path(merge_file).read_bytes().split(b"\n")[1:]))
    assert GPT2Tokenizer(vocab_file, str(bare)).encode(TEXTS[1]) == GPT2Tokenizer(
        vocab_file, merge_file
    ).encode(TEXTS[1])
