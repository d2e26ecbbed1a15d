"""One builder per set of ranks that share files; unequal copies are found. "Hosts" are directories here."""

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.index_cache import IndexCache
from megatron.training.shared_storage import storage_domain
from megatron.training.tokenizer.null import _NullTokenizer
from tests.distributed.pool import run_ranks

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "data"
READERS = (1, 2, 3)


def host_of(rank: int) -> str:
    return f"host{rank // 2}"


def build(root: str, blend: int, domain_of) -> tuple[list[int], list[int] | None, list[str]]:
    """Samples read on this rank, and the cache files it wrote; ranks 0, 1 and 2, 3 are a host each."""
    rank = dist.get_rank()
    home = os.path.join(root, host_of(rank))
    prefixes = [os.path.join(home, f"data{number}") for number in range(blend)]
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=32,
        blend=(prefixes, [1.0] * blend if blend > 1 else None),
        split="90,10",
        path_to_cache=os.path.join(home, "cache"),
        tokenizer=_NullTokenizer(500),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    config.storage_domain = domain_of(rank)
    written = []
    original = IndexCache.store
    IndexCache.store = lambda self, arrays: written.append(self.stem) or original(self, arrays)
    try:
        train, valid, test = BlendedMegatronDatasetBuilder(
            GPTDataset, [40, 4, 0], lambda: rank in READERS, config
        ).build()
    finally:
        IndexCache.store = original
    assert test is None and (valid is None) == (train is None)
    return None if train is None else [train[i]["tokens"].tolist() for i in range(20)], written


def by_host(rank: int) -> int:
    return rank // 2 * 2


def all_share(rank: int) -> int:
    return 0


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    for host in ("host0", "host1"):
        (tmp_path / host).mkdir()
        for number in range(2):
            for suffix in ("bin", "idx"):
                source = GOLDEN / f"u16_text_document.{suffix}"
                shutil.copy(source, tmp_path / host / f"data{number}.{suffix}")
    return tmp_path


@pytest.mark.parametrize(("blend", "entries"), [(1, 2), (2, 6)])
def test_the_first_reader_of_every_host_builds(blend: int, entries: int, hosts: Path):
    results = run_ranks(4, build, str(hosts), blend, by_host)
    samples, written = zip(*results, strict=True)
    assert samples[0] is None and samples[1] == samples[2] == samples[3]
    assert [len(names) for names in written] == [0, entries, entries, 0]
    for host in ("host0", "host1"):
        assert len(list((hosts / host / "cache").glob("*-description.txt"))) == entries


def test_one_builder_where_all_share(hosts: Path):
    shutil.rmtree(hosts / "host1")
    (hosts / "host1").symlink_to(hosts / "host0")
    written = [names for _, names in run_ranks(4, build, str(hosts), 1, all_share)]
    assert [len(names) for names in written] == [0, 2, 0, 0]


@pytest.mark.parametrize(
    ("change", "part"), [("idx", ".idx "), ("bin", "bytes of .bin"), ("gone", "No such")]
)
def test_unequal_copies_are_named_on_every_rank(change: str, part: str, hosts: Path):
    other = hosts / "host1"
    if change == "gone":
        (other / "data0.idx").unlink()
    else:
        path = other / f"data0.{change}"
        content = bytearray(path.read_bytes())
        path.write_bytes(content[:-8] if change == "bin" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AssertionError) as failure:
        run_ranks(4, build, str(hosts), 1, by_host)
    text = str(failure.value)
    assert text.count("DataError: copies of a data set differ between hosts that share no storage") == 4
    assert f"{hosts}/host0/data0 (rank 1)" in text and f"{hosts}/host1/data0 (rank 2)" in text
    assert part in text


class Settings:
    """What ``storage_domain`` reads of the arguments."""

    def __init__(self, cache: str, no_shared_storage: bool):
        self.data_cache_path, self.no_shared_storage = cache, no_shared_storage


def find_out(root: str, separate: bool, nodes: int, forced: bool) -> int:
    rank = dist.get_rank()
    os.environ.update(GROUP_RANK=str(rank * nodes // 4), LOCAL_RANK=str(rank % (4 // nodes)))
    directory = os.path.join(root, os.environ["GROUP_RANK"]) if separate else root
    try:
        return storage_domain(Settings(directory, forced), ["unused"])
    finally:
        del os.environ["GROUP_RANK"]


@pytest.mark.parametrize(
    ("separate", "nodes", "forced", "domains"),
    [
        (True, 2, False, [0, 0, 2, 2]),
        (False, 2, False, [0, 0, 0, 0]),
        (False, 2, True, [0, 0, 2, 2]),
        (False, 1, True, [0, 0, 0, 0]),
    ],
)
def test_ranks_find_out_who_shares(separate, nodes, forced, domains, tmp_path: Path):
    for node in range(2):
        (tmp_path / str(node)).mkdir()
    found = run_ranks(4, find_out, str(tmp_path), separate, nodes, forced)
    assert [found.index(number) for number in found] == domains
    assert not list(tmp_path.rglob(".shared_by*"))
