"""Sentence splitting with NLTK's punkt, for ``--split-sentences``."""

from collections.abc import Callable

from megatron.core.errors import ConfigError

Splitter = Callable[[str], list[str]]

# Punkt keeps lists as long as its text; Megatron cuts the text at this many characters, sentence end or not.
_PIECE_CHARACTERS = 1_000_000


def load_splitter(language: str, keep_newlines: bool) -> Splitter:
    """A function that cuts a text into sentences.

    Args:
        language: name of a punkt model, such as "english".
        keep_newlines: leave the white space between two sentences at the end of the first one; otherwise
            it is dropped.

    Raises:
        ConfigError: NLTK or its model for this language is missing.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ConfigError(
            "--split-sentences needs the package nltk, 3.9 or newer: pip install nltk"
        ) from error
    try:
        punkt = PunktTokenizer(language)
    except (LookupError, OSError) as error:
        raise ConfigError(
            f"--split-sentences --lang {language}: NLTK has no punkt model of that name. Get the models with "
            "'python -m nltk.downloader punkt_tab', or set NLTK_DATA to the directory that holds "
            f"tokenizers/punkt_tab/{language} (the older .pickle models are not read: a pickle can run code)"
        ) from error

    def split(text: str) -> list[str]:
        pieces = (text[i : i + _PIECE_CHARACTERS] for i in range(0, len(text), _PIECE_CHARACTERS))
        return [sentence for piece in pieces for sentence in _sentences(piece)]

    def _sentences(piece: str) -> list[str]:
        spans = list(punkt.span_tokenize(piece))
        if keep_newlines:
            following = [*(start for start, _ in spans[1:]), spans[-1][1]] if spans else []
            return [piece[start:end] for (start, _), end in zip(spans, following, strict=True)]
        return [piece[start:end] for start, end in spans]

    return split
