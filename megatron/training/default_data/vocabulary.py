"""A byte-level BPE in GPT-2's file format, trained on a corpus."""

from collections.abc import Iterable
from pathlib import Path

VOCABULARY_SIZE = 4096
END_OF_DOCUMENT = "<|endoftext|>"


def train_vocabulary(texts: Iterable[str], directory: Path, size: int = VOCABULARY_SIZE) -> int:
    """Write ``vocab.json`` and ``merges.txt`` to ``directory``; returns the number of tokens.

    The 256 bytes and the end-of-document token are always in, so any text has ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.save(str(directory))
    return tokenizer.get_vocab_size()
