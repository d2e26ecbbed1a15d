"""BERT word pieces: ids made by Megatron itself, and by transformers."""

import json
from collections import OrderedDict

import numpy as np
import pytest

from megatron.core.errors import DataError
from megatron.training.tokenizer import bert_tokenization as bert
from megatron.training.tokenizer.tokenizer import _BertWordPieceTokenizer

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the un ##aff ##able straße strasse caf cafe ##é ##e , . ! - ' [ ] 中 文"
)
WORDS += " \u03b1\u03c2 \u03b1\u03c3 ##\u03c2 hello world The He ##llo cls i ##i"


@pytest.fixture
def vocab_file(tmp_path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS.split()) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def golden_vocab(golden) -> str:
    return str(golden / "tokenizer" / "bert_vocab.txt")


def test_ids_equal_those_of_megatron(golden, golden_vocab) -> None:
    """sent_text_document.bin holds the sentences of corpus_sent.jsonl, one after the other."""
    lines = (golden / "tokenizer" / "corpus_sent.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    sentences = [s for text in texts for s in (text if isinstance(text, list) else [text])]
    ids, lengths = _BertWordPieceTokenizer(golden_vocab).tokenize_flat(sentences)
    expected = np.fromfile(golden / "tokenizer" / "sent_text_document.bin", dtype=np.uint16)
    assert len(lengths) == len(sentences)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(("key", "sentinels"), [("bert", 0), ("t5", 40)])
def test_special_ids_equal_those_of_megatron(golden, golden_vocab, key, sentinels) -> None:
    info = json.loads((golden / "tokenizer" / "tokenizer_info.json").read_text())[key]
    tokenizer = _BertWordPieceTokenizer(golden_vocab, vocab_extra_ids=sentinels)
    for name in ("cls", "sep", "pad", "mask", "bos", "eos", "vocab_size"):
        assert getattr(tokenizer, name) == info.get(name, getattr(tokenizer, name)), name
    assert tokenizer.eod == tokenizer.eos
    assert tokenizer.additional_special_tokens_ids == info.get("extra", [])
    assert tokenizer.vocab.items() >= info.get("tail_vocab", {}).items()
    assert all(tokenizer.inv_vocab[index] == token for token, index in tokenizer.vocab.items())
    identifiers = dict(tokenizer.unique_identifiers)
    assert identifiers.pop("tokenizer_path") == [golden_vocab]
    assert identifiers == {k: v for k, v in info["unique"].items() if k != "tokenizer_path"}


TEXTS = [
    "",
    "Hello, WORLD!",
    "unaffable unaffablex  the-un",
    "Café CAFÉ cafe\u0301",
    "中文the中",
    "straße STRASSE",
    "a\x00b\tc\u200bd\ufffd \u00a0the",
    "the" * 50,
    "[CLS] it's [UNK]",
]


@pytest.mark.parametrize("lower_case", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(vocab_file, lower_case, text) -> None:
    from transformers import BertTokenizer

    oracle = BertTokenizer(vocab=vocab_file, do_lower_case=lower_case, strip_accents=lower_case)
    # Special tokens spelled in the text are text here; transformers must be told so.
    expected = oracle(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert _BertWordPieceTokenizer(vocab_file, lower_case=lower_case).tokenize(text) == expected


def test_words_are_lower_cased_as_words(vocab_file) -> None:
    tokenizer = _BertWordPieceTokenizer(vocab_file)
    # A capital sigma at the end of a word, not inside one: ΑΣ is ας.
    assert tokenizer.tokenizer.tokenize("ΑΣ") == ["ας"]
    assert tokenizer.tokenizer.tokenize("İI") == ["i", "##i"]
    assert bert.BasicTokenizer().tokenize("ΑΣ, Über") == ["ας", ",", "uber"]


def test_longest_word_is_200_characters(tmp_path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##a\n")
    tokenizer = _BertWordPieceTokenizer(str(path))
    assert tokenizer.tokenize("a" * 200) == [5] + [6] * 199
    assert tokenizer.tokenize("a" * 201) == [1]


def test_decoding_joins_pieces_and_drops_blanks(vocab_file) -> None:
    tokenizer = _BertWordPieceTokenizer(vocab_file)
    ids = tokenizer.tokenize("The unaffable world, hello!")
    assert tokenizer.detokenize(np.array(ids)) == tokenizer.decode(ids) == "the unaffable world, hello!"
    assert (
        tokenizer.decode_token_ids([tokenizer.cls, *ids, tokenizer.pad]) == " the unaffable world , hello !"
    )
    with pytest.raises(DataError, match="is not in the vocabulary"):
        tokenizer.decode([10_000])
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.tokenize("a\ud800")


def test_public_helper_functions(vocab_file) -> None:
    vocab = bert.load_vocab(vocab_file)
    assert isinstance(vocab, OrderedDict) and list(vocab)[:3] == ["[PAD]", "[UNK]", "[CLS]"]
    assert bert.convert_tokens_to_ids(vocab, ["the", "un"]) == [5, 6]
    assert bert.convert_ids_to_tokens({5: "the"}, [5]) == ["the"]
    assert bert.whitespace_tokenize(" a  b\n") == ["a", "b"]
    assert bert.convert_to_unicode("é".encode()) == bert.printable_text("é") == "é"
    pieces = bert.WordpieceTokenizer(vocab)
    assert pieces.tokenize("unaffable xyz") == ["un", "##aff", "##able", "[UNK]"]
    assert bert.WordpieceTokenizer({"a": 0}).tokenize("a b") == ["a", "[UNK]"]
    full = bert.FullTokenizer(vocab_file, do_lower_case=False)
    assert full.convert_ids_to_tokens(full.convert_tokens_to_ids(["The"])) == ["The"]
    assert full.convert_tokens_to_string(["do", "n't", "un", "##aff", "."]) == "don't unaff."
    assert full.vocab_size() == len(vocab)


@pytest.mark.parametrize(
    ("lower", "checkpoint", "warns"),
    [
        (True, "/m/uncased_L-12_H-768_A-12/bert_model.ckpt", False),
        (False, "/m/uncased_L-12_H-768_A-12/bert_model.ckpt", True),
        (True, "cased_L-24_H-1024_A-16", True),
        (True, "multi_cased_L-12_H-768_A-12", True),
        (False, "chinese_L-12_H-768_A-12", True),
        (True, "my_model", False),
        (True, None, False),
    ],
)
def test_checkpoint_name_of_the_other_case_gives_a_warning(lower, checkpoint, warns, caplog) -> None:
    bert.validate_case_matches_checkpoint(lower, checkpoint)
    assert bool(caplog.records) is warns
