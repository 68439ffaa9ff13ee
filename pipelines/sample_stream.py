"""Samples as a stream: sharded, shuffled, repeated and batched without ever being in memory as a whole.

::

    stream = SampleStream.of(files, matrices={"buckets": 24, "numbers": 8, "segment_key": 1})
    batches = stream.shard(rank, world).shuffle(65_536, seed).repeat(3).batch(4096)
    for batch in batches.map(to_training_set).prefetch(2):
        ...

A `SampleStream` is of rows, a `BatchStream` of what was made of them. Both are values: a verb returns a new
one, and each iteration starts from the begin. Rows stay in Arrow up to the batch (`pa.RecordBatch`, matrices
as lists of a fixed size); `to_training_set` views one as numpy arrays without copying.

The verbs are those of tf.data, with one difference: filter, shard, order, part and epochs are one description
of the rows, so it does not matter in which order they are called. Rows are filtered first, shards cut next,
then put in order; a part is taken of that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from pipelines.errors import ConfigError, DataError, StaleStateError
from pipelines.stream_batches import BatchIterator, BatchStream, StreamState
from pipelines.stream_columns import TIME_KEYS, TRAINING_COLUMNS, Bounds, to_training_set, with_widths
from pipelines.stream_files import DataFile, ParquetFiles
from pipelines.stream_merge import MergedOrder
from pipelines.stream_order import FileOrder, RowOrder, shard_of
from pipelines.stream_shuffle import ShuffledOrder, pieces_to_shuffle

__all__ = [
    "BatchIterator",
    "BatchStream",
    "DataFile",
    "SampleStream",
    "StreamState",
    "to_training_set",
]


@dataclass(frozen=True)
class SampleStream:
    """Rows of Parquet files, described; nothing is read before the first batch is asked for.

    Make one with `of`. Memory does not depend on the number of rows: see `docs/training-data.md`.

    Attributes
    ----------
    files : tuple of DataFile
    schema : pa.Schema
        Columns of the batches, matrices as lists of a fixed size.
    bounds, in_time, rank, world, buffer_rows, seed, first, last, epochs, position
        Set by the verbs.
    """

    files: tuple[DataFile, ...]
    schema: pa.Schema
    bounds: tuple[Bounds, ...] = ()
    in_time: bool = False
    rank: int = 0
    world: int = 1
    buffer_rows: int | None = None
    seed: int = 0
    first: int = 0
    last: int | None = None
    epochs: int | None = 1
    position: int = 0

    @classmethod
    def of(
        cls,
        files: Sequence[DataFile],
        columns: pa.Schema = TRAINING_COLUMNS,
        matrices: Mapping[str, int] | None = None,
    ) -> Self:
        """All rows, in the order of the files, once.

        Parameters
        ----------
        files : sequence of DataFile
        columns : pa.Schema
            Columns to read and the types that they must have; nothing else is read from the files.
        matrices : mapping of str to int, optional
            List columns with the same number of values in each row, and that number.

        Raises
        ------
        ConfigError
            If a matrix is not a list column.
        """
        return cls(tuple(files), with_widths(columns, matrices or {}))

    def select(self, *columns: str) -> Self:
        """Only these columns: the others are not read."""
        for name in columns:
            self._require(name)
        return replace(self, schema=pa.schema([self.schema.field(name) for name in columns]))

    def filter(self, column: str, low: Any = None, high: Any = None) -> Self:
        """Rows with ``low <= column < high``; None is no bound, and a null is outside.

        Row groups that the footers show to lie outside are not read. Positions, shards and buffers count the
        rows that are left.
        """
        kind = self._require(column)
        limits = []
        for limit in (low, high):
            try:
                limits.append(None if limit is None else pa.scalar(limit, kind).as_py())
            except (pa.ArrowException, OverflowError) as error:
                raise _wrong_bound(column, kind, limit) from error
            if limits[-1] != limit and not pa.types.is_floating(kind):
                # Arrow cuts a fraction off.
                raise _wrong_bound(column, kind, limit)
        return replace(self, bounds=(*self.bounds, Bounds(column, *limits)))

    def in_time_order(self) -> Self:
        """Ordered by ``(event_time, sample_id)``, given that every file is.

        Files that overlap in time are read side by side: see `pipelines.stream_merge`. A stream that is
        shuffled has no such order, whatever is asked for first.
        """
        return replace(self, in_time=True)

    def shard(self, rank: int, world: int) -> Self:
        """The part of one of ``world`` readers: see `pipelines.stream_order.shard_of`."""
        if not 0 <= rank < world:
            raise ConfigError(f"expected 0 <= rank < world. Received: rank {rank}, world {world}.")
        if self.world != 1:
            raise ConfigError(f"expected a whole stream. Received: shard {self.rank} of {self.world}.")
        return replace(self, rank=rank, world=world)

    def shuffle(self, buffer_rows: int | None, seed: int = 0) -> Self:
        """In random order, another one in each epoch; None keeps the order of time.

        See `pipelines.stream_shuffle`: row groups are permuted, and ``buffer_rows`` rows of eight mixed.
        """
        if buffer_rows is not None and buffer_rows < 1:
            raise ConfigError(f"expected a buffer of at least 1 row, or None. Received: {buffer_rows}.")
        if seed < 0:
            raise ConfigError(f"expected a seed of at least 0. Received: {seed}.")
        return replace(self, buffer_rows=buffer_rows, seed=seed)

    def part(self, first: int, last: int | None = None) -> Self:
        """Rows ``[first, last)`` of each epoch, by their position in its order."""
        if first < 0 or (last is not None and last < first):
            raise ConfigError(f"expected 0 <= first <= last. Received: {first}, {last}.")
        if (self.first, self.last) != (0, None):
            raise ConfigError(f"expected a whole stream. Received: rows {self.first} to {self.last}.")
        return replace(self, first=first, last=last)

    def repeat(self, epochs: int | None = None) -> Self:
        """So many epochs; None goes on for ever."""
        if epochs is not None and epochs < 1:
            raise ConfigError(f"expected at least 1 epoch, or None. Received: {epochs}.")
        return replace(self, epochs=epochs)

    def start_at(self, position: int | StreamState) -> Self:
        """From a row on, counted over all epochs, or from where a reader of the same stream was.

        Raises
        ------
        StaleStateError
            If the state is of other files, or of another shard, order or part.
        """
        if isinstance(position, StreamState):
            if position.digest != self.digest:
                raise StaleStateError(
                    f"expected the state of the stream {self.digest}. Received: that of {position.digest}.",
                    hint="go on with the same snapshot, shard, filter, order and seed",
                )
            position = position.rows
        if position < 0:
            raise ConfigError(f"expected a position of at least 0. Received: {position}.")
        return replace(self, position=position)

    def batch(self, rows: int, drop_last: bool = False) -> BatchStream[pa.RecordBatch]:
        """Batches of exactly ``rows`` rows, across row groups, files and epochs; the last may be smaller."""
        if rows < 1:
            raise ConfigError(f"expected batches of at least 1 row. Received: {rows}.")
        return BatchStream(self, rows, drop_last)

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch of this shard. Reads the footers, once."""
        last = self._order.rows if self.last is None else min(self.last, self._order.rows)
        return max(0, last - self.first)

    @cached_property
    def digest(self) -> str:
        """Of all that decides which row stands where."""
        described = [
            [(file.location.rsplit("/", 1)[-1], file.rows) for file in self.files],
            [(bound.column, repr(bound.low), repr(bound.high)) for bound in self.bounds],
            self.in_time and self.buffer_rows is None,
            [self.rank, self.world, self.first, self.last],
            [self.buffer_rows, None if self.buffer_rows is None else self.seed],
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def chunks(self) -> Generator[pa.RecordBatch]:
        """The rows in pieces of whatever size they come in.

        Raises
        ------
        DataError
            If a file is missing, damaged or not as described, or if there are no rows to repeat for ever.
        StaleStateError
            If the rows end before the position to start at.
        """
        rows = self.epoch_rows
        if self.epochs is None and rows == 0:
            raise DataError("expected rows to repeat. Received none: no row is inside the bounds.")
        if self.epochs is not None and self.position > self.epochs * rows:
            raise StaleStateError(
                f"expected a position within {self.epochs * rows} rows. Received: {self.position}.",
                hint="the files or the number of epochs have changed",
            )
        epoch, start = divmod(self.position, max(rows, 1))
        while self.epochs is None or epoch < self.epochs:
            left = rows - start
            if left:
                with closing(self._order.read(epoch, self.first + start)) as chunks:
                    yield from _first_rows(chunks, left)
            epoch, start = epoch + 1, 0

    @cached_property
    def _order(self) -> RowOrder:
        in_time = self.in_time and self.buffer_rows is None
        schema = self.schema
        if in_time:
            missing = [field for field in TIME_KEYS if field.name not in schema.names]
            schema = pa.schema([*schema, *missing])
        files = ParquetFiles(self.files, schema, self.bounds, TIME_KEYS.names[0] if in_time else None)
        pieces = files.pieces if self.world == 1 else shard_of(files.pieces, self.rank, self.world)
        if self.buffer_rows is not None:
            cut = pieces_to_shuffle(pieces, self.buffer_rows)
            return ShuffledOrder(files, cut, self.buffer_rows, self.seed)
        if in_time:
            return MergedOrder(files, pieces, tuple(TIME_KEYS.names), tuple(self.schema.names))
        return FileOrder(files, pieces)

    def _require(self, column: str) -> pa.DataType:
        if column not in self.schema.names:
            raise ConfigError(
                f"expected a column among {', '.join(self.schema.names)}. Received: {column!r}."
            )
        return self.schema.field(column).type


def _wrong_bound(column: str, kind: pa.DataType, limit: Any) -> ConfigError:
    return ConfigError(f"expected bounds of type {kind} for {column}. Received: {limit!r}.")


def _first_rows(chunks: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    for chunk in chunks:
        yield chunk.slice(0, rows)
        rows -= chunk.num_rows
        if rows <= 0:
            return
