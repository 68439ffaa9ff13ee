"""Event logs in files: what is found, in which order it comes, what becomes of rows that are no events."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.codec import decode_json
from pipelines.errors import DataError
from pipelines.event_file_reading import usable_rows
from pipelines.event_files import EventFiles
from pipelines.events import CLICK, CONVERSION, DEAD_LETTER, IMPRESSION, TOPICS, EventBlock
from pipelines.hashing import hash_text

NOW = 1_767_571_200_000
Event = dict[str, Any]


def event(kind: int, name: str, arrival: int, **changes: Any) -> Event:
    body: Event = {
        "event_id": name,
        "impression_id": name if kind == IMPRESSION else f"of-{name}",
        "event_time": NOW,
        "arrival_time": NOW + arrival,
    }
    if kind == IMPRESSION:
        body |= {"user_id": "u", "item_id": "a", "features": {"price": 1.5, "tags": ["x"]}}
    return body | changes


def write_jsonl(path: Path, events: list[Event]) -> None:
    path.write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in events))


def write_parquet(path: Path, kind: int, events: list[Event]) -> None:
    rows = [{**one, **one.get("features", {})} for one in events]
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name != "features"]
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)


def order_of(files: EventFiles) -> list[tuple[int, int, str]]:
    """Kind, arrival time and event id (or payload) of each row, in order."""
    rows: list[tuple[int, int, str]] = []
    for block in files.blocks(block_rows=3):
        at = [0, 0, 0, 0]
        names = [*(table.column("event_id").to_pylist() for table in block.tables)]
        names.append([letter.payload for letter in block.dead_letters])
        for kind, arrival in zip(block.kind.tolist(), block.arrival_time.tolist(), strict=True):
            rows.append((kind, arrival - NOW, names[kind][at[kind]]))
            at[kind] += 1
        assert at == [*map(len, names)]
    return rows


def test_rows_come_by_arrival_then_kind_then_hash_of_the_event_id(tmp_path: Path) -> None:
    impressions = [event(IMPRESSION, name, at) for name, at in (("a", 5), ("b", 1), ("c", 5), ("d", 5))]
    write_jsonl(tmp_path / "impressions.jsonl", impressions)
    write_jsonl(tmp_path / "clicks_1.jsonl", [event(CLICK, "e", 5)])
    write_jsonl(tmp_path / "clicks_0.jsonl", [event(CLICK, "f", 0)])
    write_jsonl(tmp_path / "conversions.jsonl", [event(CONVERSION, "g", 5)])
    tied = sorted("acd", key=hash_text)
    expected = [(CLICK, 0, "f"), (IMPRESSION, 1, "b"), *((IMPRESSION, 5, name) for name in tied)]
    expected += [(CLICK, 5, "e"), (CONVERSION, 5, "g")]
    files = EventFiles(tmp_path)
    assert order_of(files) == expected
    assert files.rows == 7 and files.arrival_time.tolist() == [NOW + at for _, at, _ in expected]


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=30),
    st.booleans(),
)
def test_order_does_not_depend_on_how_the_log_is_cut_into_files(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]], parquet: bool
) -> None:
    events = [(kind, event(kind, f"{kind}-{name}", at)) for kind, at, name in rows]
    events.append((IMPRESSION, event(IMPRESSION, "last", 9)))
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    for kind, topic in enumerate(TOPICS):
        own = [one for which, one in events if which == kind]
        if own:
            write_jsonl(whole / f"{topic}.jsonl", own)
            for part in range(2):
                if parquet and own[part::2]:
                    write_parquet(cut / f"{topic}-{part}.parquet", kind, own[part::2])
                else:
                    write_jsonl(cut / f"{topic}-{part}.jsonl", own[part::2])
    expected = sorted(
        (
            (one["arrival_time"] - NOW, kind, hash_text(one["event_id"]), one["event_id"])
            for kind, one in events
        )
    )
    for folder in (whole, cut):
        assert order_of(EventFiles(folder)) == [(kind, at, name) for at, kind, _, name in expected]


def test_a_rejected_row_comes_with_the_good_row_before_it_in_its_file(tmp_path: Path) -> None:
    lines = [
        b'{"early": 1}',
        orjson.dumps(event(IMPRESSION, "a", 3)),
        b"",
        b"{broken \xff",
        orjson.dumps(event(IMPRESSION, "b", 7)),
        orjson.dumps(event(IMPRESSION, "c", 9, position=0)),
    ]
    (tmp_path / "impressions.jsonl").write_bytes(b"\n".join(lines))
    files = EventFiles(tmp_path)
    kinds_and_times = [(kind, at) for kind, at, _ in order_of(files)]
    assert kinds_and_times == [(IMPRESSION, 3), (3, 3), (3, 3), (IMPRESSION, 7), (3, 7)]
    letters = sorted(files.dead_letters, key=lambda letter: letter.offset)
    assert [(letter.source, letter.offset) for letter in letters] == [
        ("impressions.jsonl", 0),
        ("impressions.jsonl", 3),
        ("impressions.jsonl", 5),
    ]
    assert letters[1].payload == "{broken \N{REPLACEMENT CHARACTER}"
    assert letters[2].reason == "position must be at least 1. Received: 0."
    assert {row.payload for row in files.rejected} == {lines[0], lines[3], lines[5]}
    assert files.rows == 5 and files.kind_of_source()["impressions.jsonl"] == IMPRESSION


def test_rejected_parquet_rows_are_kept_as_json_that_no_reader_accepts(tmp_path: Path) -> None:
    bad = [
        event(IMPRESSION, "b", 2, features={"price": math.nan, "tags": ["x"]}),
        event(IMPRESSION, "c", 2, features={"price": 1.0, "tags": ["x", None]}),
        event(IMPRESSION, "d", 2, event_id=None),
        event(IMPRESSION, "e", 2, propensity=2.0),
        event(IMPRESSION, "f", 2, event_time=NOW + 50),
    ]
    write_parquet(tmp_path / "impressions.parquet", IMPRESSION, [event(IMPRESSION, "a", 1), *bad])
    files = EventFiles(tmp_path)
    assert files.impressions.column("event_id").to_pylist() == ["a"]
    payloads = [row.payload for row in files.rejected]
    assert len(payloads) == 5
    assert usable_rows(IMPRESSION, decode_json(IMPRESSION, payloads))[0].num_rows == 0


def test_raw_malformed_messages_come_at_their_own_time(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "impressions.jsonl", [event(IMPRESSION, "a", 1), event(IMPRESSION, "b", 5)])
    good = orjson.dumps(event(CLICK, "late", 2)).decode()
    messages = [
        {"topic": "clicks", "value": "{", "arrival_time": NOW + 3},
        {"topic": "conversions", "value": "", "arrival_time": NOW + 4},
        {"topic": "clicks", "value": good, "arrival_time": NOW + 4, "fault": "none at all"},
    ]
    write_jsonl(tmp_path / "malformed.jsonl", messages)
    files = EventFiles(tmp_path)
    assert order_of(files) == [
        (IMPRESSION, 1, "a"),
        (CLICK, 2, "late"),
        (DEAD_LETTER, 3, "{"),
        (DEAD_LETTER, 4, ""),
        (IMPRESSION, 5, "b"),
    ]
    sources = [letter.source for letter in files.dead_letters]
    assert sources == ["malformed.jsonl:clicks", "malformed.jsonl:conversions"]
    assert [files.kind_of_source()[source] for source in sources] == [CLICK, CONVERSION]
    assert [row.kind for row in files.rejected] == [CLICK, CONVERSION]


def test_a_malformed_file_that_is_itself_malformed_is_an_error_with_its_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "impressions.jsonl", [event(IMPRESSION, "a", 1)])
    for line in (b'{"topic": "views", "value": "", "arrival_time": 1}', b"[]", b"{"):
        (tmp_path / "malformed.jsonl").write_bytes(line + b"\n")
        with pytest.raises(DataError, match=r"malformed\.jsonl line 1: expected an object with topic"):
            EventFiles(tmp_path)


@pytest.fixture
def log(tmp_path: Path) -> EventFiles:
    rng = np.random.default_rng(3)
    for kind, topic in enumerate(TOPICS):
        times = rng.integers(0, 200, 100)
        write_jsonl(
            tmp_path / f"{topic}.jsonl", [event(kind, f"{kind}{i}", int(t)) for i, t in enumerate(times)]
        )
    with (tmp_path / "clicks.jsonl").open("ab") as file:
        file.write(b"broken\n")
    return EventFiles(tmp_path)


def joined(blocks: list[EventBlock]) -> list[tuple[Any, ...]]:
    whole = EventBlock.concat(blocks)
    return [*zip(whole.kind.tolist(), whole.arrival_time.tolist(), whole.offset.tolist(), strict=True)] + [
        tuple(table.column("event_id").to_pylist()) for table in whole.tables
    ]


def test_blocks_of_any_size_tell_the_same_story(log: EventFiles) -> None:
    whole = [*log.blocks()]
    assert len(whole) == 1 and len(whole[0]) == log.rows == 301
    for size in (1, 7, 100, 301):
        blocks = [*log.blocks(block_rows=size)]
        assert {len(block) for block in blocks[:-1]} <= {size}
        assert joined(blocks) == joined(whole)
        assert sum(len(block.dead_letters) for block in blocks) == 1


def test_blocks_from_the_middle_begin_with_the_right_row(log: EventFiles) -> None:
    assert joined([*log.blocks(0, 120, 50), *log.blocks(120, None, 33)]) == joined([*log.blocks()])
    (block,) = log.blocks(17, 20)
    assert block.offset.tolist() == [17, 18, 19] and set(block.partition) == set(block.row) == {0}
    assert [*log.blocks(301)] == [] and [*log.blocks(5, 5)] == []


def test_impressions_before_a_time_are_those_that_had_become_known(log: EventFiles) -> None:
    before = log.impressions_before(NOW + 100)
    assert before.num_rows == int((log.impression_arrival_time < NOW + 100).sum()) > 0
    assert log.impression_arrival_time.tolist() == sorted(log.impression_arrival_time.tolist())


def test_digest_follows_names_and_content_only(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "impressions.jsonl", [event(IMPRESSION, "a", 1)])
    first = EventFiles(tmp_path).digest()
    (tmp_path / "impressions.jsonl").touch()
    (tmp_path / "notes.txt").write_text("not part of the log")
    assert EventFiles(tmp_path).digest() == first
    write_jsonl(tmp_path / "impressions.jsonl", [event(IMPRESSION, "b", 1)])
    second = EventFiles(tmp_path).digest()
    (tmp_path / "impressions.jsonl").rename(tmp_path / "impressions-2.jsonl")
    assert len({first, second, EventFiles(tmp_path).digest()}) == 3


def test_clicks_and_conversions_may_be_missing_or_empty(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "impressions.jsonl", [event(IMPRESSION, "a", 1)])
    (tmp_path / "clicks.jsonl").touch()
    pq.write_table(pa.table({}), tmp_path / "conversions.parquet")
    files = EventFiles(tmp_path)
    assert (files.clicks.num_rows, files.conversions.num_rows, files.rows) == (0, 0, 1)


def test_a_folder_without_impressions_is_an_error_that_lists_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The folder has: \(nothing\)"):
        EventFiles(tmp_path)
    (tmp_path / "clicks.csv").touch()
    with pytest.raises(DataError, match=r"expected impressions\*.*The folder has: clicks\.csv\."):
        EventFiles(tmp_path)
    with pytest.raises(DataError, match="cannot read the event folder"):
        EventFiles(tmp_path / "absent")


def test_impressions_none_of_which_can_be_used_are_an_error_with_the_first_reason(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "impressions.jsonl", [event(IMPRESSION, "a", 1, position=0)])
    with pytest.raises(DataError, match=r"none of the 1 .*row 0: position must be at least 1"):
        EventFiles(tmp_path)
    (tmp_path / "impressions.jsonl").write_text("")
    with pytest.raises(DataError, match="have no rows"):
        EventFiles(tmp_path)


def test_the_same_file_in_two_formats_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "impressions.jsonl", [event(IMPRESSION, "a", 1)])
    write_parquet(tmp_path / "impressions.parquet", IMPRESSION, [event(IMPRESSION, "a", 1)])
    with pytest.raises(DataError, match="the same events in two formats: impressions as"):
        EventFiles(tmp_path)


def test_a_file_that_is_no_parquet_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "impressions.parquet").write_text("nonsense")
    with pytest.raises(DataError, match=r"impressions\.parquet cannot be read as a Parquet file"):
        EventFiles(tmp_path)
