"""Parquet files: the wanted columns, in Arrow record batches of about one block."""

from collections.abc import Iterator
from typing import Any

from megatron.core.errors import ConfigError, DataError
from megatron.training.preprocessing.blocks import ArrowRows, Block
from megatron.training.preprocessing.inputs import InputFile


def parquet_blocks(index: int, file: InputFile, keys: list[str], block_bytes: int) -> Iterator[Block]:
    """Blocks of a parquet file; other columns than ``keys`` are not read.

    Raises:
        DataError: the file is not parquet, lacks a column or has no rows.
        ConfigError: pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{file.path}: reading parquet needs the package pyarrow: pip install pyarrow"
        ) from error
    try:
        table = parquet.ParquetFile(file.path)
        _check(table, file.path, keys)
        columns = list(dict.fromkeys(keys))
        done = 0
        for group in range(table.num_row_groups):
            rows = _rows_per_block(table.metadata.row_group(group), columns, block_bytes)
            for batch in table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                done += batch.num_rows
                end = file.size_bytes * done // table.metadata.num_rows
                yield Block(index, ArrowRows(_stream(pyarrow, batch)), end)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file.path}: this parquet file cannot be read: {error}") from error


def _check(table: Any, path: str, keys: list[str]) -> None:
    present = table.schema_arrow.names
    for key in keys:
        if key not in present:
            raise DataError(f"{path}: there is no column '{key}'; columns here: {', '.join(present)}")
    if table.metadata.num_rows == 0:
        raise DataError(f"{path}: the file has no rows; leave it out, or give it at least one document")


def _rows_per_block(group: Any, columns: list[str], block_bytes: int) -> int:
    """Rows that make about one block, from the uncompressed size of the wanted columns."""
    chunks = (group.column(i) for i in range(group.num_columns))
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    row_bytes = sum(chunk.total_uncompressed_size for chunk in wanted) / max(1, group.num_rows)
    return max(1, min(group.num_rows, int(block_bytes / max(1.0, row_bytes))))


def _stream(pyarrow: Any, batch: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def columns_of(stream: bytes, keys: list[str]) -> list[list[Any]]:
    """Back to Python values, one list for each key.  Raises UnicodeDecodeError for a string not in UTF-8."""
    import pyarrow

    table = pyarrow.ipc.open_stream(pyarrow.py_buffer(stream)).read_all()
    return [table.column(key).to_pylist() for key in keys]
