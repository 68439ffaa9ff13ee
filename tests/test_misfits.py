"""Events that keep the contract but not the feature spec."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from pipelines.codec import decode_json
from pipelines.events import CLICK, DEAD_LETTER, IMPRESSION, DeadLetter, EventBlock, contract_schema
from pipelines.feature_spec import Categorical, FeatureSpec, Numeric, Sequence
from pipelines.features import encode
from pipelines.misfits import find_misfits, set_aside_misfits

SPEC = FeatureSpec(
    categorical=(Categorical(name="zone", buckets=8),),
    numeric=(Numeric(name="price", low=0, high=9, mean=1, std=1),),
    sequence=(Sequence(name="tags", buckets=8, max_length=2),),
)


def impressions(*bags: dict[str, Any]) -> pa.Table:
    events = [
        {
            "event_id": f"i{number}",
            "impression_id": f"i{number}",
            "event_time": 1 + number,
            "user_id": "u",
            "item_id": "a",
            "features": bag,
        }
        for number, bag in enumerate(bags)
    ]
    return decode_json(IMPRESSION, [orjson.dumps(event) for event in events]).table


def test_what_is_no_finite_number_does_not_fit_a_numeric_feature() -> None:
    prices = [2.5, "3", "cheap", None, ["4"], "nan", "", "1e3", 7]
    found = find_misfits(impressions(*({"price": price} for price in prices)), SPEC)
    assert sorted(found) == [2, 4, 5, 6]
    assert "feature price must be a finite number" in found[2] and "'cheap'" in found[2]


def test_a_row_fits_or_not_whatever_it_was_read_with() -> None:
    prices = [2.5, "3", "cheap", None, ["4"], "nan", "", "1e3", 7]
    alone = [bool(find_misfits(impressions({"price": price}), SPEC)) for price in prices]
    together = find_misfits(impressions(*({"price": price} for price in prices)), SPEC)
    assert [row in together for row in range(len(prices))] == alone


def test_categories_and_sequences_take_anything() -> None:
    bags = [{"zone": value, "tags": value} for value in (1, 2.5, "x", ["y", "z"], None)]
    assert find_misfits(impressions(*bags), SPEC) == {}
    assert len(encode(impressions(*bags), SPEC)) == 5


def test_misfits_become_dead_letters_in_their_place_and_the_rest_can_be_encoded() -> None:
    table = impressions({"price": 1}, {"price": "cheap"}, {"price": 2}, {"price": "dear"})
    kind = np.array([IMPRESSION, DEAD_LETTER, IMPRESSION, CLICK, IMPRESSION, IMPRESSION], np.int8)
    click = decode_json(CLICK, [b'{"event_id":"c","impression_id":"i0","event_time":9}']).table
    block = EventBlock(
        tables=(table, click, contract_schema(2).empty_table()),
        kind=kind,
        arrival_time=np.arange(6),
        partition=np.array([0, 0, 1, 0, 1, 1], np.int32),
        offset=np.arange(10, 16),
        row=np.zeros(6, np.int32),
        dead_letters=[DeadLetter("t", 0, 11, 0, "broken", "{")],
    )
    fitting = set_aside_misfits(block, SPEC, [("t", 0), ("t", 4)])
    assert fitting.kind.tolist() == [0, 3, 3, 1, 0, 3] and block.kind.tolist() == [0, 3, 0, 1, 0, 0]
    assert fitting.tables[IMPRESSION].column("event_id").to_pylist() == ["i0", "i2"]
    assert [(letter.partition, letter.offset) for letter in fitting.dead_letters] == [
        (0, 11),
        (4, 12),
        (4, 15),
    ]
    assert orjson.loads(fitting.dead_letters[1].payload)["features"] == {"price": "cheap"}
    assert len(encode(fitting.tables[IMPRESSION], SPEC)) == 2


def test_a_block_that_fits_is_left_as_it_is() -> None:
    table = impressions({"price": 1}, {"price": "2"})
    block = EventBlock(
        tables=(table, contract_schema(1).empty_table(), contract_schema(2).empty_table()),
        kind=np.zeros(2, np.int8),
        arrival_time=np.arange(2),
        partition=np.zeros(2, np.int32),
        offset=np.arange(2),
        row=np.zeros(2, np.int32),
    )
    assert set_aside_misfits(block, SPEC, [("t", 0)]) is block
