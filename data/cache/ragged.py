"""Turns rows of different lengths into Arrow list columns and back, without a Python object per element."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def list_column(rows: Sequence[NDArray[Any]], type: pa.ListType) -> pa.ListArray:
    """Makes a list column of arrays [T] or [T, K] whose T differ.

    Args:
        rows: one array for each row.
        type: ``list<x>`` for [T], ``list<fixed_size_list<x, K>>`` for [T, K].
    """
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    inner = type.value_type
    nested = pa.types.is_fixed_size_list(inner)
    assert all(row.shape[1:] == ((inner.list_size,) if nested else ()) for row in rows), f"rows do not fit {type}"
    element = (inner.value_type if nested else inner).to_pandas_dtype()
    flat = np.concatenate([np.asarray(row, dtype=element).ravel() for row in rows] or [np.empty(0, element)])
    values = pa.array(flat)
    if nested:
        values = pa.FixedSizeListArray.from_arrays(values, type=inner)
    return pa.ListArray.from_arrays(offsets, values, type=type)


def list_row(column: pa.ChunkedArray, index: int) -> NDArray[Any]:
    """One row of a list column: [T] or [T, K], a read-only view of the column's memory."""
    values = column[index].values
    if not pa.types.is_fixed_size_list(values.type):
        return values.to_numpy(zero_copy_only=True)
    width = values.type.list_size
    return values.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
