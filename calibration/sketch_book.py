"""Sketches by (release, task, segment, maturity), kept apart, merged exactly, sparse on disk."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from calibration.sketch import LogitSketch
from calibration.sketch_layout import SUMS
from pipelines.errors import DataError, StaleStateError

__all__ = ["SKETCH_SCHEMA", "SketchBook", "SketchKey"]

_LAYOUT = b"ctrstream.sketch"
_VERSION = b"2"


class SketchKey(NamedTuple):
    """What all rows of one sketch have in common.

    Attributes
    ----------
    release : str
        Whose logits they are.
    task : str
    segment : str
        Such as ``campaign_id=17``; empty for all rows.
    maturity : str
        Such as ``mature``: how final the labels are.
    """

    release: str
    task: str
    segment: str
    maturity: str


# One row for each bin that holds something.
SKETCH_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in SketchKey._fields),
        pa.field("bin", pa.int16(), nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in SUMS),
    ]
)


class SketchBook:
    """A sketch for each key; adding books adds sketches of equal keys, to the bit and in any order.

    Sketches of two releases, tasks or maturities are never added to each other: there is no operation for
    it, because their sums would mean nothing. Segments can be (:meth:`over_segments`), where they part the
    rows.

    Examples
    --------
    >>> book = SketchBook()
    >>> for campaign, label in (("7", 1), ("8", 0)):
    ...     book.add(SketchKey("r1", "click", f"campaign_id={campaign}", "mature"), [0.0], [label])
    >>> whole = book.over_segments()
    >>> [(key.segment, sketch.rows, sketch.positives) for key, sketch in whole]
    [('', 2.0, 1.0)]
    >>> SketchBook.from_bytes(book.to_bytes()) == book
    True
    """

    def __init__(self) -> None:
        self._sketches: dict[SketchKey, LogitSketch] = {}

    def add(
        self,
        key: SketchKey,
        logit: npt.ArrayLike,
        label: npt.ArrayLike,
        weight: npt.ArrayLike | None = None,
    ) -> None:
        """Add rows of one key; arguments of :meth:`calibration.sketch.LogitSketch.update`."""
        sketch = self._sketches.get(key, LogitSketch())
        sketch.update(logit, label, weight)
        self._sketches[key] = sketch

    def __iter__(self) -> Iterator[tuple[SketchKey, LogitSketch]]:
        """Keys and their sketches, by key."""
        yield from sorted(self._sketches.items(), key=lambda pair: pair[0])

    def __len__(self) -> int:
        return len(self._sketches)

    def __contains__(self, key: object) -> bool:
        return key in self._sketches

    def __getitem__(self, key: SketchKey) -> LogitSketch:
        if key not in self._sketches:
            raise DataError(
                f"there is no sketch of {key}; there are {len(self)}.",
                hint=f"known: {', '.join(map(str, list(self._sketches)[:3]))}",
            )
        return self._sketches[key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SketchBook) and self._held() == other._held()

    __hash__ = None  # type: ignore[assignment]  # mutable

    # -- arithmetic ---------------------------------------------------------------------------------

    def merge(self, other: SketchBook) -> None:
        """Add another book's rows, exactly; on an error nothing is added."""
        merged = dict(self._sketches)
        for key, sketch in other._sketches.items():
            merged[key] = merged[key] + sketch if key in merged else sketch.copy()
        self._sketches = merged

    def subtract(self, other: SketchBook) -> None:
        """Take out rows that were added before; ``DataError`` if they were not all there."""
        rest = dict(self._sketches)
        for key, sketch in other._sketches.items():
            if key not in rest:
                raise DataError(f"cannot subtract {key}: there is no sketch of it.")
            rest[key] = rest[key] - sketch
        self._sketches = rest

    def __add__(self, other: SketchBook) -> SketchBook:
        total = self.copy()
        total.merge(other)
        return total

    def __sub__(self, other: SketchBook) -> SketchBook:
        difference = self.copy()
        difference.subtract(other)
        return difference

    def decay(self, factor: float) -> None:
        """Let all sketches forget (:meth:`calibration.sketch.LogitSketch.decay`); empty ones go."""
        for sketch in self._sketches.values():
            sketch.decay(factor)
        self._sketches = self._held()

    def over_segments(self) -> SketchBook:
        """The sum over segments by release, task and maturity, under the segment ``""``.

        Only for segments that part the rows; if the book holds the whole, too, it would count twice.
        """
        whole = SketchBook()
        for key, sketch in self._sketches.items():
            if not key.segment:
                raise DataError(f"{key} holds the rows of all segments already.")
            at = key._replace(segment="")
            whole._sketches[at] = whole._sketches.get(at, LogitSketch()) + sketch
        return whole

    def copy(self) -> SketchBook:
        """An independent book of the same rows."""
        twin = SketchBook()
        twin._sketches = {key: sketch.copy() for key, sketch in self._sketches.items()}
        return twin

    # -- on disk ------------------------------------------------------------------------------------

    def to_table(self) -> pa.Table:
        """``SKETCH_SCHEMA``, by key and bin."""
        parts = [(key, *sketch.units()) for key, sketch in self]
        counts = [len(bins) for _, bins, _ in parts]
        names = [np.repeat([key[i] for key, _, _ in parts], counts) for i in range(len(SketchKey._fields))]
        bins = np.concatenate([bins for _, bins, _ in parts]) if parts else np.zeros(0, np.int64)
        sums = np.concatenate([sums for _, _, sums in parts], axis=1) if parts else np.zeros((5, 0), np.int64)
        columns = [*(pa.array(name.tolist(), pa.string()) for name in names)]
        columns += [pa.array(bins.astype(np.int16)), *(pa.array(one) for one in sums)]
        return pa.table(columns, schema=SKETCH_SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """The book of such a table, in any order of its rows; ``StaleStateError`` if it cannot be one."""
        try:
            table = table.select(SKETCH_SCHEMA.names).cast(SKETCH_SCHEMA)
        except (KeyError, pa.ArrowInvalid) as error:
            raise StaleStateError(f"expected sketches as {SKETCH_SCHEMA.names}; {error}.") from error
        table = table.sort_by([(name, "ascending") for name in (*SketchKey._fields, "bin")])
        columns = [table[name].to_pylist() for name in SketchKey._fields]
        keys = [SketchKey(*key) for key in zip(*columns, strict=True)]
        bins = table["bin"].to_numpy().astype(np.int64)
        sums = np.stack([table[name].to_numpy() for name in SUMS])
        starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
        book = cls()
        for start, end in itertools.pairwise([*starts, len(keys)]):
            part = slice(start, end)
            book._sketches[keys[start]] = LogitSketch.from_units(bins[part], sums[:, part])
        return book

    def to_bytes(self) -> bytes:
        """A Parquet file, to be written in one go (:meth:`pipelines.storage.Folder.write`)."""
        sink = io.BytesIO()
        pq.write_table(self.to_table().replace_schema_metadata({_LAYOUT: _VERSION}), sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The book of :meth:`to_bytes`; ``StaleStateError`` if it is none."""
        try:
            table = pq.read_table(io.BytesIO(content))
        except pa.ArrowInvalid as error:
            raise StaleStateError(f"expected a Parquet file of sketches; {error}.") from error
        version = (table.schema.metadata or {}).get(_LAYOUT)
        if version != _VERSION:
            raise StaleStateError(f"expected sketches of version {_VERSION!r}; got {version!r}.")
        return cls.from_table(table)

    def digest(self) -> str:
        """Sha256 of what is held, in hexadecimal: equal for equal sums, whoever made them."""
        content = hashlib.sha256()
        for key, sketch in self:
            bins, sums = sketch.units()
            content.update(repr((tuple(key), len(bins))).encode())
            content.update(bins.astype("<i8").tobytes() + sums.astype("<i8").tobytes())
        return content.hexdigest()

    def _held(self) -> dict[SketchKey, LogitSketch]:
        empty = LogitSketch()
        return {key: sketch for key, sketch in self._sketches.items() if sketch != empty}
