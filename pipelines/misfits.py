"""Good events whose features do not fit the feature spec: set aside, so that one cannot stop the stream.

Whether a row fits follows from the row and the spec alone, never from the rows that it was read with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.codec import encode_json
from pipelines.events import DEAD_LETTER, IMPRESSION, DeadLetter, EventBlock
from pipelines.feature_spec import FeatureSpec

__all__ = ["find_misfits", "set_aside_misfits"]


def find_misfits(impressions: pa.Table, spec: FeatureSpec) -> dict[int, str]:
    """Rows in which a numeric feature holds something that is no finite number, with the reason.

    Categorical features and sequences take any value.

    Examples
    --------
    >>> from pipelines.feature_spec import Numeric
    >>> spec = FeatureSpec(numeric=(Numeric(name="price", low=0, high=9, mean=1, std=1),))
    >>> find_misfits(pa.table({"price": ["2.5", "cheap", None]}), spec)
    {1: "feature price must be a finite number, as in the feature spec. Received: 'cheap'."}
    """
    found: dict[int, str] = {}
    for part in spec.numeric:
        if part.name not in impressions.column_names:
            continue
        column = impressions.column(part.name)
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            continue  # finite already: `pipelines.validation.validate`
        for row in _not_numbers(column):
            found.setdefault(
                row,
                f"feature {part.name} must be a finite number, as in the feature spec. "
                f"Received: {column[row].as_py()!r}.",
            )
    return found


def _not_numbers(column: pa.ChunkedArray) -> list[int]:
    if pa.types.is_null(column.type):
        return []
    if not pa.types.is_string(column.type):
        return np.flatnonzero(column.is_valid().to_numpy()).tolist()
    bad = [text for text in pc.unique(column.drop_null()).to_pylist() if not _is_number(text)]
    if not bad:
        return []
    return np.flatnonzero(pc.is_in(column, value_set=pa.array(bad)).to_numpy()).tolist()


def _is_number(text: str) -> bool:
    # By Arrow's own parser, which reads the column later.
    try:
        return math.isfinite(pa.scalar(text).cast(pa.float64()).as_py())
    except pa.ArrowInvalid:
        return False


def set_aside_misfits(
    block: EventBlock, spec: FeatureSpec, partitions: Sequence[tuple[str, int]]
) -> EventBlock:
    """Turn impressions that do not fit the spec into dead letters, in their place.

    Parameters
    ----------
    block : EventBlock
    spec : FeatureSpec
    partitions : sequence of (str, int)
        Topic (or file) and partition number that ``block.partition`` counts through.

    Returns
    -------
    EventBlock
        The same block if all fits.
    """
    impressions = block.tables[IMPRESSION]
    misfits = find_misfits(impressions, spec)
    if not misfits:
        return block
    rows = sorted(misfits)
    payloads = encode_json(IMPRESSION, impressions.take(pa.array(rows)))
    places = np.flatnonzero(block.kind == IMPRESSION)[rows]
    letters = dict(zip(np.flatnonzero(block.kind == DEAD_LETTER).tolist(), block.dead_letters, strict=True))
    for row, place, payload in zip(rows, places.tolist(), payloads, strict=True):
        source, partition = partitions[block.partition[place]]
        letters[place] = DeadLetter(
            source,
            partition,
            int(block.offset[place]),
            int(block.row[place]),
            misfits[row],
            payload.decode(),
        )
    kind = block.kind.copy()
    kind[places] = DEAD_LETTER
    fits = np.ones(impressions.num_rows, np.bool_)
    fits[rows] = False
    return replace(
        block,
        tables=(impressions.filter(pa.array(fits)), *block.tables[1:]),
        kind=kind,
        dead_letters=[letters[place] for place in sorted(letters)],
    )
