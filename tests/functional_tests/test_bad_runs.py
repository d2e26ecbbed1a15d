"""Every bad input ends at once with one message that names cause and remedy, and destroys nothing."""

import json
import shutil

import numpy as np
import pytest

from launcher import pretrain_gpt, tiny_gpt


def fails(words, tmp_path, *expected, status=None, env=None):
    """The run fails with one readable error: every expected text, no traceback."""
    run = pretrain_gpt(words, tmp_path, env=env)
    assert run.status not in (0, None), run.output
    if status is not None:
        assert run.status == status, run.output
    assert "Traceback" not in run.output, run.output
    assert "error" in run.output
    for text in expected:
        assert str(text) in run.output, f"{text!r} is missing from:\n{run.output}"
    return run


@pytest.fixture
def dataset(golden, tmp_path):
    """A copy of a small data set that a test may damage; returns its prefix."""
    prefix = tmp_path / "data" / "corpus_text_document"
    prefix.parent.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(golden / "data" / f"u16_text_document{suffix}", f"{prefix}{suffix}")
        prefix.with_suffix(suffix).chmod(0o644)
    return prefix


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_index_file_is_named(golden, tmp_path, dataset, suffix):
    dataset.with_suffix(suffix).unlink()
    fails(tiny_gpt(golden, tmp_path, data_path=dataset), tmp_path, dataset.with_suffix(suffix))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_data_set_is_named(golden, tmp_path, dataset, suffix):
    path = dataset.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fails(tiny_gpt(golden, tmp_path, data_path=dataset), tmp_path, path, "bytes")


def test_index_file_with_wrong_magic_is_named(golden, tmp_path, dataset):
    path = dataset.with_suffix(".idx")
    path.write_bytes(b"NOTANIDX\0" + path.read_bytes()[9:])
    fails(tiny_gpt(golden, tmp_path, data_path=dataset), tmp_path, path)


def test_token_beyond_the_vocabulary_is_named(golden, tmp_path):
    expected = ("u16_text_document", "in document ", "the vocabulary has 101 ids")
    fails(tiny_gpt(golden, tmp_path, vocab_size=100), tmp_path, *expected)


def test_token_id_of_the_padding_is_named(golden, tmp_path, dataset):
    # 501 ids are padded to 512: the table has a row for 505, which is no token.
    tokens = np.fromfile(f"{dataset}.bin", dtype=np.uint16)
    tokens[:] = 505
    tokens.tofile(f"{dataset}.bin")
    expected = (f"{dataset} holds token id 505 in document", "the vocabulary has 501 ids")
    fails(tiny_gpt(golden, tmp_path, data_path=dataset), tmp_path, *expected)
    run = pretrain_gpt(tiny_gpt(golden, tmp_path, data_path=dataset, vocab_size=505), tmp_path)
    assert len(run.check().losses) == 8


def test_corpus_too_short_for_one_sample_is_named(golden, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "five"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(np.arange(5, dtype=np.uint16), [5])
    builder.finalize(f"{prefix}.idx")
    fails(tiny_gpt(golden, tmp_path, data_path=prefix, split="100,0,0"), tmp_path, prefix, "token")


def test_unwritable_save_directory_is_refused(golden, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    run = fails(
        tiny_gpt(golden, tmp_path, save=blocked / "ckpt", save_interval=4), tmp_path, blocked / "ckpt"
    )
    assert "iteration        1/" not in run.output, "found out only after training"
    assert blocked.read_text() == "not a directory"


def test_truncated_checkpoint_is_refused(golden, tmp_path):
    words = tiny_gpt(golden, tmp_path, save=tmp_path / "ckpt", load=tmp_path / "ckpt", save_interval=4)
    pretrain_gpt(words, tmp_path).check()
    path = tmp_path / "ckpt" / "iter_0000008" / "mp_rank_00" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fails(words, tmp_path, path, "--ckpt-step 4")


def test_checkpoint_of_another_model_is_refused(golden, tmp_path):
    save = tmp_path / "ckpt"
    pretrain_gpt(tiny_gpt(golden, tmp_path, save=save, save_interval=8), tmp_path).check()
    fails(tiny_gpt(golden, tmp_path, load=save, num_layers=3), tmp_path, "num_layers", "2", "3")


def test_nan_loss_names_rank_and_iteration(golden, tmp_path):
    run = fails(tiny_gpt(golden, tmp_path, lr=1e30, clip_grad=0.0), tmp_path, "Rank 0", "iteration", status=1)
    assert "found NaN" in run.output or "found Inf" in run.output


def test_missing_tokenizer_file_is_named(golden, tmp_path):
    words = tiny_gpt(
        golden,
        tmp_path,
        tokenizer_type="GPT2BPETokenizer",
        vocab_size=None,
        vocab_file=tmp_path / "vocab.json",
        merge_file=tmp_path / "merges.txt",
    )
    fails(words, tmp_path, tmp_path / "vocab.json")


def test_all_argument_errors_come_at_once(golden, tmp_path):
    words = tiny_gpt(golden, tmp_path, num_attention_heads=5, seq_length=64, min_lr=1.0)
    run = fails([*words, "--hiden-dropout", "0.1"], tmp_path, "--hidden-dropout", status=2)
    for flag in ("--num-attention-heads", "--max-position-embeddings", "--min-lr"):
        assert flag in run.output, run.output


def test_per_split_data_without_a_split_is_refused(golden, tmp_path):
    table = tmp_path / "splits.json"
    table.write_text(json.dumps({"train": [str(golden / "data" / "u16_text_document")]}))
    words = tiny_gpt(golden, tmp_path, data_path=None, split=None, per_split_data_args_path=table)
    fails(words, tmp_path, table, "valid")
