"""NullTokenizer: text is ids."""

import pytest

from megatron.core.errors import DataError, NotBuiltYetError
from megatron.training.tokenizer.tokenizer import _NullMultimodalTokenizer, _NullTokenizer


def test_text_is_decimal_ids() -> None:
    tokenizer = _NullTokenizer(500)
    assert tokenizer.tokenize("1 0 500  17\n") == [1, 0, 500, 17]
    assert tokenizer.tokenize("") == []
    assert (tokenizer.vocab_size, tokenizer.eod) == (501, 500)
    assert tokenizer.detokenize([1, 22, 3]) == "1 22 3"
    assert tokenizer.offsets([1, 22, 3], "1 22 3") == [0, 2, 5]
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask) == (-1, -1, -1)
    assert dict(tokenizer.unique_identifiers) == {
        "class": "_NullTokenizer",
        "tokenizer_path": [None],
        "vocab_size": "500",
    }
    with pytest.raises(NotImplementedError):
        tokenizer.vocab  # noqa: B018


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 two 3", "'two' is not an id"),
        ("1.5", "'1.5' is not an id"),
        ("1 501", "id 501 is not between 0 and 500; give --vocab-size of at least 501"),
        ("-1", "id -1 is not between 0 and 500"),
    ],
)
def test_words_that_are_no_id_are_named(text, message) -> None:
    with pytest.raises(DataError, match=message):
        _NullTokenizer(500).tokenize(text)


def test_the_multimodal_tokenizer_is_refused_as_not_built() -> None:
    with pytest.raises(NotBuiltYetError, match="NullMultimodalTokenizer"):
        _NullMultimodalTokenizer(5)
