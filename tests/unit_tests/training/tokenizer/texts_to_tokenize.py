"""Texts for training tiny tokenizers, and texts on which tokenizers differ if they differ at all."""

import argparse
import textwrap
from pathlib import Path

TEXTS = [
    Path(argparse.__file__).read_text(encoding="utf-8"),
    Path(textwrap.__file__).read_text(encoding="utf-8"),
    "été naïve Straße Привет мир 中文字 日本語 한국어 عربي हिन्दी 😀 👩‍👩‍👧 e\u0301 \u00a0 " * 20,
    "Hello, world! It's 12:34, isn't it? They're here; we'll see. " * 20,
]

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "   \n\n  \t x  y ",
    "line\r\nline\r\n\r\nline\rx",
    "Hello, world! It's 12:34, isn't it? I'VE",
    "def f(x):\n    return x  # été\n\n\n",
    "\x00\x01\x1b\x1c\x7f\x80\x85 \u2028\u3000\u200b\ufeff x",
    "été naïve Straße Привет мир 中文字 日本語 한국어 عربي हिन्दी ไทย",
    "😀 👩‍👩‍👧‍👦 🇩🇪 \U0001f9d1\U0001f3fd \U0010ffff \ue000 \ufffd e\u0301\u0308",
    "a" * 2000,
    "ab " * 500 + " " * 500 + "x" + "\n" * 300,
    "½ ² ٣ ४ Ⅷ 1234567 1,234.56",
    "x<|endoftext|>y <|endoftext|> <|endoftext|><|endoftext|>",
]
