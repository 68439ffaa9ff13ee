"""A lake of impressions with clicks and conversions, as large as wanted, for `benchmarks.samples`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.lake import KindTimes, LakeBatch, LakePartition, attempt_folder, batch_folder
from pipelines.lake_rows import LAKE_SCHEMA
from pipelines.storage import open_folder

__all__ = ["START", "write_lake"]

START = 1_767_225_600_000  # 2026-01-01
# Impressions made at a time, so that memory does not follow the size of the lake.
_CHUNK = 1_000_000
_FEATURES = (
    ("ad_id", "a", 5000), ("campaign_id", "c", 300), ("device", "d", 5), ("site", "s", 2000),
    ("country", "k", 60), ("os", "o", 6), ("slot", "p", 12), ("advertiser_id", "v", 120),
)  # fmt: skip
Ints = NDArray[np.int64]


def write_lake(
    lake: Path, impressions: int, *, days: int = 30, clicks: float = 0.3, conversions: float = 0.05
) -> None:
    """Write a committed lake with one batch; ``clicks`` and ``conversions`` are shares of the impressions.

    Clicks come within minutes, conversions after an exponential delay of 12 hours. One event in a hundred
    is delivered twice.
    """
    folder, batch, attempt = open_folder(lake), "benchmark", "0"
    root = Path(attempt_folder(folder, batch, attempt).location)
    partitions: dict[tuple[str, str, int], int] = {}
    times: dict[str, list[int]] = {}
    for part, first in enumerate(range(0, impressions, _CHUNK)):
        n = min(_CHUNK, impressions - first)
        since = START + days * DAY_MS * first // impressions
        until = START + days * DAY_MS * (first + n) // impressions
        for table in _events(n, since, until, clicks, conversions, np.random.default_rng(part)):
            _write(root, part, table, partitions, times)
    rows = {kind: sum(n for key, n in partitions.items() if key[0] == kind) for kind in times}
    manifest = LakeBatch(
        batch=batch,
        source="files",
        attempt=attempt,
        rows=rows,
        times={
            kind: KindTimes(event_time=(low, high), arrival_time=(low_arrival, high_arrival))
            for kind, (low, high, low_arrival, high_arrival) in times.items()
        },
        partitions=tuple(
            LakePartition(kind=kind, event_date=date, event_hour=hour, rows=n)
            for (kind, date, hour), n in sorted(partitions.items())
        ),
    )
    batch_folder(folder, batch).write("_MANIFEST.json", manifest.model_dump_json().encode())


def _events(
    n: int, since: int, until: int, clicks: float, conversions: float, rng: np.random.Generator
) -> list[pa.Table]:
    shown = np.sort(rng.integers(since, until, n))
    names = _ids("i", n, rng)
    clicked = np.flatnonzero(rng.random(n) < clicks)
    click_time = shown[clicked] + rng.exponential(120_000, len(clicked)).astype(np.int64)
    bought = np.flatnonzero(rng.random(len(clicked)) < conversions / clicks)
    buy_time = click_time[bought] + rng.exponential(12 * HOUR_MS, len(bought)).astype(np.int64)
    own = names.take(pa.array(clicked))
    return [
        _table("impression", names, names, shown, 2_000, rng, **_columns(n, rng)),
        _table("click", _ids("c", len(clicked), rng), own, click_time, 3_000, rng),
        _table(
            "conversion", _ids("v", len(bought), rng), own.take(pa.array(bought)), buy_time, 5_000, rng,
            op=_same("assert", len(bought)),
        ),
    ]  # fmt: skip


def _columns(n: int, rng: np.random.Generator) -> dict[str, Any]:
    def values(size: int) -> pa.Array:
        return pa.array(rng.zipf(1.3, n) % size).cast(pa.string())

    pieces: list[Any] = []
    for place, (name, prefix, size) in enumerate(_FEATURES):
        pieces += [pa.scalar(("{" if place == 0 else '",') + f'"{name}":"{prefix}'), values(size)]
    price = pa.array(np.round(rng.gamma(2, 1, n), 3)).cast(pa.string())
    pieces += [pa.scalar('","price":'), price, pa.scalar(',"age_days":')]
    pieces += [pa.array(rng.integers(0, 400, n)).cast(pa.string()), pa.scalar("}")]
    return {
        "features": pc.binary_join_element_wise(*pieces, ""),
        "user_id": pc.binary_join_element_wise("u", values(n // 5 + 1), ""),
        "item_id": pc.binary_join_element_wise("t", values(20_000), ""),
        "position": rng.integers(1, 9, n).astype(np.int32),
    }


def _ids(prefix: str, n: int, rng: np.random.Generator) -> pa.Array:
    return pa.array(np.char.add(prefix, np.char.mod("%016x", rng.integers(0, 2**63, n, dtype=np.int64))))


def _same(text: str, n: int) -> pa.Array:
    return pa.array([text]).take(pa.array(np.zeros(n, np.int64)))


def _table(
    kind: str,
    event_id: pa.Array,
    name: pa.Array,
    time: Ints,
    wait: float,
    rng: np.random.Generator,
    **more: Any,
) -> pa.Table:
    n = len(time)
    columns = {
        "kind": _same(kind, n),
        "event_id": event_id,
        "impression_id": name,
        "event_time": time,
        "arrival_time": time + rng.exponential(wait, n).astype(np.int64),
        "source": _same(f"{kind}s", n),
        "partition": np.zeros(n, np.int32),
        "offset": np.arange(n),
        "row": np.zeros(n, np.int32),
        **more,
    }
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(n, field.type)
        for field in LAKE_SCHEMA
    ]
    table = pa.table(arrays, schema=LAKE_SCHEMA)
    again = table.take(pa.array(rng.choice(n, n // 100, replace=False)))
    place = table.schema.get_field_index("arrival_time")
    later = pa.array(again.column("arrival_time").to_numpy() + 5_000)
    return pa.concat_tables([table, again.set_column(place, "arrival_time", later)])


def _write(
    root: Path,
    part: int,
    table: pa.Table,
    partitions: dict[tuple[str, str, int], int],
    times: dict[str, list[int]],
) -> None:
    kind = table.column("kind")[0].as_py()
    event, arrival = table.column("event_time").to_numpy(), table.column("arrival_time").to_numpy()
    span = [int(event.min()), int(event.max()), int(arrival.min()), int(arrival.max())]
    former = times.get(kind, span)
    times[kind] = [
        min(span[0], former[0]),
        max(span[1], former[1]),
        min(span[2], former[2]),
        max(span[3], former[3]),
    ]
    order = np.argsort(event, kind="stable")
    hours = event[order] // HOUR_MS
    table = table.drop_columns(["kind"]).take(pa.array(order))
    cuts = [0, *(np.flatnonzero(np.diff(hours)) + 1).tolist(), len(hours)]
    for start, stop in itertools.pairwise(cuts):
        moment = int(hours[start]) * HOUR_MS
        date, hour = str(np.datetime64(moment, "ms"))[:10], int(hours[start]) % 24
        place = root / f"kind={kind}" / f"event_date={date}" / f"event_hour={hour}"
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(start, stop - start), place / f"part-{part}.parquet", compression="zstd")
        partitions[kind, date, hour] = partitions.get((kind, date, hour), 0) + stop - start
