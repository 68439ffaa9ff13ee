"""Feature extraction: hashing, nulls, and one encoding whatever the events were read from."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipelines.codec import decode_json
from pipelines.conform import conform
from pipelines.errors import ConfigError, DataError
from pipelines.events import IMPRESSION
from pipelines.feature_spec import Categorical, Cross, FeatureSpec, Hour, Numeric, Sequence
from pipelines.features import Encoded, as_text, encode, encode_rows
from pipelines.hashing import HASH_SEED, hash_column, hash_text, mix

NOW = 1_767_571_200_000  # 2026-01-05T00:00:00Z
HOUR = 3_600_000

SPEC = FeatureSpec(
    categorical=(
        Categorical(name="user_id", buckets=64, group="user"),
        Categorical(name="item_id", buckets=32, group="item"),
        Categorical(name="zone", buckets=16),
        Categorical(name="position", buckets=8, group="position", wide_only=True),
    ),
    numeric=(
        Numeric(name="price", low=0, high=100, mean=10, std=4, boundaries=(1.0, 5.0, 20.0)),
        Numeric(name="age", transform="log1p", low=1, high=99, mean=2, std=0.5),
    ),
    hour=Hour(),
    sequence=(Sequence(name="tags", buckets=32, max_length=3),),
    cross=(Cross(of=("item_id", "zone"), buckets=64),),
)
SEGMENTS = ("zone",)


def row(**changes: Any) -> dict[str, Any]:
    features = {"zone": "a", "price": 3, "age": 30, "tags": ["x", "y"]} | changes.pop("features", {})
    return {
        "event_id": "i",
        "impression_id": "i",
        "event_time": NOW,
        "user_id": "u",
        "item_id": "a",
        "position": 2,
        "features": features,
    } | changes


def from_json(*rows: dict[str, Any]) -> pa.Table:
    return decode_json(IMPRESSION, [orjson.dumps(one) for one in rows]).table


def columns_of(encoded: Encoded, field: str) -> Any:
    """Bucket columns of one field, as rows of that field (0 is its null)."""
    index = SPEC.field_names.index(field)
    chosen = [c for c, owner in enumerate(SPEC.column_field) if owner == index]
    return (encoded.buckets[:, chosen] - SPEC.offsets[index]).tolist()


def assert_equal(left: Encoded, right: Encoded) -> None:
    for name in ("buckets", "numbers", "user_key", "segment_key"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def reference_xxh64(data: bytes, seed: int) -> int:
    """XXH64 for inputs shorter than 32 bytes, from the algorithm's description."""
    mask, prime = (
        (1 << 64) - 1,
        (
            0x9E3779B185EBCA87,
            0xC2B2AE3D27D4EB4F,
            0x165667B19E3779F9,
            0x85EBCA77C2B2AE63,
            0x27D4EB2F165667C5,
        ),
    )

    def rotated(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (64 - bits))) & mask

    total = (seed + prime[4] + len(data)) & mask
    while len(data) >= 8:
        lane = rotated(int.from_bytes(data[:8], "little") * prime[1] & mask, 31) * prime[0] & mask
        total, data = (rotated(total ^ lane, 27) * prime[0] + prime[3]) & mask, data[8:]
    if len(data) >= 4:
        total = (
            rotated(total ^ (int.from_bytes(data[:4], "little") * prime[0] & mask), 23) * prime[1] + prime[2]
        ) & mask
        data = data[4:]
    for byte in data:
        total = rotated(total ^ (byte * prime[4] & mask), 11) * prime[0] & mask
    total = (total ^ (total >> 33)) * prime[1] & mask
    total = (total ^ (total >> 29)) * prime[2] & mask
    return total ^ (total >> 32)


def test_hash_is_xxh64_of_the_utf8_bytes() -> None:
    # Published test vectors of XXH64 with seed 0.
    for text, digest in (("", 0xEF46DB3751D8E999), ("a", 0xD24EC4F1A98C6E5B), ("abc", 0x44BC2CF5AD770999)):
        assert hash_text(text, 0) == digest == reference_xxh64(text.encode(), 0)
    for text in ("user_17", "Zürich", "x" * 31, "\U0001f600"):
        assert hash_text(text) == reference_xxh64(text.encode(), HASH_SEED)


@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=8))
def test_a_column_hashes_like_its_values(values: list[str | None]) -> None:
    expected = [0 if v is None else xxhash.xxh64_intdigest(v.encode(), HASH_SEED) for v in values]
    for column in (
        pa.array(values, pa.string()),
        pa.array(values, pa.large_string()),
        pa.chunked_array([pa.array(values[:3], pa.string()), pa.array(values[3:], pa.string())]),
    ):
        assert hash_column(column).tolist() == expected


def test_mixing_two_hashes_depends_on_their_order() -> None:
    left, right = hash_column(pa.array(["a", "b"])), hash_column(pa.array(["b", "a"]))
    assert mix(left, right)[0] != mix(right, left)[0]
    assert mix(left, right)[0] == mix(right, left)[1]


def test_whole_numbers_are_hashed_without_a_fraction() -> None:
    zones = [from_json(row(features={"zone": zone})) for zone in (3, 3.0, "3")]
    zones.append(from_json(row(features={"zone": 3}), row(features={"zone": 3.5})).slice(0, 1))
    zones.append(from_json(row(features={"zone": 3}), row(features={"zone": "b"})).slice(0, 1))
    for table in zones[1:]:
        assert_equal(encode(table, SPEC, SEGMENTS), encode(zones[0], SPEC, SEGMENTS))
    assert as_text(2.5) == "2.5" and as_text(1e300) == str(int(1e300))


@pytest.mark.parametrize("type_", [pa.int8(), pa.int64(), pa.float32(), pa.float64(), pa.string()])
def test_json_and_parquet_columns_of_any_type_give_the_same_encoding(type_: pa.DataType) -> None:
    rows = [row(features={"price": 7, "zone": 3}), row(features={"price": 50, "zone": 4})]
    table = from_json(*rows)
    other = conform(
        IMPRESSION,
        table.set_column(table.column_names.index("price"), "price", table.column("price").cast(type_))
        .set_column(table.column_names.index("zone"), "zone", table.column("zone").cast(type_))
        .set_column(
            table.column_names.index("user_id"), "user_id", table.column("user_id").cast("large_string")
        ),
    )
    assert_equal(encode(other, SPEC, SEGMENTS), encode(table, SPEC, SEGMENTS))


def test_requests_are_encoded_like_events() -> None:
    rows = [row(), row(user_id="v", features={"zone": None, "tags": []}), row(event_time=NOW + 5 * HOUR)]
    assert_equal(encode_rows([*rows], SPEC, SEGMENTS), encode(from_json(*rows), SPEC, SEGMENTS))


def test_a_null_is_the_first_row_of_its_field_and_the_mean_of_its_number() -> None:
    bare = from_json({**row(position=None), "features": None})
    encoded = encode(bare, SPEC, SEGMENTS)
    for field in ("zone", "price", "item_id_x_zone", "position"):
        assert columns_of(encoded, field) == [[0]]
    assert encoded.numbers.tolist() == [[0.0, 0.0]]
    tags = [c for c, owner in enumerate(SPEC.column_field) if SPEC.field_names[owner] == "tags"]
    assert encoded.buckets[0, tags].tolist() == [0, 0, 0]  # padding of the table, not a value


def test_an_empty_text_is_a_value_and_no_null() -> None:
    encoded = encode(from_json(row(features={"zone": ""}), row(features={"zone": None})), SPEC)
    assert columns_of(encoded, "zone")[0] != [0] and columns_of(encoded, "zone")[1] == [0]


def test_buckets_follow_the_hash_and_stay_inside_their_field() -> None:
    rows = [row(user_id=f"u{number}") for number in range(200)]
    encoded = encode(from_json(*rows), SPEC)
    users = columns_of(encoded, "user_id")
    assert users == [[1 + reference_xxh64(f"u{n}".encode(), HASH_SEED) % 63] for n in range(200)]
    assert {user for (user,) in users} <= set(range(1, 64))
    assert encoded.buckets.max() < SPEC.table_rows


def test_crosses_mix_two_hashes_and_are_null_when_either_is() -> None:
    encoded = encode(from_json(row(), row(features={"zone": None}), row(item_id="b")), SPEC)
    item, zone = hash_column(pa.array(["a"])), hash_column(pa.array(["a"]))
    expected = 1 + int(mix(item, zone)[0]) % 63
    crossed = columns_of(encoded, "item_id_x_zone")
    assert crossed[:2] == [[expected], [0]] and crossed[2] != crossed[0]


@pytest.mark.parametrize(
    ("price", "cut"), [(-5, 1), (0.99, 1), (1.0, 2), (4.99, 2), (5, 3), (20, 4), (1000, 4), (None, 0)]
)
def test_numbers_are_cut_at_the_boundaries_before_clipping(price: float | None, cut: int) -> None:
    assert columns_of(encode(from_json(row(features={"price": price})), SPEC), "price") == [[cut]]


def test_numbers_are_clipped_transformed_and_standardised() -> None:
    rows = [row(features={"price": price, "age": age}) for price, age in ((14, 1), (1000, 20), (-3, 500))]
    numbers = encode(from_json(*rows), SPEC).numbers
    np.testing.assert_allclose(numbers[:, 0], [(14 - 10) / 4, (100 - 10) / 4, (0 - 10) / 4])
    np.testing.assert_allclose(numbers[:, 1], (np.log1p(np.array([0, 19, 98])) - 2) / 0.5, rtol=1e-6)


def test_whole_numbers_too_large_for_a_float_are_rounded_not_refused() -> None:
    encoded = encode(from_json(row(features={"price": (1 << 53) + 1})), SPEC)
    assert columns_of(encoded, "price") == [[4]]


def test_sequences_keep_their_first_values_in_order_and_pad_with_zero() -> None:
    rows = [row(features={"tags": tags}) for tags in (["x"], ["x", "y", "z", "w"], [], None)]
    rows.append({key: value for key, value in row().items() if key != "features"})
    encoded = encode(from_json(*rows), SPEC)
    chosen = [c for c, owner in enumerate(SPEC.column_field) if SPEC.field_names[owner] == "tags"]
    start = SPEC.offsets[SPEC.field_names.index("tags")]
    x, y, z = (start + 1 + hash_text(text) % 31 for text in "xyz")
    expected = [[x, 0, 0], [x, y, z], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert encoded.buckets[:, chosen].tolist() == expected


def test_a_sequence_reads_the_same_beside_single_values() -> None:
    mixed = [row(features={"tags": tags}) for tags in (["x", "y"], "x", 7)]
    alone = [encode(from_json(one), SPEC) for one in mixed]
    together = encode(from_json(*mixed), SPEC)
    assert together.buckets.tolist() == [one.buckets[0].tolist() for one in alone]
    assert_equal(encode(from_json(row(features={"tags": ["7"]})), SPEC), alone[2])


def test_a_list_in_a_categorical_feature_reads_the_same_in_any_batch() -> None:
    listed, single = row(features={"zone": ["a", "b"]}), row(features={"zone": "a"})
    together = encode(from_json(listed, single), SPEC)
    assert together.buckets[0].tolist() == encode(from_json(listed), SPEC).buckets[0].tolist()


@pytest.mark.parametrize("hour", [0, 5, 23])
def test_hour_of_day_is_utc(hour: int) -> None:
    encoded = encode(from_json(row(event_time=NOW + hour * HOUR + HOUR - 1)), SPEC)
    assert columns_of(encoded, "hour_of_day") == [[1 + hour]]


def test_wide_only_fields_come_last() -> None:
    assert SPEC.field_names[-SPEC.wide_only_fields :] == ["position"]
    assert SPEC.column_field == sorted(SPEC.column_field)
    assert len(SPEC.column_field) == encode(from_json(row()), SPEC).buckets.shape[1]


def test_keys_are_the_hashes_of_user_and_segment() -> None:
    encoded = encode(from_json(row()), SPEC, SEGMENTS)
    assert encoded.user_key.view(np.uint64).tolist() == [hash_text("u")]
    assert encoded.segment_key.view(np.uint64).tolist() == [[hash_text("a")]]


def test_text_in_a_numeric_feature_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match="feature price is numeric in the feature spec"):
        encode(from_json(row(features={"price": "cheap"})), SPEC)


def test_no_rows_encode_to_no_rows() -> None:
    encoded = encode(from_json(row()).slice(0, 0), SPEC, SEGMENTS)
    assert encoded.buckets.shape == (0, len(SPEC.column_field)) and len(encoded) == 0


def test_spec_survives_toml_and_its_digest_follows_the_encoding_only() -> None:
    again = FeatureSpec.from_toml(SPEC.to_toml())
    assert again == SPEC and again.digest() == SPEC.digest()
    fewer = SPEC.model_copy(update={"cross": ()})
    assert fewer.digest() != SPEC.digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = ", "is not valid TOML"),
        ("versio = 1", "key versio"),
        ('[[categorical]]\nname = "a"\nbuckets = 1', "key categorical.0.buckets"),
        ('[[cross]]\nof = ["a", "b"]\nbuckets = 8', "Not among them: a, b"),
        ('[[categorical]]\nname = "a"\nbuckets = 4\n' * 2, "Received twice: a"),
    ],
)
def test_a_spec_that_does_not_fit_is_an_error_that_names_the_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureSpec.from_toml(text)
