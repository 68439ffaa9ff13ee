"""Batches of a sample stream: cut to size, mapped, made ahead, and counted so that a reader can go on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from pipelines.errors import ConfigError
from pipelines.stream_prefetch import prefetched

__all__ = ["BatchIterator", "BatchStream", "RowSource", "StreamState"]

T = TypeVar("T")
U = TypeVar("U")
# Beside each item, the rows of the stream up to its end.
Counted = Generator[tuple[int, Any]]


class RowSource(Protocol):
    """What batches are cut from; see `pipelines.sample_stream.SampleStream`."""

    @property
    def position(self) -> int:
        """Row that the chunks begin with."""

    @property
    def digest(self) -> str:
        """Of all that decides which row stands where."""

    def chunks(self) -> Generator[pa.RecordBatch]:
        """The rows in pieces of whatever size they come in."""


@dataclass(frozen=True)
class StreamState:
    """How far a reader has come: enough to go on at the next row.

    Attributes
    ----------
    rows : int
        Rows read since the begin of the first epoch.
    digest : str
        Of all that decides which row stands where; batches are not part of it.
    """

    rows: int
    digest: str


@dataclass(frozen=True)
class BatchStream(Generic[T]):
    """Batches of a stream, and what is made of each; iterate over it as often as you like."""

    stream: RowSource
    rows: int
    drop_last: bool = False
    stages: tuple[Callable[[Counted], Counted], ...] = ()

    def map(self, function: Callable[[T], U]) -> BatchStream[U]:
        """What ``function`` makes of each batch, in their order."""

        def stage(items: Counted) -> Counted:
            with closing(items):
                for rows, item in items:
                    yield rows, function(item)

        return BatchStream(self.stream, self.rows, self.drop_last, (*self.stages, stage))

    def prefetch(self, depth: int) -> BatchStream[T]:
        """The same, with what was asked for so far done in a thread, up to ``depth`` batches ahead."""
        if depth < 1:
            raise ConfigError(f"expected to prefetch at least 1 batch. Received: {depth}.")

        def stage(items: Counted) -> Counted:
            return prefetched(items, depth)

        return BatchStream(self.stream, self.rows, self.drop_last, (*self.stages, stage))

    def __iter__(self) -> BatchIterator[T]:
        items: Counted = _batches(self.stream, self.rows, self.drop_last)
        for stage in self.stages:
            items = stage(items)
        return BatchIterator(items, self.stream)


class BatchIterator(Generic[T]):
    """One pass over a `BatchStream`."""

    def __init__(self, items: Counted, stream: RowSource) -> None:
        self._items = items
        self._stream = stream
        self._rows = stream.position

    def __iter__(self) -> BatchIterator[T]:
        return self

    def __next__(self) -> T:
        self._rows, item = next(self._items)
        return item  # type: ignore[no-any-return]

    def state(self) -> StreamState:
        """After the last batch that was handed out: `SampleStream.start_at` goes on behind it."""
        return StreamState(self._rows, self._stream.digest)

    def close(self) -> None:
        """End early: files are closed, a prefetching thread has ended. Dropping the iterator does it, too."""
        self._items.close()


def _batches(stream: RowSource, rows: int, drop_last: bool) -> Counted:
    position, waiting, count = stream.position, list[pa.RecordBatch](), 0
    with closing(stream.chunks()) as chunks:
        for chunk in chunks:
            at = 0
            while chunk.num_rows - at >= rows - count:
                waiting.append(chunk.slice(at, rows - count))
                at += rows - count
                position += rows
                yield position, _joined(waiting)
                waiting, count = [], 0
            if at < chunk.num_rows:
                waiting.append(chunk.slice(at))
                count += chunk.num_rows - at
    if waiting and not drop_last:
        yield position + count, _joined(waiting)


def _joined(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return parts[0] if len(parts) == 1 else pa.concat_batches(parts)
