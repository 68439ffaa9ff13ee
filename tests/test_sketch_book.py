"""Books of sketches: laws of merging, what is kept apart, and files that are refused when damaged."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.sketch import LogitSketch
from calibration.sketch_book import SKETCH_SCHEMA, SketchBook, SketchKey
from pipelines.errors import DataError, StaleStateError

KEY = st.builds(
    SketchKey,
    st.sampled_from(["r1", "r2"]),
    st.sampled_from(["click", "conversion"]),
    st.sampled_from(["", "campaign_id=1", "campaign_id=2"]),
    st.sampled_from(["mature", "provisional"]),
)
ROW = st.tuples(KEY, st.floats(-20, 20), st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 100))
Rows = list[tuple[SketchKey, float, float, float]]
ROWS = st.lists(ROW, max_size=12)


def book_of(rows: Rows) -> SketchBook:
    book = SketchBook()
    for key, logit, label, weight in rows:
        book.add(key, [logit], [label], [weight])
    return book


def some_book() -> SketchBook:
    book, rng = SketchBook(), np.random.default_rng(0)
    for segment in ("campaign_id=1", "campaign_id=2"):
        for release in ("r1", "r2"):
            key = SketchKey(release, "click", segment, "mature")
            book.add(key, rng.normal(-3, 1, 500), rng.integers(0, 2, 500))
    return book


@settings(max_examples=50, deadline=None)
@given(ROWS, ROWS, ROWS)
def test_merging_is_associative_commutative_and_can_be_undone(a: Rows, b: Rows, c: Rows) -> None:
    x, y, z = book_of(a), book_of(b), book_of(c)
    assert (x + y) + z == x + (y + z)
    assert x + y == y + x == book_of(a + b)
    assert (x + y) - y == x
    assert (x + y).digest() == (y + x).digest()


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_a_book_goes_through_a_file_to_the_bit(rows: Rows) -> None:
    book = book_of(rows)
    again = SketchBook.from_bytes(book.to_bytes())
    assert again == book
    assert again.to_bytes() == SketchBook.from_table(book.to_table().take(_backwards(book))).to_bytes()


def _backwards(book: SketchBook) -> pa.Array:
    return pa.array(np.arange(len(book.to_table()))[::-1])


def test_only_bins_that_hold_something_are_written() -> None:
    book = SketchBook()
    book.add(SketchKey("r", "click", "", "mature"), [0.0, 1.0, 1.0], [0, 1, 0])
    table = book.to_table()
    assert table.schema == SKETCH_SCHEMA
    assert table["bin"].to_pylist() == [2048, 2176]
    assert table["rows"].to_pylist() == [2**24, 2 * 2**24]


def test_the_whole_is_the_sum_over_segments_of_one_release_and_maturity() -> None:
    book = some_book()
    whole = book.over_segments()
    assert [key for key, _ in whole] == [SketchKey(r, "click", "", "mature") for r in ("r1", "r2")]
    parts = [book[SketchKey("r1", "click", f"campaign_id={i}", "mature")] for i in (1, 2)]
    assert whole[SketchKey("r1", "click", "", "mature")] == parts[0] + parts[1]
    with pytest.raises(DataError, match="all segments already"):
        whole.over_segments()


def test_a_key_that_is_not_there_is_told() -> None:
    key = SketchKey("r9", "click", "", "mature")
    with pytest.raises(DataError, match=r"no sketch of .*r9.*there are 4"):
        some_book()[key]
    other = SketchBook()
    other.add(key, [0.0], [1])
    with pytest.raises(DataError, match="cannot subtract"):
        some_book() - other


def test_decayed_away_means_gone() -> None:
    book = some_book()
    book.decay(0.5)
    assert book[SketchKey("r1", "click", "campaign_id=1", "mature")].rows == 250
    book.decay(0.0)
    assert len(book) == 0
    assert book.digest() == SketchBook().digest()


def _file(table: pa.Table, version: bytes = b"2") -> bytes:
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"ctrstream.sketch": version}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda table: b"not a file", "Parquet file"),
        (lambda table: _file(table, b"1"), "version"),
        (lambda table: _file(table.drop_columns(["squares"])), "squares"),
        (lambda table: _file(pa.concat_tables([table, table])), "bins must increase"),
        (
            lambda table: _file(
                table.set_column(5, SKETCH_SCHEMA.field("rows"), pa.array([-1] * len(table)))
            ),
            ">= 0",
        ),
    ],
)
def test_damaged_files_are_refused(damaged: Callable[[pa.Table], bytes], message: str) -> None:
    with pytest.raises(StaleStateError, match=message):
        SketchBook.from_bytes(damaged(some_book().to_table()))


def test_a_refused_merge_adds_nothing() -> None:
    book, full = some_book(), SketchBook()
    key = SketchKey("r1", "click", "campaign_id=1", "mature")
    full._sketches[key] = LogitSketch.from_units([2048], [[2**62]] * 5)
    full.merge(SketchBook())
    book._sketches[SketchKey("r1", "click", "campaign_id=2", "mature")] = full[key].copy()
    before = book.digest()
    full._sketches[SketchKey("r1", "click", "campaign_id=2", "mature")] = full[key].copy()
    with pytest.raises(DataError, match="full"):
        book.merge(full)
    assert book.digest() == before
