"""A feature spec proposed from the first part of a log."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.cli import cli
from pipelines.bucket_sizes import bucket_count, encode_values
from pipelines.conform import conform
from pipelines.errors import DataError
from pipelines.events import IMPRESSION
from pipelines.feature_spec import Categorical, FeatureSpec, Numeric, Sequence
from pipelines.features import encode
from pipelines.hashing import hash_column
from pipelines.inference import infer_spec

NOW = 1_767_571_200_000
HOUR = 3_600_000
ROWS = 6_000


def impressions(rows: int = ROWS, span: int = 30 * HOUR, **features: Any) -> pa.Table:
    rng = np.random.default_rng(5)
    names = [f"i{n}" for n in range(rows)]
    columns: dict[str, Any] = {
        "event_id": names,
        "impression_id": names,
        "event_time": NOW + np.arange(rows) * span // rows,
        "user_id": [f"u{n}" for n in rng.integers(0, 500, rows)],
        "item_id": [f"a{n}" for n in rng.integers(0, 40, rows)],
        "position": rng.integers(1, 7, rows),
    }
    return conform(IMPRESSION, pa.table(columns | features))


def part(spec: FeatureSpec, name: str) -> Any:
    parts: list[Any] = [*spec.categorical, *spec.numeric, *spec.sequence]
    found = [one for one in parts if one.name == name]
    return found[0] if found else None


def reasons(spec: FeatureSpec) -> dict[str, str]:
    return {one.name: one.reason for one in spec.left_out}


def drawn(values: list[Any], rows: int = ROWS) -> list[Any]:
    return [values[n] for n in np.random.default_rng(1).integers(0, len(values), rows)]


def test_types_follow_the_columns() -> None:
    rng = np.random.default_rng(2)
    spec = infer_spec(
        impressions(
            device=drawn(["phone", "desktop"]),
            weekday=drawn([0, 1, 2, 3, 4, 5, 6]),
            floors=drawn([1.0, 2.0, 3.0]),
            views=rng.integers(0, 100_000, ROWS),
            campaign_id=drawn(list(range(200))),
            price=rng.random(ROWS),
            tags=drawn([["x"], ["x", "y"], []]),
        )
    )
    assert isinstance(part(spec, "device"), Categorical)
    assert isinstance(part(spec, "weekday"), Categorical)
    assert isinstance(part(spec, "floors"), Categorical)
    assert isinstance(part(spec, "campaign_id"), Categorical)
    assert isinstance(part(spec, "views"), Numeric)
    assert isinstance(part(spec, "price"), Numeric)
    assert isinstance(part(spec, "tags"), Sequence)
    assert spec.left_out == ()


def test_position_enters_wide_only() -> None:
    position = part(infer_spec(impressions()), "position")
    assert position.wide_only and position.group == "position"


def test_a_column_that_names_rows_is_left_out_with_the_reason() -> None:
    spec = infer_spec(impressions(request=[f"r{n}" for n in range(ROWS)]))
    assert part(spec, "request") is None
    assert reasons(spec) == {"request": f"an identifier: {ROWS} values in {ROWS} rows"}


def test_a_column_whose_values_do_not_come_back_is_left_out() -> None:
    # Each session lasts for five rows and is never seen again.
    spec = infer_spec(impressions(session=[f"s{n // 5}" for n in range(ROWS)]))
    assert "values do not come back: 100% of the last quarter's rows" in reasons(spec)["session"]


def test_a_constant_column_is_left_out_but_not_one_that_is_sometimes_absent() -> None:
    spec = infer_spec(impressions(site=["s"] * ROWS, zero=[0.5] * ROWS, promo=drawn(["yes", None])))
    assert sorted(reasons(spec)) == ["site", "zero"] and "constant" in reasons(spec)["site"]
    assert isinstance(part(spec, "promo"), Categorical)


def test_users_and_items_are_kept_if_they_come_back_at_all() -> None:
    table = impressions()
    index = table.column_names.index("user_id")
    rare = table.set_column(index, "user_id", pa.array([f"u{n * 4 // 5}" for n in range(ROWS)]))
    assert isinstance(part(infer_spec(rare), "user_id"), Categorical)
    never = table.set_column(index, "user_id", pa.array([f"u{n}" for n in range(ROWS)]))
    assert "hardly come back" in reasons(infer_spec(never))["user_id"]


def test_few_values_never_share_a_table_row() -> None:
    values = [f"value {n}" for n in range(40)]
    spec = infer_spec(impressions(zone=drawn(values)))
    buckets = part(spec, "zone").buckets
    inside = hash_column(pa.array(values)) % np.uint64(buckets - 1)
    assert len(set(inside.tolist())) == 40
    assert buckets >= 4 * 40 and buckets & (buckets - 1) == 0


def test_tables_have_room_for_values_that_are_still_to_come() -> None:
    closed = encode_values(pa.array(drawn([f"v{n}" for n in range(1000)], 8000)))
    growing = encode_values(pa.array([f"v{n // 8}" for n in range(8000)]))
    assert closed.distinct in range(990, 1001) and growing.distinct == 1000
    # Eight times as many rows to come, each eighth with a new value: nine times as many values.
    assert growing.expected(8) == pytest.approx(9000) and closed.expected(8) < 1010
    assert bucket_count(growing, 8) >= 4 * 9000 > bucket_count(closed, 8) >= 4 * 990
    assert bucket_count(encode_values(pa.array([str(n) for n in range(400_000)])), 3) == 1 << 18


def test_numbers_are_clipped_and_standardised_by_what_these_rows_hold() -> None:
    rng = np.random.default_rng(3)
    value = rng.normal(50.0, 4.0, ROWS)
    value[:3] = 1e9
    number = part(infer_spec(impressions(temperature=value)), "temperature")
    assert number.transform == "identity"
    low, high = np.quantile(value, [0.001, 0.999])
    assert (number.low, number.high) == pytest.approx((low, high), abs=1e-3)
    clipped = np.clip(value, low, high)
    assert (number.mean, number.std) == pytest.approx((clipped.mean(), clipped.std()), abs=1e-3)
    share = np.diff([0, *(np.searchsorted(np.sort(value), number.boundaries)), ROWS]) / ROWS
    assert 16 <= len(number.boundaries) <= 32 and share.max() < 2 / len(number.boundaries)


def test_skewed_amounts_are_logged_and_come_out_standardised() -> None:
    value = np.exp(np.random.default_rng(4).normal(3, 1, ROWS))
    table = impressions(price=value)
    spec = infer_spec(table)
    assert part(spec, "price").transform == "log1p"
    standard = encode(table, spec).numbers[:, 0]
    assert (standard.mean(), standard.std()) == pytest.approx((0, 1), abs=2e-3)


def test_numbers_far_from_zero_keep_their_digits() -> None:
    times = NOW + np.arange(ROWS)
    number = part(infer_spec(impressions(published=times)), "published")
    assert number.low < number.high and len(number.boundaries) == 24


def test_a_number_that_is_nearly_always_the_same_is_still_a_number() -> None:
    value = np.zeros(ROWS)
    value[7] = 2.5
    number = part(infer_spec(impressions(rare=value)), "rare")
    assert (number.low, number.high, number.boundaries) == (0.0, 2.5, (0.0,)) and number.std > 0


def test_sequences_are_as_long_as_most_lists_and_at_most_twenty() -> None:
    lists = [[f"t{k}" for k in range(n)] for n in drawn([1, 2, 3, 4], ROWS)]
    lists[0] = [f"t{k}" for k in range(50)]
    endless = [[f"t{k}" for k in range(30)]] * ROWS
    spec = infer_spec(impressions(tags=lists, words=endless, empty=[[]] * ROWS))
    assert part(spec, "tags").max_length == 4 and part(spec, "words").max_length == 20
    assert "constant" in reasons(spec)["empty"]


def test_properties_of_users_and_items_are_grouped_with_them_by_name_or_by_behaviour() -> None:
    table = impressions()
    city = [f"c{int(user[1:]) % 7}" for user in table.column("user_id").to_pylist()]
    shop = [f"s{int(item[1:]) % 9}" for item in table.column("item_id").to_pylist()]
    weight = [int(item[1:]) * 1.5 for item in table.column("item_id").to_pylist()]
    spec = infer_spec(
        impressions(city=city, shop=shop, weight=weight, device=drawn(["a", "b"]), user_age=drawn(["x", "y"]))
    )
    parts: list[Any] = [*spec.categorical, *spec.numeric]
    groups = {one.name: one.group for one in parts}
    assert groups["city"] == groups["user_age"] == "user"
    assert groups["shop"] == groups["weight"] == "item"
    assert groups["device"] == "context"


def test_hour_of_day_is_never_proposed() -> None:
    # Outcomes are late by hours: a row that is emitted again betrays itself by its hour (docs/adr/0004).
    assert infer_spec(impressions(span=72 * HOUR)).hour is None


def test_items_are_crossed_only_with_steady_columns_whose_pairs_are_seen_often() -> None:
    table = impressions(
        device=drawn(["phone", "desktop"]),
        zone=drawn([f"z{n}" for n in range(30)]),
        week=["one"] * (ROWS // 2) + ["two"] * (ROWS // 2),
    )
    assert [cross.of for cross in infer_spec(table).cross] == [("item_id", "device")]


def test_user_and_item_are_crossed_where_pairs_come_back() -> None:
    table = impressions()
    users = pa.array([f"u{n % 30}" for n in range(ROWS)])
    few = table.set_column(table.column_names.index("user_id"), "user_id", users)
    assert [cross.of for cross in infer_spec(few).cross] == [("user_id", "item_id")]
    assert infer_spec(table).cross == ()


def test_the_same_rows_give_the_same_spec_and_it_survives_toml() -> None:
    spec = infer_spec(impressions(price=np.arange(ROWS) * 0.37, device=drawn(["a", "b"])))
    again = infer_spec(impressions(price=np.arange(ROWS) * 0.37, device=drawn(["a", "b"])))
    assert spec.digest() == again.digest()
    assert FeatureSpec.from_toml(spec.to_toml()) == spec


def test_no_rows_or_nothing_to_learn_from_are_errors() -> None:
    with pytest.raises(DataError, match="Received none"):
        infer_spec(impressions().slice(0, 0))
    table = impressions(rows=100, span=HOUR)
    for name in ("user_id", "item_id", "position"):
        index = table.column_names.index(name)
        table = table.set_column(index, name, pa.array([table.column(name)[0].as_py()] * 100))
    with pytest.raises(DataError, match="user_id: constant: 1 value in 100 rows; item_id"):
        infer_spec(table)


def write_log(folder: Path) -> None:
    table = impressions(request=[f"r{n}" for n in range(ROWS)], device=drawn(["phone", "desktop"]))
    pq.write_table(table, folder / "impressions.parquet")


def test_command_prints_the_spec_and_tells_what_is_left_out(tmp_path: Path) -> None:
    write_log(tmp_path)
    result = CliRunner().invoke(cli, ["features", "infer", "--events", str(tmp_path), "--warmup", "50%"])
    assert result.exit_code == 0, result.output
    spec = FeatureSpec.from_toml(result.stdout)
    assert "device" in spec.field_names
    assert f"left out request: an identifier: {ROWS // 2} values" in result.stderr


def test_command_writes_a_file(tmp_path: Path) -> None:
    write_log(tmp_path)
    out = tmp_path / "features.toml"
    result = CliRunner().invoke(cli, ["features", "infer", "--events", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0 and result.stdout == ""
    assert tomllib.loads(out.read_text())["version"] == 1


def test_command_refuses_a_share_that_is_none(tmp_path: Path) -> None:
    write_log(tmp_path)
    result = CliRunner().invoke(cli, ["features", "infer", "--events", str(tmp_path), "--warmup", "most"])
    assert result.exit_code == 2 and "expected --warmup as a share (25%) or a duration" in result.stderr
