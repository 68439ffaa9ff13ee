"""Events on the wire: JSON and packed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import json_decoding
from pipelines.codec import (
    decode_json,
    decode_messages,
    decode_packed,
    encode_json,
    encode_packed,
    features_to_json,
    is_packed,
    with_features_from_json,
)
from pipelines.errors import DataError
from pipelines.events import CLICK, CONVERSION, IMPRESSION, contract_schema, feature_names
from pipelines.feature_columns import as_text, concat_events

NOW = 1_767_571_200_000


def impression(number: int = 1, **changes: Any) -> dict[str, Any]:
    name = f"i{number}"
    good = {
        "event_id": name,
        "impression_id": name,
        "event_time": NOW + number,
        "user_id": "u1",
        "item_id": "a1",
        "features": {"price": 2.5, "device": "phone", "tags": ["x", "y"], "age": 30},
    }
    return good | changes


def test_features_become_columns_sorted_by_name_and_absent_ones_null() -> None:
    events = [impression(1), impression(2, features={"colour": "red"}), impression(3, features=None)]
    table = decode_json(IMPRESSION, [orjson.dumps(event) for event in events]).table
    assert feature_names(table) == ["age", "colour", "device", "price", "tags"]
    assert table.column("price").to_pylist() == [2.5, None, None]
    assert table.column("tags").to_pylist() == [["x", "y"], None, None]
    assert table.column("colour").to_pylist() == [None, "red", None]
    assert table.column("arrival_time").to_pylist() == [NOW + 1, NOW + 2, NOW + 3]


def test_served_answers_become_columns_that_are_no_features() -> None:
    served = {"release": "r1", "logit": -2, "probability": 0.25, "position": 4}
    events = [impression(1, served=served), impression(2)]
    table = decode_json(IMPRESSION, [orjson.dumps(event) for event in events]).table
    assert table.column("served_release").to_pylist() == ["r1", None]
    assert table.column("served_logit").to_pylist() == [-2.0, None]
    assert table.column("served_probability").to_pylist() == [0.25, None]
    assert table.column("served_position").to_pylist() == [4, None]
    assert not {name for name in feature_names(table) if name.startswith("served")}


REFUSED: list[tuple[bytes | None, str]] = [
    (None, "empty message (tombstone)"),
    (b"", "text that is not JSON"),
    (b'{"event_id": "i', "text that is not JSON"),
    (b'{"value": NaN}', "text that is not JSON"),
    (b'{"event_id": "\xff"}', "text that is not JSON"),
    (b"[1]", "Received: [1]."),
    (b"null", "Received: null."),
    (orjson.dumps(impression(version=2)), "version of an event must be 1. Received: 2."),
    (orjson.dumps(impression(version=[1])), "version of an event must be 1. Received: [1]."),
    (orjson.dumps(impression(event_id=7)), "event_id must be a string. Received: 7."),
    (orjson.dumps(impression(event_time="now")), 'event_time must be a whole number. Received: "now".'),
    (orjson.dumps(impression(event_time=1.5)), "event_time must be a whole number. Received: 1.5."),
    (orjson.dumps(impression(event_time=True)), "event_time must be a whole number. Received: true."),
    (orjson.dumps(impression(event_time=1 << 63)), "event_time must be a whole number."),
    (orjson.dumps(impression(position=1 << 31)), "position must be a whole number. Received: 2147483648."),
    (orjson.dumps(impression(propensity="0.5")), 'propensity must be a number. Received: "0.5".'),
    (orjson.dumps(impression(propensity=False)), "propensity must be a number. Received: false."),
    (orjson.dumps(impression(features=[1])), "features must be an object. Received: [1]."),
    (orjson.dumps(impression(features={"a": True})), "feature a must be a string, a number or a list of"),
    (orjson.dumps(impression(features={"a": {"b": 1}})), 'Received: {"b":1}.'),
    (orjson.dumps(impression(features={"a": [1]})), "Received: [1]."),
    (orjson.dumps(impression(features={"a": ["x", None]})), 'Received: ["x",null].'),
    (orjson.dumps(impression(features={"user_id": "u"})), "feature user_id bears the name of a field"),
    (orjson.dumps(impression(served="r1")), 'served must be an object. Received: "r1".'),
    (orjson.dumps(impression(served={"logit": "1"})), 'served.logit must be a number. Received: "1".'),
]


@pytest.mark.parametrize(("payload", "reason"), REFUSED)
def test_a_message_that_cannot_be_used_is_rejected_and_its_neighbours_are_kept(
    payload: bytes | None, reason: str
) -> None:
    neighbours = [orjson.dumps(impression(number)) for number in (1, 2)]
    decoded = decode_json(IMPRESSION, [neighbours[0], payload, neighbours[1]])
    assert decoded.row.tolist() == [0, 2] and decoded.rows == 3
    assert decoded.table.column("event_id").to_pylist() == ["i1", "i2"]
    assert list(decoded.rejected) == [1] and reason in decoded.rejected[1]


def test_all_faults_of_a_batch_are_found_at_once() -> None:
    payloads = [payload for payload, _ in REFUSED]
    decoded = decode_json(IMPRESSION, payloads)
    assert sorted(decoded.rejected) == list(range(len(payloads))) and decoded.table.num_rows == 0


def test_whole_numbers_written_with_a_fraction_are_whole_numbers() -> None:
    payload = b'{"event_id":"c","impression_id":"i","event_time":1.7675712e12}'
    assert decode_json(CLICK, [payload]).table.column("event_time").to_pylist() == [NOW]


def test_no_messages_give_no_rows() -> None:
    for kind in (IMPRESSION, CLICK, CONVERSION):
        decoded = decode_json(kind, [])
        assert decoded.table.schema == contract_schema(kind)
        assert (decoded.table.num_rows, decoded.rows, decoded.rejected) == (0, 0, {})


values = st.one_of(
    st.none(),
    st.text(max_size=4),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.text(max_size=2), max_size=2),
)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), values), max_size=12), st.integers(1, 5))
def test_a_value_reads_the_same_in_any_batch(bags: list[dict[str, Any]], rows_at_once: int) -> None:
    payloads = [orjson.dumps(impression(features=bag)) for bag in bags]
    whole = decode_json(IMPRESSION, payloads).table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_decoding, "_ROWS_AT_ONCE", rows_at_once)
        cut = decode_json(IMPRESSION, payloads).table
    alone = [decode_json(IMPRESSION, [payload]).table for payload in payloads]
    for row, bag in enumerate(bags):
        # What orjson gives back: whole numbers beyond 64 bits become floats.
        expected = {name: as_text(value) for name, value in orjson.loads(orjson.dumps(bag)).items()}
        for table in (whole.slice(row, 1), cut.slice(row, 1), alone[row]):
            texts = {name: as_text(table.column(name)[0].as_py()) for name in feature_names(table)}
            assert {n: t for n, t in texts.items() if t is not None} == {
                n: t for n, t in expected.items() if t is not None
            }


def test_whole_numbers_keep_all_their_digits_beside_fractions() -> None:
    large = (1 << 53) + 1
    tables = [
        decode_json(IMPRESSION, [orjson.dumps(impression(features={"a": value}))]).table
        for value in (large, 0.5)
    ]
    assert concat_events(IMPRESSION, tables).column("a").to_pylist() == [str(large), "0.5"]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
bag = st.fixed_dictionaries(
    {},
    optional={
        "text": texts,
        'na"me\n': texts,
        "whole": st.integers(-(2**63), 2**63 - 1),
        "number": st.floats(allow_nan=False, allow_infinity=False),
        "list": st.lists(texts, max_size=3),
    },
)


@settings(max_examples=60)
@given(st.lists(bag, min_size=1, max_size=5))
def test_events_survive_json(bags: list[dict[str, Any]]) -> None:
    events = [impression(number, features=one, position=number + 1) for number, one in enumerate(bags)]
    table = decode_json(IMPRESSION, [orjson.dumps(event) for event in events]).table
    written = encode_json(IMPRESSION, table)
    for event, line in zip(events, written, strict=True):
        assert orjson.loads(line) == event | {"arrival_time": event["event_time"]}
    again = decode_json(IMPRESSION, written)
    assert not again.rejected
    assert [orjson.loads(line) for line in encode_json(IMPRESSION, again.table)] == [
        orjson.loads(line) for line in written
    ]


@settings(max_examples=60)
@given(st.lists(bag, min_size=1, max_size=5))
def test_features_survive_the_lake(bags: list[dict[str, Any]]) -> None:
    table = decode_json(IMPRESSION, [orjson.dumps(impression(features=one)) for one in bags]).table
    stored = table.select(contract_schema(IMPRESSION).names).append_column(
        "features_json", features_to_json(table)
    )
    restored = with_features_from_json(stored)
    for features in (features_to_json(table), features_to_json(restored)):
        assert [orjson.loads(text) for text in features.to_pylist()] == bags


def test_served_answers_survive_json() -> None:
    served = {"release": "r1", "logit": -2.5, "probability": 0.25, "position": 4}
    events = [impression(1, served=served), impression(2)]
    table = decode_json(IMPRESSION, [orjson.dumps(event) for event in events]).table
    written = [orjson.loads(line) for line in encode_json(IMPRESSION, table)]
    assert [event.get("served") for event in written] == [served, None]


def test_conversions_survive_json() -> None:
    event = {"event_id": "v", "impression_id": "i", "event_time": 5, "arrival_time": 6, "value": 1.5}
    table = decode_json(CONVERSION, [orjson.dumps(event)]).table
    assert [orjson.loads(line) for line in encode_json(CONVERSION, table)] == [event | {"op": "assert"}]


def test_numbers_that_json_does_not_know_are_refused_not_dropped() -> None:
    with pytest.raises(DataError, match="price has NaN or infinite ones"):
        features_to_json(pa.table({"price": [1.0, float("nan")]}))


def test_a_lake_value_that_is_no_object_of_features_is_an_error() -> None:
    for text in ("{", "[1]", '{"a": {}}'):
        with pytest.raises(DataError, match="column features_json must hold JSON objects of features"):
            with_features_from_json(pa.table({"features_json": ['{"a": 1}', text]}))


def packable(rows: int) -> pa.Table:
    return decode_json(IMPRESSION, [orjson.dumps(impression(number)) for number in range(rows)]).table


def test_packed_events_come_back_as_they_were() -> None:
    table = packable(5)
    payload = encode_packed(IMPRESSION, table.slice(1, 3))
    assert is_packed(payload) and not is_packed(b'{"a": 1}') and not is_packed(None)
    decoded = decode_packed(IMPRESSION, payload)
    assert decoded.table.equals(table.slice(1, 3))
    assert (decoded.row.tolist(), decoded.rejected, decoded.rows) == ([0, 1, 2], {}, 3)


def test_a_packed_message_of_another_kind_version_or_damaged_is_one_rejected_row() -> None:
    good = encode_packed(IMPRESSION, packable(3))
    foreign = pa.BufferOutputStream()
    with pa.ipc.new_stream(foreign, packable(3).schema) as writer:
        writer.write_table(packable(3))
    wrong_type = encode_packed(CLICK, pa.table({"event_id": [1], "impression_id": ["i"], "event_time": [1]}))
    cases = [
        (encode_packed(CLICK, packable(3)), "expected packed impressions of version 1. Received: kind click"),
        (foreign.getvalue().to_pybytes(), "kind none, version none"),
        (good[: len(good) // 2], "expected an Arrow IPC stream"),
        (good[:4] + b"garbage", "expected an Arrow IPC stream"),
    ]
    for payload, reason in cases:
        decoded = decode_packed(IMPRESSION, payload)
        assert decoded.rows == 1 and decoded.table.num_rows == 0
        assert reason in decoded.rejected[0]
    assert "column event_id must be string" in decode_packed(CLICK, wrong_type).rejected[0]


def test_damage_anywhere_in_a_packed_message_never_ends_in_another_error() -> None:
    payload = bytearray(encode_packed(IMPRESSION, packable(3)))
    rng = np.random.default_rng(1)
    for place in rng.integers(4, len(payload), 400):
        damaged = bytearray(payload)
        damaged[place] ^= int(rng.integers(1, 256))
        decode_packed(IMPRESSION, bytes(damaged))


def test_json_and_packed_messages_may_be_mixed() -> None:
    table = packable(6)
    lines = encode_json(IMPRESSION, table)
    bad_type = encode_packed(IMPRESSION, table.slice(0, 2).set_column(0, "event_id", pa.array([1, 2])))
    payloads = [
        lines[0],
        encode_packed(IMPRESSION, table.slice(1, 2)),
        encode_packed(IMPRESSION, table.slice(3, 1)),
        b"broken",
        bad_type,
        encode_packed(IMPRESSION, table.slice(0, 0)),
        *lines[4:],
    ]
    messages = decode_messages(IMPRESSION, payloads)
    assert messages.message.tolist() == [0, 1, 1, 2, 3, 4, 6, 7]
    assert messages.row_in_message.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert sorted(messages.decoded.rejected) == [4, 5]
    decoded = messages.decoded
    assert sorted(decoded.row.tolist()) == [0, 1, 2, 3, 6, 7]
    in_order = decoded.table.take(pa.array(np.argsort(decoded.row)))
    assert encode_json(IMPRESSION, in_order) == lines


def test_no_messages_at_all() -> None:
    messages = decode_messages(CLICK, [])
    assert messages.decoded.rows == len(messages.message) == 0


def test_json_from_other_writers_is_read() -> None:
    text = json.dumps(impression(features={"city": "Zürich", "emoji": "\U0001f600"}), indent=2)
    table = decode_json(IMPRESSION, [text.encode()]).table
    assert table.column("city").to_pylist() == ["Zürich"]
    assert table.column("emoji").to_pylist() == ["\U0001f600"]
