"""Tiny tokenizers of every kind, trained once per session on text that every machine has."""

import base64
import io
import json
from argparse import Namespace
from pathlib import Path

import pytest
from texts_to_tokenize import TEXTS


@pytest.fixture(scope="session")
def byte_level_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """vocab.json and merges.txt of a byte-level BPE of 800 tokens, ``<|endoftext|>`` last."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("byte_level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=799, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.model.save(str(directory))
    vocab_file = directory / "vocab.json"
    vocabulary = json.loads(vocab_file.read_text(encoding="utf-8"))
    vocab_file.write_text(json.dumps(vocabulary | {"<|endoftext|>": len(vocabulary)}), encoding="utf-8")
    return str(vocab_file), str(directory / "merges.txt")


@pytest.fixture(scope="session")
def byte_level_ranks(byte_level_files: tuple[str, str]) -> dict[bytes, int]:
    """The same vocabulary as bytes to rank, read by rules of its own."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    stand_ins = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    vocabulary = json.loads(Path(byte_level_files[0]).read_text(encoding="utf-8"))
    del vocabulary["<|endoftext|>"]
    return {bytes(stand_ins[c] for c in token): index for token, index in vocabulary.items()}


@pytest.fixture(scope="session")
def sentence_piece_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece BPE model like Llama's: byte fallback, no normalisation, no pad piece."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXTS).split("\n")),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentence_piece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="session")
def tik_entries() -> list[dict]:
    """300 entries of a TikTokenizer vocabulary: the bytes, then some words."""
    words = ["he", "ll", "hell", "hello", " w", "or", "ld", " wor", " world", "中".encode()[:2], "中", "..."]
    words += [f"z{n}" for n in range(300 - 256 - len(words))]
    tokens = [bytes([n]) for n in range(256)] + [w if isinstance(w, bytes) else w.encode() for w in words]
    return [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode("utf-8", errors="replace"),
        }
        for rank, token in enumerate(tokens)
    ]


@pytest.fixture
def arguments():
    """Arguments as the parser leaves them, with what a test changes."""

    def make(tokenizer_type: str, **changes) -> Namespace:
        defaults = {
            "rank": 0,
            "vocab_file": None,
            "merge_file": None,
            "tokenizer_model": None,
            "tokenizer_name_or_path": None,
            "tiktoken_pattern": None,
            "tiktoken_num_special_tokens": 1000,
            "tiktoken_special_tokens": None,
            "vocab_size": None,
            "vocab_extra_ids": 0,
            "make_vocab_size_divisible_by": 128,
            "tensor_model_parallel_size": 1,
            "padded_vocab_size": None,
        }
        return Namespace(tokenizer_type=tokenizer_type, **(defaults | changes))

    return make
