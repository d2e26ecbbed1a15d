"""SentencePiece types, against sentencepiece itself and transformers' LlamaTokenizer."""

import json
import shutil
from pathlib import Path

import pytest
from texts_to_tokenize import HARD_TEXTS, TEXTS

from megatron.core.errors import DataError
from megatron.training.tokenizer.tokenizer import (
    _GPTSentencePieceTokenizer,
    _Llama2Tokenizer,
    _SentencePieceTokenizer,
)

ALL_TEXTS = [*TEXTS, *HARD_TEXTS]


@pytest.fixture(scope="module")
def oracle(sentence_piece_file):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=sentence_piece_file)


def test_plain_type_is_sentencepiece(sentence_piece_file, oracle) -> None:
    tokenizer = _GPTSentencePieceTokenizer(sentence_piece_file)
    assert (
        tokenizer.tokenize_batch(ALL_TEXTS)
        == [tokenizer.tokenize(t) for t in ALL_TEXTS]
        == oracle.encode(ALL_TEXTS)
    )
    assert tokenizer.vocab_size == len(oracle) == len(tokenizer.vocab)
    assert (tokenizer.eod, tokenizer.eos, tokenizer.bos, tokenizer.pad) == (2, 2, 1, -1)
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask) == (-1, -1, -1)
    for text in ("Hello  world", "中文 😀", " x"):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    # Special tokens spelled in the text are text.
    assert 2 not in tokenizer.tokenize("a</s>")


def test_llama2_puts_bos_in_front(sentence_piece_file, oracle) -> None:
    tokenizer = _Llama2Tokenizer(sentence_piece_file)
    plain = oracle.encode("Hello world")
    assert tokenizer.tokenize("Hello world") == [1, *plain]
    assert tokenizer.tokenize("Hello world", bos=False, eos=True) == [*plain, 2]
    assert tokenizer.tokenize_batch(["Hello world", ""]) == [[1, *plain], [1]]
    assert tokenizer.detokenize(tokenizer.tokenize("Hello world")) == "Hello world"
    assert tokenizer.eod == 2


def test_llama2_ids_equal_those_of_transformers(sentence_piece_file, tmp_path) -> None:
    """transformers reads the same model as Llama's, with bos."""
    pytest.importorskip("google.protobuf")
    from transformers import AutoTokenizer

    shutil.copy(sentence_piece_file, tmp_path / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    oracle = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    tokenizer = _Llama2Tokenizer(sentence_piece_file)
    for text in ("Hello, world! It's 12:34", "été 中文字 😀 x", "def f(x): return x"):
        assert tokenizer.tokenize(text) == oracle(text)["input_ids"]


def test_special_tokens_follow_the_model_in_order(sentence_piece_file, oracle) -> None:
    size = len(oracle)
    tokenizer = _SentencePieceTokenizer(sentence_piece_file, vocab_extra_ids=2)
    # The model has bos and eos, and no pad.
    added = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>"]
    assert [tokenizer.inv_vocab[size + n] for n in range(len(added))] == added
    assert tokenizer.vocab_size == size + len(added)
    assert (tokenizer.cls, tokenizer.sep, tokenizer.eod, tokenizer.mask) == tuple(range(size, size + 4))
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (size + 4, 1, 2)
    assert tokenizer.additional_special_tokens_ids == [size + 5, size + 6]
    assert tokenizer.decoder is tokenizer.inv_vocab and tokenizer.encoder is tokenizer.vocab
    assert dict(tokenizer.unique_identifiers) == {
        "class": "_SentencePieceTokenizer",
        "tokenizer_path": [sentence_piece_file],
        "vocab_extra_ids": "2",
    }


def test_special_tokens_are_found_in_the_text(sentence_piece_file, oracle) -> None:
    tokenizer = _SentencePieceTokenizer(sentence_piece_file, vocab_extra_ids=2)
    expected = [
        *oracle.encode("Hello"),
        tokenizer.sep,
        *oracle.encode(" world"),
        tokenizer.vocab["<extra_id_1>"],
        2,
    ]
    assert tokenizer.tokenize("Hello<SEP> world<extra_id_1></s>") == expected
    assert tokenizer.detokenize(expected) == "Hello <SEP>  world <extra_id_1>  </s> "
    for text in ("", "<CLS", "Hello world"):
        assert tokenizer.tokenize(text) == oracle.encode(text)


def test_offsets_are_characters(sentence_piece_file) -> None:
    pytest.importorskip("google.protobuf")
    tokenizer = _GPTSentencePieceTokenizer(sentence_piece_file)
    text = "été naïve 中文 Hello"
    ids = tokenizer.tokenize(text)
    starts = tokenizer.offsets(ids, text)
    assert len(starts) == len(ids) and starts == sorted(starts)
    # Cut at the offsets and join: the text again; every piece that is not a byte is where it says.
    for index, start, end in zip(ids, starts, [*starts[1:], len(text)], strict=True):
        piece = tokenizer.inv_vocab[index]
        if not piece.startswith("<0x"):
            surface = piece.replace("▁", " ")
            assert text[start:end] in (surface, surface.lstrip()), piece


def test_bad_models_and_ids_are_named(sentence_piece_file, tmp_path) -> None:
    content = Path(sentence_piece_file).read_bytes()
    for name, data, message in [
        ("cut.model", content[: len(content) // 2], "not a SentencePiece model, or cut short"),
        ("text.model", b"hello world", "not a SentencePiece model"),
        ("x.json", b'{"model": {}}', r"looks like JSON: use --tokenizer-type HuggingFaceTokenizer"),
        ("empty.model", b"", "the file is empty"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            _GPTSentencePieceTokenizer(str(tmp_path / name))
    tokenizer = _GPTSentencePieceTokenizer(sentence_piece_file)
    with pytest.raises(DataError, match="token id 99999 is outside the SentencePiece model of 600 pieces"):
        tokenizer.detokenize([99999])
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.tokenize("a\ud800")
    with pytest.raises(DataError, match="text 1 of 2"):
        tokenizer.tokenize_batch(["a", "a\ud800"])
