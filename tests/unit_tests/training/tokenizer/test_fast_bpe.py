"""The fast path: the ids of `tokenizers` or none at all, one thread, and a line for every way back."""

import importlib
import json
import multiprocessing
import os
import random
import sys

import pytest
from texts_to_tokenize import HARD_TEXTS, TEXTS

from megatron.training.tokenizer import fast_bpe as module
from megatron.training.tokenizer.fast_bpe import fast_bpe, is_byte_level_bpe
from megatron.training.tokenizer.gpt2_tokenization import build_byte_level_bpe, read_byte_level_files
from megatron.training.tokenizer.tokenizer import _GPT2BPETokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture
def reference(byte_level_files):
    return build_byte_level_bpe(read_byte_level_files(*byte_level_files))


def random_texts(count: int) -> list[str]:
    """Strings of characters from all over Unicode, blanks and word pieces, with a fixed seed."""
    rng = random.Random(7)
    blocks = [(32, 127), (0, 32), (0xA0, 0x250), (0x300, 0x600), (0x900, 0xE00), (0x2000, 0x2070)]
    blocks += [(0x3000, 0x3100), (0x4E00, 0x9FFF), (0xFB00, 0xFFFF), (0x10000, 0x110000)]
    words = ["the", " ", "  ", "\n", "'s", "'LL", "_", "==", "12", "\t", "<|endoftext|>"]

    def piece() -> str:
        return rng.choice(words) if rng.random() < 0.5 else chr(rng.randrange(*rng.choice(blocks)))

    return ["".join(piece() for _ in range(rng.randrange(60))) for _ in range(count)]


def test_library_is_in_use_and_agrees_on_random_text(reference) -> None:
    pytest.importorskip(module.LIBRARY)
    fast, notice = fast_bpe(reference.to_str(), lambda text: reference.encode(text).ids)
    assert fast is not None and notice is None
    texts = random_texts(3000)
    ids, lengths = fast.encode_flat(texts)
    expected = [encoding.ids for encoding in reference.encode_batch(texts)]
    assert lengths.tolist() == [len(part) for part in expected]
    assert ids.tolist() == [index for part in expected for index in part]


@pytest.mark.slow
def test_every_code_point_agrees(reference) -> None:
    pytest.importorskip(module.LIBRARY)
    fast, _ = fast_bpe(reference.to_str(), lambda text: reference.encode(text).ids)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 50_000):
        texts = [f"a{chr(c)} {chr(c)}1" for c in points[start : start + 50_000]]
        ids, _ = fast.encode_flat(texts)
        expected = [index for e in reference.encode_batch_fast(texts) for index in e.ids]
        assert ids.tolist() == expected, f"between {points[start]:#x} and 50,000 further"


def test_special_tokens_another_split_and_a_prefix_agree(byte_level_files) -> None:
    """A tokenizer.json such as Llama 3's: added tokens are found in the text, a bos goes in front."""
    pytest.importorskip(module.LIBRARY)
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    files = read_byte_level_files(*byte_level_files)
    tokenizer = Tokenizer(models.BPE(vocab=files.vocabulary, merges=files.merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|bos|>"])
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    fast, notice = fast_bpe(tokenizer.to_str(), lambda text: tokenizer.encode(text).ids, True)
    assert fast is not None, notice
    for text in [*TEXTS, *HARD_TEXTS, "a <tool> b<|bos|>c", *random_texts(300)]:
        assert fast.encode(text) == tokenizer.encode(text).ids, repr(text[:60])


def test_without_fastokens_ids_are_equal_and_a_notice_is_given(byte_level_files, monkeypatch) -> None:
    fast = _GPT2BPETokenizer(*byte_level_files)
    monkeypatch.setitem(sys.modules, module.LIBRARY, None)
    slow = _GPT2BPETokenizer(*byte_level_files)
    assert "is not installed (pip install fastokens)" in slow.notice and "\n" not in slow.notice
    texts = [*TEXTS, *HARD_TEXTS]
    for a, b in zip(slow.tokenize_flat(texts), fast.tokenize_flat(texts), strict=True):
        assert a.dtype == b.dtype and a.tolist() == b.tolist()


def test_fastokens_is_not_used_after_other_ids_or_an_error(reference) -> None:
    pytest.importorskip(module.LIBRARY)
    fast, notice = fast_bpe(reference.to_str(), lambda text: [*reference.encode(text).ids, 1])
    assert fast is None and "gives other ids for ''" in notice and "`tokenizers`" in notice
    config = json.loads(reference.to_str())
    config["normalizer"] = {"type": "NoSuchNormalizer"}
    fast, notice = fast_bpe(json.dumps(config), lambda text: reference.encode(text).ids)
    assert fast is None and "cannot take this tokenizer" in notice


def test_texts_that_fastokens_cannot_encode_go_to_the_reference(reference, monkeypatch) -> None:
    """PCRE2 gives up after a number of steps; the limit is lowered here to see it happen."""
    library = pytest.importorskip(module.LIBRARY)
    fast, _ = fast_bpe(reference.to_str(), lambda text: reference.encode(text).ids)

    class Stops:
        def __init__(self, real) -> None:
            self.real = real

        def encode_batch_flat(self, texts, **options):
            if any("stop" in text for text in texts):
                raise RuntimeError("match limit")
            return self.real.encode_batch_flat(texts, **options)

    assert library is importlib.import_module(module.LIBRARY)
    monkeypatch.setattr(fast, "_tokenizer", Stops(fast._tokenizer))
    texts = ["go on", "stop here", "", "stop", "on"]
    ids, lengths = fast.encode_flat(texts)
    expected = [reference.encode(text).ids for text in texts]
    assert ids.tolist() == [index for part in expected for index in part]
    assert lengths.tolist() == [len(part) for part in expected]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_one_thread_is_used_and_the_environment_is_restored(reference, monkeypatch) -> None:
    pytest.importorskip(module.LIBRARY)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    fast, _ = fast_bpe(reference.to_str(), lambda text: reference.encode(text).ids)
    before = len(os.listdir("/proc/self/task"))
    fast.encode_flat(TEXTS * 50)
    assert len(os.listdir("/proc/self/task")) <= before
    assert "RAYON_NUM_THREADS" not in os.environ


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_can_use_the_encoder(byte_level_files) -> None:
    """A pool of threads does not survive a fork; waiting for it would take for ever."""
    tokenizer = _GPT2BPETokenizer(*byte_level_files)
    tokenizer.tokenize_flat(TEXTS)
    child = multiprocessing.get_context("fork").Process(target=tokenizer.tokenize_flat, args=(TEXTS * 20,))
    child.start()
    child.join(timeout=300)
    alive = child.is_alive()
    child.kill()
    assert not alive and child.exitcode == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"model": {"type": "WordPiece"}}, False),
        ({"model": {"type": "BPE", "byte_fallback": True}}, False),
        ({"model": {"type": "BPE", "dropout": 0.1}}, False),
        ({"pre_tokenizer": None}, False),
        ({"pre_tokenizer": {"type": "Metaspace"}}, False),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}],
                }
            },
            True,
        ),
    ],
)
def test_byte_level_bpe_is_recognised(reference, change, expected) -> None:
    assert is_byte_level_bpe(json.loads(reference.to_str()) | change) is expected
