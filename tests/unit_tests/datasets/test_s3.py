"""Reading from S3, against a client that serves a local directory."""

import io
import sys
import types
from pathlib import Path

import pytest

from megatron.core.datasets import utils_s3
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils_s3 import S3Config, is_s3_path, object_exists, parse_s3_path
from megatron.core.errors import ConfigError, DataError


class ClientError(Exception):
    def __init__(self, code: str):
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


class LocalClient:
    """The S3 calls that are used, on files under ``root``/bucket."""

    requests: list

    def __init__(self, root: Path):
        self.root = root

    def download_file(self, Bucket: str, Key: str, Filename: str) -> None:
        self.requests.append("download")
        Path(Filename).write_bytes((self.root / Bucket / Key).read_bytes())

    def head_object(self, Bucket: str, Key: str) -> dict:
        path = self.root / Bucket / Key
        if not path.exists():
            raise ClientError("404")
        return {"ContentLength": path.stat().st_size}

    def get_object(self, Bucket: str, Key: str, Range: str) -> dict:
        self.requests.append(Range)
        first, last = map(int, Range.removeprefix("bytes=").split("-"))
        return {"Body": io.BytesIO((self.root / Bucket / Key).read_bytes()[first : last + 1])}

    def close(self) -> None:
        pass


@pytest.fixture
def bucket(data, monkeypatch):
    """The golden data as s3://data/; yields the list of requests."""
    boto3 = types.SimpleNamespace(client=lambda service: LocalClient(data.parent))
    exceptions = types.SimpleNamespace(ClientError=ClientError)
    monkeypatch.setitem(sys.modules, "boto3", boto3)
    monkeypatch.setitem(sys.modules, "botocore", types.SimpleNamespace(exceptions=exceptions))
    monkeypatch.setitem(sys.modules, "botocore.exceptions", exceptions)
    LocalClient.requests = []
    return LocalClient.requests


@pytest.mark.parametrize("block", [7, 64, 10**6])
def test_same_sequences(bucket, data, tmp_path, block):
    local = IndexedDataset(str(data / "multi"))
    config = S3Config(str(tmp_path), block)
    remote = IndexedDataset("s3://data/multi", mmap=False, s3_config=config)
    assert [remote[i].tolist() for i in range(len(remote))] == [local[i].tolist() for i in range(len(local))]
    assert (tmp_path / "data" / "multi.idx").exists()
    blocks = len(bucket) - 1  # the first request fetched the index
    assert blocks == {7: 13, 64: 3, 10**6: 1}[block]
    IndexedDataset("s3://data/multi", mmap=False, s3_config=config)
    assert bucket.count("download") == 1


def test_what_s3_needs(bucket, tmp_path):
    for settings in ({"mmap": True, "s3_config": S3Config(str(tmp_path))}, {"mmap": False}):
        with pytest.raises(ConfigError, match=r"s3_cache_path.*mmap_bin_files off"):
            IndexedDataset("s3://data/multi", **settings)


def test_boto3_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(DataError, match="pip install boto3"):
        IndexedDataset("s3://data/multi", mmap=False, s3_config=S3Config(str(tmp_path)))


def test_paths(bucket):
    assert is_s3_path("s3://b/k/x")
    assert not is_s3_path("/s3/b")
    assert parse_s3_path("s3://b/k/x.idx") == ("b", "k/x.idx")
    with pytest.raises(DataError, match="is not an S3 path"):
        parse_s3_path("b/k")
    client = utils_s3.make_s3_client("s3://data/multi.idx")
    assert object_exists(client, "s3://data/multi.idx")
    assert not object_exists(client, "s3://data/none.idx")
    assert IndexedDataset.exists("s3://data/multi")
    assert not IndexedDataset.exists("s3://data/cases")
    assert S3Config("c").bin_chunk_nbytes == 256 * 1024 * 1024
