"""Samples of a fixed number of tokens for language models."""

import logging
import os
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.gpt_index import (
    _build_document_index,  # noqa: F401  (also importable from here)
    _build_shuffle_index,  # noqa: F401
    build_gpt_index,
    find_index_fault,
    plan_epochs,
)
from megatron.core.datasets.index_cache import IndexCache
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.datasets.utils import Split
from megatron.core.datasets.utils_s3 import S3Config, is_s3_path
from megatron.core.errors import ConfigError, DataError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

_NO_PAD_ID = -1
_INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")


@dataclass
class GPTDatasetConfig(BlendedMegatronDatasetConfig):
    """GPT data set settings; ``tokenizer`` and the first three are required.

    Args:
        reset_position_ids: positions start from 0 again after an end-of-document token.
        reset_attention_mask: tokens after an end-of-document token do not see it or what is before.
        eod_mask_loss: no loss where the input is an end-of-document token.
        create_attention_mask: samples hold ``attention_mask``.
        drop_last_partial_validation_sequence: drop the last, short validation sample, else pad it.
        add_extra_token_to_sequence: read one token more, so that every input has a label; else the
            labels are the inputs moved by one, and the last has none.
        s3_cache_path: directory for index files of data sets on S3.
        vocab_size: number of ids that are tokens; others in the data are an error, also those that only pad
            the embedding table. None: unchecked.
            Not part of the cache key.
    """

    reset_position_ids: bool | None = None
    reset_attention_mask: bool | None = None
    eod_mask_loss: bool | None = None
    create_attention_mask: bool = True
    drop_last_partial_validation_sequence: bool = True
    add_extra_token_to_sequence: bool = True
    s3_cache_path: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        required = ("tokenizer", "reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        missing = [name for name in required if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"GPTDatasetConfig needs {', '.join(missing)}.")


class GPTDataset(MegatronDataset):
    """GPT samples: all sequences of a split laid end to end and cut into equal pieces.

    A sample is a dictionary of ``tokens`` and ``labels`` (int64 [s]), ``loss_mask`` (float32 [s]),
    ``position_ids`` (int64 [s]) and, unless switched off, ``attention_mask`` (bool [1, s, s], True masks).

    Raises:
        DataError: too few tokens for one sample, or no write access for the index.
    """

    config: GPTDatasetConfig
    dataset: IndexedDataset

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        assert config.tokenizer is not None, "the config checks it"
        self._extra = int(config.add_extra_token_to_sequence)
        try:
            self._pad_token_id = config.tokenizer.pad
        except (NotImplementedError, AttributeError):
            self._pad_token_id = _NO_PAD_ID
        uses_eod = config.reset_position_ids or config.reset_attention_mask or config.eod_mask_loss
        self._eod_token_id = config.tokenizer.eod if uses_eod else None
        self._causal_mask: Tensor | None = None
        self.document_index, self.sample_index, self.shuffle_index = self._load_or_build_index()

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Number of sequences; the document boundaries of the file are ignored."""
        return len(low_level_dataset.sequence_lengths)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        """Open ``dataset_path``.bin and .idx."""
        s3_config = None
        if is_s3_path(dataset_path) and config.s3_cache_path is not None:
            s3_config = S3Config(path_to_idx_cache=config.s3_cache_path)
        return IndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files, s3_config=s3_config)

    def __len__(self) -> int:
        """Number of samples: all of the passes over the data, so it may exceed ``num_samples``."""
        return len(self.shuffle_index)

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """Sample ``idx``; for None, sample 0 without any loss (it fills up batches).

        Raises:
            DataError: a token id that is not below ``config.vocab_size``.
        """
        text = torch.from_numpy(self._read_tokens(0 if idx is None else idx))  # int64 [s + extra]
        length = self.config.sequence_length
        if self._extra:
            tokens, labels = text[:length].contiguous(), text[1:].contiguous()
        else:
            tokens, labels = text, torch.roll(text, shifts=-1, dims=0)
            labels[-1] = self._pad_token_id
        is_eod = (
            torch.zeros(length, dtype=torch.bool)
            if self._eod_token_id is None
            else tokens == self._eod_token_id
        )
        loss_mask = torch.ones(length, dtype=torch.float32)
        if self.config.eod_mask_loss:
            loss_mask[is_eod] = 0.0
        loss_mask[labels == self._pad_token_id] = 0.0
        if idx is None:
            loss_mask.zero_()
        sample = {
            "tokens": tokens.masked_fill(tokens == self._pad_token_id, 0),
            "labels": labels.masked_fill(labels == self._pad_token_id, 0),
        }
        if self.config.create_attention_mask:
            sample["attention_mask"] = self._attention_mask(is_eod)
        sample["loss_mask"] = loss_mask
        resets = self.config.reset_position_ids
        sample["position_ids"] = document_position_ids(is_eod) if resets else torch.arange(length)
        return sample

    def _attention_mask(self, is_eod: Tensor) -> Tensor:
        if self._causal_mask is None:
            self._causal_mask = causal_mask(self.config.sequence_length)
        if self.config.reset_attention_mask:
            return document_attention_mask(is_eod, self._causal_mask)
        return self._causal_mask

    def _read_tokens(self, idx: int) -> np.ndarray:
        """Tokens of sample ``idx``, padded at the end. int64 [s + extra]"""
        row = self.shuffle_index[idx]
        (first, start), (last, stop) = self.sample_index[row].tolist(), self.sample_index[row + 1].tolist()
        documents = self.document_index[first : last + 1].tolist()
        parts = []
        for place, document in enumerate(documents, first):
            begin = start if place == first else 0
            length = stop + self._extra - begin if place == last else None
            parts.append(self.dataset.get(document, offset=begin, length=length))
        wanted = self.config.sequence_length + self._extra
        text = np.full(wanted, self._pad_token_id, dtype=np.int64)
        filled = sum(map(len, parts))
        np.concatenate(parts, out=text[:filled], casting="unsafe")
        place = self._first_outside_vocabulary(text[:filled])
        if place is not None:
            part = int(np.searchsorted(np.cumsum(list(map(len, parts))), place, side="right"))
            self._refuse_id(int(text[place]), documents[part], idx)
        return text

    def _first_outside_vocabulary(self, ids: np.ndarray) -> int | None:
        """Ids are compared as unsigned numbers, so that one pass also finds negative ones."""
        limit, unsigned = self.config.vocab_size, ids.view(np.uint64)
        if limit is None or not len(ids) or unsigned.max() < limit:
            return None
        return int(np.argmax(unsigned >= limit))

    def _refuse_id(self, bad: int, document: int, idx: int) -> NoReturn:
        raise DataError(
            f"{self.dataset_path} holds token id {bad} in document {document} ({self.index_split.name} "
            f"sample {idx}), but the vocabulary has {self.config.vocab_size} ids. Give "
            "GPTDatasetConfig.tokenizer the tokenizer that the data was made with, or make the data again "
            "with tools/preprocess_data.py."
        )

    def _load_or_build_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three index arrays; see ``gpt_index``."""
        sizes = self.dataset.sequence_lengths
        drop_last_partial = (
            self.index_split is not Split.valid or self.config.drop_last_partial_validation_sequence
        )
        length = self.config.sequence_length
        tokens = int(sizes[self.indices].sum(dtype=np.int64))
        if self.num_samples != 0:
            self._check_enough_tokens(tokens, drop_last_partial)
        plan = plan_epochs(tokens, self.num_samples, length, self._extra, drop_last_partial)
        cache = self._cache()
        arrays = cache and cache.load(
            lambda *found: find_index_fault(sizes, self.indices, plan, self._extra, *found)
        )
        if not arrays:
            self.built_anew_on_cache_miss = True
            arrays = build_gpt_index(
                sizes, self.indices, plan, self.config.random_seed, length, self._extra, drop_last_partial
            )
            if cache and self.config.writes_index():
                cache.store(arrays)
        log_single_rank(
            logger,
            logging.INFO,
            f"{self.index_split.name} split: {plan.samples} samples of {length} tokens in {plan.epochs} "
            f"epoch(s), index {'built' if self.built_anew_on_cache_miss else 'found in the cache'}",
        )
        documents, samples, shuffle = arrays
        return documents, samples, shuffle

    def _check_enough_tokens(self, tokens: int, drop_last_partial: bool) -> None:
        """One pass must hold a whole sample to train on; smaller evaluation splits are repeated."""
        needed = self.config.sequence_length + self._extra if drop_last_partial else self._extra + 1
        if tokens >= needed:
            return
        split = self.index_split.name
        fact = (
            f"the {split} split of {self.dataset_path} holds {tokens} tokens in {len(self.indices)} "
            f"sequences, fewer than the {needed} of a sample of sequence length {self.config.sequence_length}"
        )
        if tokens == 0 or self.num_samples is None or self.index_split is Split.train:
            raise DataError(
                f"{fact}. Use more data, a larger share in its split, or a shorter sequence_length."
            )
        log_single_rank(logger, logging.WARNING, f"{fact}: its text is repeated within each sample")

    def _cache(self) -> IndexCache | None:
        """Where the index is kept; None for mock data without a cache directory."""
        directory = self.config.path_to_cache
        if directory is None:
            if self.config.mock or self.dataset_path is None:
                return None
            directory = os.path.join(self.dataset_path, "cache", f"{type(self).__name__}_indices")
        stem = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        return IndexCache(directory, stem, self.unique_description, _INDEX_NAMES)


class MockGPTLowLevelDataset:
    """Made-up sequences, the same in every run: 1, 2, ..., n - 1, end-of-document, with n in 1 ... 4095."""

    seed = 0
    size = 100_000
    max_sequence_length = 4096

    def __init__(self, tokenizer: MegatronTokenizer) -> None:
        self.tokenizer = tokenizer
        random = np.random.default_rng(seed=self.seed)
        self.sequence_lengths = random.integers(1, self.max_sequence_length, size=self.size, dtype=np.int32)

    def __len__(self) -> int:
        """Number of sequences."""
        return self.size

    def __getitem__(self, idx: int) -> np.ndarray:
        """Sequence ``idx``, int64."""
        sequence = np.arange(1, int(self.sequence_lengths[idx]) + 1, dtype=np.int64)
        sequence[-1] = self.tokenizer.eod
        return sequence

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Part of sequence ``idx``."""
        stop = None if length is None else offset + length
        return self[idx][offset:stop]


class MockGPTDataset(GPTDataset):
    """GPT samples of made-up text."""

    def __init__(
        self,
        dataset: MockGPTLowLevelDataset,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)

    def _refuse_id(self, bad: int, document: int, idx: int) -> NoReturn:
        largest = MockGPTLowLevelDataset.max_sequence_length - 2  # the last of a sequence is its end
        raise DataError(
            f"the mock data holds token id {bad}, but the vocabulary has {self.config.vocab_size} ids; its "
            f"ids go up to {largest}: set vocab_size to {largest + 1} or more"
        )

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: MockGPTLowLevelDataset) -> int:
        """Number of sequences."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: GPTDatasetConfig) -> MockGPTLowLevelDataset:
        """The made-up sequences; ``dataset_path`` is ignored."""
        assert config.tokenizer is not None, "the config checks it"
        return MockGPTLowLevelDataset(config.tokenizer)


def causal_mask(length: int) -> Tensor:
    """bool [1, length, length]; True masks: column j from row i < j."""
    return torch.ones((1, length, length), dtype=torch.bool).triu_(1)


def document_attention_mask(is_eod: Tensor, causal: Tensor) -> Tensor:
    """Causal mask that also masks everything up to an end-of-document token from what follows it.

    Args:
        is_eod: bool [s]
        causal: bool [1, s, s]
    """
    # An end-of-document token belongs to the document it ends: count those strictly before.
    document = torch.cumsum(is_eod, dim=0) - is_eod.long()  # [s]
    return causal | (document[:, None] != document[None, :])  # [1, s, s] | [s, s] -> [1, s, s]


def document_position_ids(is_eod: Tensor) -> Tensor:
    """Positions that start from 0 again after every end-of-document token. bool [s] -> int64 [s]."""
    position = torch.arange(len(is_eod))
    start = torch.zeros_like(position)
    start[1:] = torch.where(is_eod[:-1], position[1:], 0)
    return position - torch.cummax(start, dim=0).values
