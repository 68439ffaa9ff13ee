"""Which batches of the lake hold given messages of Kafka, and which messages none holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipelines.lake import LakeBatch, OffsetRange

__all__ = ["find_offsets", "tell"]


def find_offsets(
    wanted: Iterable[OffsetRange], batches: Sequence[LakeBatch]
) -> tuple[dict[str, list[OffsetRange]], list[OffsetRange]]:
    """Look for messages in the offsets that manifests name.

    Parameters
    ----------
    wanted : iterable of OffsetRange
    batches : sequence of LakeBatch

    Returns
    -------
    held : dict of str to list of OffsetRange
        By batch, what to take from it: every message once, though several batches may have it.
    missing : list of OffsetRange
        What no batch has.

    Examples
    --------
    >>> one = dict(source="kafka", attempt="a", rows={}, times={}, partitions=())
    >>> def part(start, stop):
    ...     return OffsetRange(topic="clicks", partition=0, start=start, stop=stop)
    >>> batches = [LakeBatch(batch="b", offsets=(part(0, 5),), **one),
    ...            LakeBatch(batch="c", offsets=(part(4, 7),), **one)]
    >>> held, missing = find_offsets([part(2, 9)], batches)
    >>> tell(held["b"]), tell(held["c"]), tell(missing)
    ('clicks-0: offsets 2 to 4 (3)', 'clicks-0: offsets 5 to 6 (2)', 'clicks-0: offsets 7 to 8 (2)')
    """
    held: dict[str, list[OffsetRange]] = {}
    missing: list[OffsetRange] = []
    for each in wanted:
        known = sorted(
            (part.start, part.stop, batch.batch)
            for batch in batches
            for part in batch.offsets
            if (part.topic, part.partition) == (each.topic, each.partition)
        )
        place = each.start
        for start, stop, batch in known:
            if stop <= place or start >= each.stop:
                continue
            if start > place:
                missing.append(each.model_copy(update={"start": place, "stop": start}))
            place, begin = min(stop, each.stop), max(start, place)
            held.setdefault(batch, []).append(each.model_copy(update={"start": begin, "stop": place}))
        if place < each.stop:
            missing.append(each.model_copy(update={"start": place}))
    return held, missing


def tell(ranges: Iterable[OffsetRange]) -> str:
    """Ranges in words, for errors: first and last offset, and how many."""
    return "; ".join(
        f"{part.topic}-{part.partition}: offsets {part.start} to {part.stop - 1} ({part.messages})"
        for part in ranges
    )
