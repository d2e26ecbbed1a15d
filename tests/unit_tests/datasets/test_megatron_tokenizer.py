"""The tokenizer base class: identity and missing abilities."""

import json

import pytest

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer


class Letters(MegatronTokenizer):
    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    vocab = property(lambda self: {chr(i): i for i in range(128)})
    inv_vocab = property(lambda self: {i: chr(i) for i in range(128)})
    vocab_size = property(lambda self: 128)


def test_unique_description_lists_all_arguments():
    tokenizer = Letters("a.json", None, lower=True, extra=3)
    expected = {"class": "Letters", "tokenizer_path": ["a.json", None], "lower": "True", "extra": "3"}
    assert list(tokenizer.unique_identifiers.items()) == list(expected.items())
    assert tokenizer.unique_description == json.dumps(expected, indent=4)


def test_batches():
    assert Letters().tokenize_batch(["ab", ""]) == [[97, 98], []]


@pytest.mark.parametrize("name", ["cls", "sep", "pad", "eod", "bos", "eos", "mask"])
def test_missing_ids(name):
    with pytest.raises(NotImplementedError, match=f"Letters has no '{name}'"):
        getattr(Letters(), name)


def test_missing_abilities():
    for call in (lambda t: t.detokenize([1]), lambda t: t.offsets([1], "a")):
        with pytest.raises(NotImplementedError):
            call(Letters())
    with pytest.raises(TypeError):
        MegatronTokenizer()
