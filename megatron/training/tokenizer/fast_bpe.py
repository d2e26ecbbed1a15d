"""Fast byte-level BPE by the library ``fastokens``, which is compared with ``tokenizers`` before it is used.

``benchmarks/bpe.py`` measures the libraries there are. A tokenizer that ``fastokens`` cannot load, or for
which it gives other ids on a set of hard cases, is run by ``tokenizers``, with a notice.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron.training.tokenizer.base import refuse_lone_surrogates

LIBRARY = "fastokens"

# Where splitters and mergers disagree if they disagree at all: contractions, digits, runs of blanks of all
# kinds, control characters, letters outside ASCII, marks, emoji, very long words, and the text of special
# tokens.
PROBES = (
    "",
    " ",
    "Hello, world! It's 12:34 on 2024-02-29, isn't it? I'VE we'll THEY'RE 's ''d",
    "def f(x_1: int) -> str:\n    return f'{x_1!r:>8}'  # done\n\n\n\tif x:\r\n\r\n\t\tpass",
    "  a   b \n c\n\n d  \t\te   ",
    "\u00a0 \u2003\u3000\u200b\ufeff\u0085\u2028x \u180e",
    "\x00\x01\x1b\x1c\x1f\x7f\x80\x9f",
    "1234567 1,234.5 ½²③ ٣४𝟘 Ⅷ 0xFF 1e-5",
    "naïve Straße ǅ İı ﬁ ΑΣ Привет мир עברית عربي हिन्दी ไทย",
    "中文字 日本語テキスト 한국어 中文abc123",
    "e\u0301a\u0308\u0301 \u0301x" + "\u0300" * 40,
    "😀😃 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 \U0001f9d1\U0001f3fd \U0010ffff \ue000 \ufffd",
    "a" * 300 + "ab" * 200 + " " * 200 + "x" + "\n" * 100 + "=" * 200 + "中" * 100,
    "Pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism",
    "<|endoftext|>a<|endoftext|> <|endoftext|><s>b</s> [CLS] <|im_start|>user <pad>",
    'http://example.com/?a=b&c=d#e%20f user@host.tld C:\\path\\to\\file ~!@#$%^&*()_+{}|:"<>?',
)


class FastBpe:
    """A verified fast encoder that uses one thread. Build it with ``fast_bpe``, in the process that uses it.

    Args:
        tokenizer: ``fastokens.Tokenizer``.
        reference: text to ids by ``tokenizers``; takes the texts on which the fast library stops with an
            error.
        add_special_tokens: as in ``tokenizers``: whether to add what the file's post-processor puts around a
            text.
    """

    def __init__(
        self, tokenizer: Any, reference: Callable[[str], Sequence[int]], add_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._reference = reference
        self._add_special_tokens = add_special_tokens

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end (int32, read-only) and the length of each (int64).

        Raises:
            DataError: a text holds a lone surrogate.
        """
        texts = list(texts)
        try:
            return self._encode(texts)
        except UnicodeEncodeError:
            refuse_lone_surrogates(texts)
            raise
        except (RuntimeError, ValueError):
            # The splitter's step limit, on a text far from any language: only that text is encoded slowly.
            if len(texts) > 1:
                parts = [self.encode_flat([text]) for text in texts]
                return np.concatenate([ids for ids, _ in parts]), np.concatenate([size for _, size in parts])
            ids = np.array(self._reference(texts[0]), dtype=np.int32)
            return ids, np.array([len(ids)], dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_flat([text])[0].tolist()

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=self._add_special_tokens)
        # Ids come as uint32 and offsets as uint64; no vocabulary comes near the sign bits.
        return np.frombuffer(ids, dtype="<i4"), np.diff(np.frombuffer(offsets, dtype="<i8"))


def fast_bpe(
    tokenizer_json: str, reference: Callable[[str], Sequence[int]], add_special_tokens: bool = False
) -> tuple[FastBpe | None, str | None]:
    """The fast encoder for a ``tokenizer.json``, or None and the reason in one line.

    Args:
        tokenizer_json: the file's text, as ``tokenizers.Tokenizer.to_str()`` gives it.
        reference: text to ids by ``tokenizers``; the fast encoder must agree with it on every probe.
        add_special_tokens: whether ``reference`` adds them.
    """
    slow = "; tokenizing with `tokenizers` instead, which is slower and gives the same ids"
    config = json.loads(tokenizer_json)
    if not is_byte_level_bpe(config):
        return None, None
    try:
        library = importlib.import_module(LIBRARY)
    except ImportError:
        return None, f"{LIBRARY} is not installed (pip install {LIBRARY}){slow}"
    config |= {"truncation": None, "padding": None}
    try:
        with _one_thread():
            fast = FastBpe(library.Tokenizer.from_json_str(json.dumps(config)), reference, add_special_tokens)
            wrong = _first_difference(fast, reference, _probes(config))
    except Exception as error:  # whatever this library raises, the slow one still works
        return None, f"{LIBRARY} cannot take this tokenizer ({_short(error)}){slow}"
    if wrong is not None:
        return None, f"{LIBRARY} gives other ids for {_short(repr(wrong))}{slow}"
    return fast, None


def is_byte_level_bpe(config: dict[str, Any]) -> bool:
    """Whether a parsed ``tokenizer.json`` is BPE over bytes, without dropout or byte-fallback tokens."""
    model = config.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return False
    before = config.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _probes(config: dict[str, Any]) -> list[str]:
    """The hard cases, and this tokenizer's added tokens inside and between words."""
    added = [token["content"] for token in config.get("added_tokens") or []][:64]
    return [*PROBES, *(f"x{token}y {token} {token}{token}\n{token}" for token in added)]


def _first_difference(
    fast: FastBpe, reference: Callable[[str], Sequence[int]], probes: Sequence[str]
) -> str | None:
    ids, lengths = fast.encode_flat(probes)
    ends = np.cumsum(lengths)
    for probe, start, end in zip(probes, ends - lengths, ends, strict=True):
        if ids[start:end].tolist() != list(reference(probe)):
            return probe
    return None


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def _one_thread() -> Iterator[None]:
    """The library's thread pool starts with its first batch and reads its size from the environment then."""
    name = "RAYON_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
