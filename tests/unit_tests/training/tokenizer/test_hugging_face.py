"""HuggingFaceTokenizer: what transformers loads from this machine, and nothing from anywhere else."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from texts_to_tokenize import HARD_TEXTS, TEXTS

from megatron.core.errors import ConfigError, DataError
from megatron.training.tokenizer.tokenizer import _HuggingFaceTokenizer

ALL_TEXTS = [*TEXTS, *HARD_TEXTS]


@pytest.fixture(scope="module")
def gpt2_directory(byte_level_files, tmp_path_factory) -> Path:
    from transformers import GPT2Tokenizer

    vocabulary = json.loads(Path(byte_level_files[0]).read_text(encoding="utf-8"))
    lines = Path(byte_level_files[1]).read_text(encoding="utf-8").split("\n")[1:]
    directory = tmp_path_factory.mktemp("gpt2")
    GPT2Tokenizer(
        vocab=vocabulary, merges=[tuple(line.split(" ")) for line in lines if line]
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def oracle(gpt2_directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(gpt2_directory), local_files_only=True)


@pytest.mark.parametrize("given", ["directory", "file with a configuration", "bare file"])
def test_ids_equal_those_of_transformers(gpt2_directory, oracle, tmp_path, given) -> None:
    source = gpt2_directory
    if given == "file with a configuration":
        source = gpt2_directory / "tokenizer.json"
    if given == "bare file":
        source = Path(shutil.copy(gpt2_directory / "tokenizer.json", tmp_path / "other_name.json"))
    tokenizer = _HuggingFaceTokenizer(str(source))
    expected = [oracle(text)["input_ids"] for text in ALL_TEXTS]
    assert [tokenizer.tokenize(text) for text in ALL_TEXTS] == expected
    assert tokenizer.tokenize_batch(ALL_TEXTS) == expected
    ids, lengths = tokenizer.tokenize_flat(ALL_TEXTS)
    assert ids.tolist() == [index for part in expected for index in part]
    assert lengths.tolist() == [len(part) for part in expected]
    # Unlike GPT2BPETokenizer: here the text of a special token is that token.
    assert tokenizer.eod == tokenizer.vocab["<|endoftext|>"] == tokenizer.tokenize("<|endoftext|>")[0]
    assert tokenizer.vocab_size == len(oracle) == 800
    assert tokenizer.inv_vocab[5] == tokenizer.decoder[5]
    assert ("taking <|endoftext|>" in (tokenizer.notice or "")) == (given == "bare file")
    assert dict(tokenizer.unique_identifiers) == {
        "class": "_HuggingFaceTokenizer",
        "tokenizer_path": [str(source)],
    }


def test_round_trip_and_offsets(gpt2_directory) -> None:
    tokenizer = _HuggingFaceTokenizer(str(gpt2_directory))
    for text in ALL_TEXTS:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.detokenize([tokenizer.eod], skip_special_tokens=True) == ""
    text = "Hello, world! it's"
    ids = tokenizer.tokenize(text)
    starts = tokenizer.offsets(ids, text)
    tokens = [tokenizer.inv_vocab[index] for index in ids]
    # All ASCII, so a token has as many characters as the text it stands for.
    assert starts[0] == 0 and [b - a for a, b in pairwise(starts)] == [len(t) for t in tokens[:-1]]
    with pytest.raises(DataError, match="not those of the text"):
        tokenizer.offsets(ids[1:], text)


def test_word_piece_is_encoded_by_transformers(tmp_path) -> None:
    from transformers import BertTokenizer

    vocab = tmp_path / "in.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nworld\n##s\n")
    BertTokenizer(vocab=str(vocab)).save_pretrained(tmp_path / "bert")
    tokenizer = _HuggingFaceTokenizer(str(tmp_path / "bert"))
    # The post-processor's own [CLS] and [SEP] are part of what the tokenizer gives.
    assert tokenizer.tokenize("Hello worlds") == [2, 5, 6, 7, 3]
    assert tokenizer.tokenize("Hello", add_special_tokens=False) == [5]
    assert tokenizer.tokenize_flat(["hello", ""])[1].tolist() == [3, 2]
    with pytest.raises(DataError, match="names no eos token"):
        tokenizer.eod  # noqa: B018
    with pytest.raises(NotImplementedError):
        tokenizer.eod  # noqa: B018


def test_long_documents_give_no_warning(gpt2_directory, tmp_path, caplog, capfd) -> None:
    directory = Path(shutil.copytree(gpt2_directory, tmp_path / "short"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 4}))
    tokenizer = _HuggingFaceTokenizer(str(directory))
    assert len(tokenizer.tokenize_batch([TEXTS[0]])[0]) > 1000
    assert "longer than" not in caplog.text + capfd.readouterr().err


def test_a_lone_surrogate_is_named(gpt2_directory, monkeypatch) -> None:
    tokenizer = _HuggingFaceTokenizer(str(gpt2_directory))
    for _ in range(2):
        with pytest.raises(DataError, match="text 1 of 2: character 0 is the lone surrogate"):
            tokenizer.tokenize_flat(["a", "\ud800"])
        monkeypatch.setattr(tokenizer, "_fast", None)


def write(directory: Path, **files: str) -> str:
    for name, content in files.items():
        (directory / name.replace("_json", ".json")).write_text(content, encoding="utf-8")
    return str(directory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: str(d / "missing" / "tokenizer.json"), "no such file"),
        (lambda d: str(d / "missing"), "nothing is downloaded; give a directory"),
        (lambda d: "no-such-org/no-such-model", "nothing is downloaded; give a directory"),
        (lambda d: "gpt2", "nothing is downloaded; give a directory"),
        (write, "no tokenizer files in this directory, which holds nothing"),
        (
            lambda d: write(d, **{"weights.bin": "x"}),
            "no tokenizer files in this directory, which holds weights.bin",
        ),
        (lambda d: write(d, tokenizer_json="{"), r"not JSON \(line 1, column 2"),
        (lambda d: write(d, tokenizer_json=""), "the file is empty"),
        (lambda d: write(d, tokenizer_json='{"a": 1}'), "transformers cannot load a tokenizer from it"),
        (lambda d: write(d, x_json='{"a": 1}') + "/x.json", "JSON, but not a tokenizer.json"),
        (lambda d: write(d, x_json='{"model": {"type": "No"}}') + "/x.json", "not a tokenizer.json that"),
        (lambda d: write(d, x_json="[1,") + "/x.json", "not JSON"),
        (lambda d: write(d, **{"x.model": "junk"}) + "/x.model", "use --tokenizer-type GPTSentencePiece"),
    ],
)
def test_unusable_sources_are_named(tmp_path, monkeypatch, make, message) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(DataError, match=message):
        _HuggingFaceTokenizer(make(tmp_path))


def test_differences_from_the_sentencepiece_model_give_a_notice(
    tmp_path, sentence_piece_file, monkeypatch
) -> None:
    """transformers builds Llama's tokenizer from tokenizer.model without the model's normalisation."""
    import io

    import sentencepiece

    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(sentence_piece_file, tmp_path / "tokenizer.model")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="pip install protobuf"):
        patch.setitem(sys.modules, "google.protobuf", None)
        _HuggingFaceTokenizer(str(tmp_path))
    pytest.importorskip("google.protobuf")
    same = _HuggingFaceTokenizer(str(tmp_path))
    assert same.notice is None and same.eod == 2
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "the cat sat"] * 50),
        model_writer=model,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc_cf",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    assert "read tokenizer.model differently, first at" in _HuggingFaceTokenizer(str(tmp_path)).notice
