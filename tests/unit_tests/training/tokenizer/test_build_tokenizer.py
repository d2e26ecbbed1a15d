"""build_tokenizer: the right class from the flags, its two log lines, the padded size, and bad files."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron.core.errors import ConfigError, DataError, NotBuiltYetError
from megatron.training.tokenizer import _vocab_size_with_padding, build_tokenizer
from megatron.training.tokenizer.base import lone_sentence_piece_model


@pytest.fixture
def files(byte_level_files, sentence_piece_file, tik_entries, golden, tmp_path) -> dict[str, dict]:
    """The flags of each type, for files that work."""
    tik = tmp_path / "tik.json"
    tik.write_text(json.dumps(tik_entries))
    vocab = {"vocab_file": str(golden / "tokenizer" / "bert_vocab.txt")}
    model = {"tokenizer_model": sentence_piece_file}
    return {
        "GPT2BPETokenizer": {"vocab_file": byte_level_files[0], "merge_file": byte_level_files[1]},
        "BertWordPieceLowerCase": vocab,
        "BertWordPieceCase": vocab,
        "SentencePieceTokenizer": model,
        "GPTSentencePieceTokenizer": model,
        "Llama2Tokenizer": model,
        "HuggingFaceTokenizer": model,
        "PretrainedFromHF": {"tokenizer_name_or_path": str(Path(sentence_piece_file).parent)},
        "TikTokenizer": {
            "tokenizer_model": str(tik),
            "tiktoken_pattern": "v2",
            "vocab_size": 290,
            "tiktoken_num_special_tokens": 10,
        },
        "NullTokenizer": {"vocab_size": 500},
    }


SIZES = {
    # name: (class, tokens, tokens rounded up to a multiple of 128 * 2)
    "GPT2BPETokenizer": ("_GPT2BPETokenizer", 800, 1024),
    "BertWordPieceLowerCase": ("_BertWordPieceTokenizer", 68, 256),
    "BertWordPieceCase": ("_BertWordPieceTokenizer", 68, 256),
    "SentencePieceTokenizer": ("_SentencePieceTokenizer", 605, 768),
    "GPTSentencePieceTokenizer": ("_GPTSentencePieceTokenizer", 600, 768),
    "Llama2Tokenizer": ("_Llama2Tokenizer", 600, 768),
    "HuggingFaceTokenizer": ("_GPTSentencePieceTokenizer", 600, 768),
    "PretrainedFromHF": ("_GPTSentencePieceTokenizer", 600, 768),
    "TikTokenizer": ("CustomTikTokenizer", 290, 512),
    "NullTokenizer": ("_NullTokenizer", 501, 512),
}


@pytest.mark.parametrize("name", SIZES)
def test_class_log_lines_and_padded_size(name, files, arguments, capsys) -> None:
    cls, size, padded = SIZES[name]
    args = arguments(name, tensor_model_parallel_size=2, **files[name])
    tokenizer = build_tokenizer(args)
    assert (type(tokenizer).__name__, tokenizer.vocab_size, args.padded_vocab_size) == (cls, size, padded)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"> building {name} tokenizer ..."
    assert (
        lines[-1] == f" > padded vocab (size: {size}) with {padded - size} dummy tokens (new size: {padded})"
    )


def test_bert_type_decides_on_lower_case(files, arguments) -> None:
    for name, expected in (("BertWordPieceLowerCase", "True"), ("BertWordPieceCase", "False")):
        tokenizer = build_tokenizer(arguments(name, **files[name]))
        assert tokenizer.unique_identifiers["lower_case"] == expected


def test_only_rank_0_prints_and_a_given_padded_size_is_kept(files, arguments, capsys) -> None:
    args = arguments("NullTokenizer", rank=3, **files["NullTokenizer"])
    build_tokenizer(args)
    assert args.padded_vocab_size == 512 and capsys.readouterr().out == ""
    args = arguments("NullTokenizer", padded_vocab_size=7777, **files["NullTokenizer"])
    build_tokenizer(args)
    assert args.padded_vocab_size == 7777 and "padded vocab" not in capsys.readouterr().out


def test_optional_arguments_may_be_missing(files) -> None:
    args = Namespace(
        tokenizer_type="GPT2BPETokenizer",
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=1,
        **files["GPT2BPETokenizer"],
    )
    build_tokenizer(args)
    assert args.padded_vocab_size == 896


@pytest.mark.parametrize(
    ("size", "multiple", "tp", "padded"),
    [(50257, 128, 1, 50304), (50257, 128, 8, 51200), (256, 128, 2, 256), (257, 128, 2, 512), (1, 1, 1, 1)],
)
def test_padded_size_is_the_next_multiple(size, multiple, tp, padded, capsys) -> None:
    args = Namespace(rank=0, make_vocab_size_divisible_by=multiple, tensor_model_parallel_size=tp)
    assert _vocab_size_with_padding(size, args, logging_enabled=False) == padded
    assert capsys.readouterr().out == ""


def test_vocab_size_raises_the_padded_size(files, arguments, capsys) -> None:
    flags = files["GPT2BPETokenizer"]
    args = arguments("GPT2BPETokenizer", vocab_size=1000, **flags)
    build_tokenizer(args)
    assert args.padded_vocab_size == 1024
    assert " > padded vocab (size: 1000) with 24 dummy tokens (new size: 1024)" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"--vocab-size 799 is smaller than the 800 tokens.*--vocab-size 800"
    ):
        build_tokenizer(arguments("GPT2BPETokenizer", vocab_size=799, **flags))


def test_sentinels_and_loader_options_have_an_effect_or_are_named(files, arguments, capsys) -> None:
    name = "BertWordPieceLowerCase"
    assert build_tokenizer(arguments(name, vocab_extra_ids=10, **files[name])).vocab_size == 78
    assert "no effect" not in capsys.readouterr().out
    build_tokenizer(arguments("NullTokenizer", vocab_extra_ids=10, **files["NullTokenizer"]))
    assert "--vocab-extra-ids 10 has no effect on NullTokenizer" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="takes no options for a loader, but was given use_fast"):
        build_tokenizer(arguments("NullTokenizer", **files["NullTokenizer"]), use_fast=True)


def test_a_lone_sentencepiece_model_is_read_by_sentencepiece(files, arguments, tmp_path, capsys) -> None:
    build_tokenizer(arguments("HuggingFaceTokenizer", **files["HuggingFaceTokenizer"]))
    assert "has no tokenizer_config.json beside it" in capsys.readouterr().out
    shutil.copy(files["HuggingFaceTokenizer"]["tokenizer_model"], tmp_path / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    # With a description beside it, the model is transformers' to read.
    for source in (tmp_path, tmp_path / "tokenizer.model"):
        assert lone_sentence_piece_model(str(source)) is None
    pytest.importorskip("google.protobuf")
    tokenizer = build_tokenizer(arguments("PretrainedFromHF", tokenizer_name_or_path=str(tmp_path)))
    assert type(tokenizer).__name__ == "_HuggingFaceTokenizer" and tokenizer.eod == 2


@pytest.mark.parametrize(
    ("name", "flags", "error", "message"),
    [
        ("GPT3BPETokenizer", {}, NotImplementedError, "no such tokenizer; choose one of .*GPT2BPETokenizer"),
        ("GPT3BPETokenizer", {}, ConfigError, "no such tokenizer"),
        ("MultimodalTokenizer", {}, NotBuiltYetError, "MultimodalTokenizer"),
        ("NullMultimodalTokenizer", {"vocab_size": 5}, NotBuiltYetError, "NullMultimodalTokenizer"),
        ("GPT2BPETokenizer", {"merge_file": "m"}, ConfigError, "GPT2BPETokenizer needs --vocab-file"),
        ("GPT2BPETokenizer", {"vocab_file": "v"}, ConfigError, "GPT2BPETokenizer needs --merge-file"),
        ("BertWordPieceCase", {}, ConfigError, "needs --vocab-file"),
        ("SentencePieceTokenizer", {}, ConfigError, "needs --tokenizer-model"),
        ("GPTSentencePieceTokenizer", {}, ConfigError, "needs --tokenizer-model"),
        ("Llama2Tokenizer", {}, ConfigError, "needs --tokenizer-model"),
        ("HuggingFaceTokenizer", {}, ConfigError, "needs --tokenizer-model"),
        ("PretrainedFromHF", {}, ConfigError, "needs --tokenizer-name-or-path"),
        ("TikTokenizer", {}, ConfigError, "needs --tokenizer-model"),
        ("TikTokenizer", {"tokenizer_model": "x"}, ConfigError, "needs --tiktoken-pattern.*v1 or v2"),
        ("TikTokenizer", {"tokenizer_model": "x", "tiktoken_pattern": "v3"}, ConfigError, "give v1 or v2"),
        ("NullTokenizer", {}, ConfigError, "needs --vocab-size"),
    ],
)
def test_missing_flags_are_named(arguments, name, flags, error, message) -> None:
    with pytest.raises(error, match=message):
        build_tokenizer(arguments(name, **flags))


MISSING = [
    ("GPT2BPETokenizer", "vocab_file"),
    ("GPT2BPETokenizer", "merge_file"),
    ("BertWordPieceLowerCase", "vocab_file"),
    ("SentencePieceTokenizer", "tokenizer_model"),
    ("GPTSentencePieceTokenizer", "tokenizer_model"),
    ("Llama2Tokenizer", "tokenizer_model"),
    ("TikTokenizer", "tokenizer_model"),
]


@pytest.mark.parametrize(("name", "flag"), MISSING)
@pytest.mark.parametrize("kind", ["missing", "directory", "empty"])
def test_missing_files_are_named(files, arguments, tmp_path, name, flag, kind) -> None:
    path = tmp_path / "what"
    if kind == "directory":
        path.mkdir()
    if kind == "empty":
        path.touch()
    message = {
        "missing": "no such file",
        "directory": "a directory, not a file",
        "empty": "the file is empty",
    }[kind]
    with pytest.raises(DataError, match=f"--{flag.replace('_', '-')} {path}: .*{message}.*; give "):
        build_tokenizer(arguments(name, **(files[name] | {flag: str(path)})))


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("vocab_file", b"{'a': 1}", r"not JSON \(line 1, column 2"),
        ("vocab_file", b"[1, 2]", "not one JSON object of token to id"),
        ("vocab_file", b'{"a": "b"}', "not one JSON object of token to id"),
        ("vocab_file", b'{"a": 1}', "242 of the 256 bytes have no token"),
        ("vocab_file", b"\xff\xfe{}", "byte 0 is not UTF-8"),
        ("merge_file", b"#version: 0.2\na b c\n", "line 2 is 'a b c', not two tokens"),
        ("merge_file", b"[1, 2, 3, 4]", "line 1 is"),
        ("merge_file", b"#version: 0.2\na b\nx \xd0\x96\n", "merge 2, 'x' \\+ 'Ж', needs the token 'Ж'"),
    ],
)
def test_mismatched_gpt2_files_are_named(files, arguments, tmp_path, flag, content, message) -> None:
    flags = files["GPT2BPETokenizer"]
    path = tmp_path / "bad"
    path.write_bytes(content)
    if "merge 2" in message:  # the first merge must be one that the vocabulary has
        pair = Path(flags["merge_file"]).read_bytes().split(b"\n")[1]
        path.write_bytes(content.replace(b"a b", pair))
    with pytest.raises(DataError, match=message):
        build_tokenizer(arguments("GPT2BPETokenizer", **(flags | {flag: str(path)})))


def test_a_vocabulary_without_the_end_token_is_named(files, arguments, tmp_path) -> None:
    vocabulary = json.loads(Path(files["GPT2BPETokenizer"]["vocab_file"]).read_text())
    del vocabulary["<|endoftext|>"]
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(vocabulary))
    with pytest.raises(DataError, match=r"no token <\|endoftext\|>, which ends documents"):
        build_tokenizer(
            arguments("GPT2BPETokenizer", **(files["GPT2BPETokenizer"] | {"vocab_file": str(path)}))
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the\na\n", r"no token \[UNK\]"),
        (b"[UNK]\n[PAD]\n[CLS]\n", r"no token \[SEP\], \[MASK\]"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_invalid_bert_vocabularies_are_named(arguments, tmp_path, content, message) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_tokenizer(arguments("BertWordPieceLowerCase", vocab_file=str(path)))


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("GPT2BPETokenizer", "tokenizers"),
        ("BertWordPieceCase", "tokenizers"),
        ("Llama2Tokenizer", "sentencepiece"),
        ("TikTokenizer", "tiktoken"),
    ],
)
def test_a_missing_library_is_named_with_the_install_command(
    files, arguments, monkeypatch, name, library
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"pip install {library}"):
        build_tokenizer(arguments(name, **files[name]))


def test_import_loads_no_tokenizer_library(repo_root) -> None:
    heavy = ("tokenizers", "transformers", "sentencepiece", "tiktoken", "fastokens")
    code = (
        "import sys, megatron.training.tokenizer, megatron.training.tokenizer.tokenizer; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
