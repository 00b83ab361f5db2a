from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from adpa.data.cache.ragged import list_column, list_row

any_rows = settings(max_examples=50, deadline=None, derandomize=True)
DTYPES = {"float16": pa.float16(), "float32": pa.float32(), "int32": pa.int32()}


@st.composite
def rows_of_one_type(draw: st.DrawFn) -> tuple[list[NDArray[Any]], pa.ListType, str]:
    """Rows [T] or [T, K] with T from 0, with infinities and without one, and their Arrow type."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    width = draw(st.none() | st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 6), max_size=8))
    shapes = [(length,) if width is None else (length, width) for length in lengths]
    rows = [draw(hnp.arrays(dtype, shape)) for shape in shapes]
    element = DTYPES[dtype]
    return rows, pa.list_(element if width is None else pa.list_(element, width)), dtype


def assert_same_rows(column: pa.ChunkedArray, rows: Sequence[NDArray[Any]]) -> None:
    assert len(column) == len(rows)
    for number, row in enumerate(rows):
        read = list_row(column, number)
        assert (read.dtype, read.shape) == (row.dtype, row.shape)
        assert read.tobytes() == row.tobytes()


@any_rows
@given(rows_of_one_type())
def test_rows_come_back_bit_for_bit(problem: tuple[list[NDArray[Any]], pa.ListType, str]) -> None:
    rows, type, _ = problem
    column = list_column(rows, type)
    column.validate(full=True)
    assert column.type == type
    assert_same_rows(pa.chunked_array([column]), rows)


@any_rows
@given(rows_of_one_type(), st.data())
def test_rows_come_back_from_several_chunks_and_from_slices(
    problem: tuple[list[NDArray[Any]], pa.ListType, str], data: st.DataObject
) -> None:
    rows, type, _ = problem
    split = data.draw(st.integers(0, len(rows)))
    column = pa.chunked_array([list_column(rows[:split], type), list_column(rows[split:], type)])
    assert_same_rows(column, rows)
    start = data.draw(st.integers(0, len(rows)))
    assert_same_rows(column.slice(start), rows[start:])


@any_rows
@given(rows_of_one_type())
def test_arrow_reads_the_same_lists(problem: tuple[list[NDArray[Any]], pa.ListType, str]) -> None:
    rows, type, _ = problem
    np.testing.assert_equal(list_column(rows, type).to_pylist(), [row.tolist() for row in rows])


def test_elements_are_converted_to_the_columns_type() -> None:
    rows = [np.array([1.0 / 3.0, -2.5]), np.array([7.0])]
    column = pa.chunked_array([list_column(rows, pa.list_(pa.float16()))])
    assert_same_rows(column, [row.astype(np.float16) for row in rows])


@pytest.mark.parametrize("width", [None, 3])
def test_a_row_is_a_read_only_view_of_the_columns_memory(width: int | None) -> None:
    shapes = [(length,) if width is None else (length, width) for length in (2, 0, 5)]
    rows = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    type = pa.list_(pa.float32() if width is None else pa.list_(pa.float32(), width))
    column = pa.chunked_array([list_column(rows, type)])
    values = column.chunk(0).values
    memory = (values if width is None else values.values).to_numpy(zero_copy_only=True)
    for number in (0, 2):
        row = list_row(column, number)
        assert np.shares_memory(row, memory)
        assert not row.flags.writeable
