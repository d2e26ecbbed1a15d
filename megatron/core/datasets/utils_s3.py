"""Reading data sets from S3. boto3 is needed only when an ``s3://`` path is used."""

import os
from typing import Any, NamedTuple, Protocol

from megatron.core.errors import DataError

S3_PREFIX = "s3://"


class S3Config(NamedTuple):
    """Where index files are kept locally, and how many bytes of a .bin one request fetches."""

    path_to_idx_cache: str
    bin_chunk_nbytes: int = 256 * 1024 * 1024


class S3Client(Protocol):
    """The part of a boto3 S3 client that is used here."""

    def download_file(self, Bucket: str, Key: str, Filename: str) -> None: ...

    def upload_file(self, Filename: str, Bucket: str, Key: str) -> None: ...

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]: ...

    def get_object(self, Bucket: str, Key: str, Range: str) -> dict[str, Any]: ...

    def close(self) -> None: ...


def make_s3_client(path: str) -> S3Client:
    """A boto3 client.

    Raises:
        DataError: boto3 is not installed.
    """
    try:
        import boto3  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{path} is on S3 and reading it needs boto3, which is not installed. "
            "Type: pip install boto3 (or copy the .bin and .idx files to a local disk)."
        ) from error
    return boto3.client("s3")


def is_s3_path(path: str) -> bool:
    """True for ``s3://...``."""
    return path.startswith(S3_PREFIX)


def parse_s3_path(path: str) -> tuple[str, str]:
    """``s3://bucket/some/key`` -> ("bucket", "some/key")."""
    if not is_s3_path(path):
        raise DataError(f"{path!r} is not an S3 path; S3 paths look like s3://bucket/some/prefix.")
    bucket, _, key = path[len(S3_PREFIX) :].partition("/")
    return bucket, key


def object_exists(client: S3Client, path: str) -> bool:
    """Ask S3 for the object's head; False when there is no such object."""
    from botocore.exceptions import ClientError  # pyright: ignore[reportMissingImports]

    bucket, key = parse_s3_path(path)
    try:
        client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
            return False
        raise
    return True


def object_size(client: S3Client, path: str) -> int:
    """Bytes of the object."""
    bucket, key = parse_s3_path(path)
    return int(client.head_object(Bucket=bucket, Key=key)["ContentLength"])


def cache_index_path(prefix: str, config: S3Config) -> str:
    """Local path of the index of an S3 data set: cache directory / bucket / key.idx."""
    bucket, key = parse_s3_path(prefix + ".idx")
    return os.path.join(config.path_to_idx_cache, bucket, key)


def maybe_download_file(s3_path: str, local_path: str) -> None:
    """Download on the first process of each machine unless the file is there; the others wait for it.

    The file appears under its final name only when it is complete.
    """
    import torch.distributed as dist

    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if several else 0
    if local_rank == 0 and not os.path.exists(local_path):
        bucket, key = parse_s3_path(s3_path)
        os.makedirs(os.path.dirname(local_path) or ".", exist_ok=True)
        partial = f"{local_path}.partial-{os.getpid()}"
        client = make_s3_client(s3_path)
        try:
            client.download_file(bucket, key, partial)
            os.replace(partial, local_path)
        finally:
            if os.path.exists(partial):
                os.unlink(partial)
            client.close()
    if several:
        dist.barrier()
