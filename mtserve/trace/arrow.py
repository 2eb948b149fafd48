"""pyarrow, imported only when a Parquet file is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtserve.errors import FailedPrecondition, InvalidArgument


def pyarrow() -> Any:
    """The pyarrow module with its parquet part. Raises FailedPrecondition naming the extra that brings it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise FailedPrecondition(
            "Parquet files need pyarrow; install mtserve with the extra [trace]: pip install 'mtserve[trace]'",
            field="pyarrow",
        ) from None
    return pa


def open_parquet(path: Path, row_group_bytes: int) -> Any:
    """A pyarrow ParquetFile none of whose row groups is larger than `row_group_bytes` uncompressed.

    Raises InvalidArgument naming the file, and the row group that is too large.
    """
    pa = pyarrow()
    try:
        file = pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgument(f"{path}: not a Parquet file: {error}"[:300], field="path") from None
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        # Encoded runs may stand for far more values than their bytes suggest.
        values = sum(group.column(place).num_values for place in range(group.num_columns))
        if max(group.total_byte_size, 8 * values) > row_group_bytes:
            raise InvalidArgument(f"{path}: row group {number} is above {row_group_bytes} bytes", field="row_group")
    return file
