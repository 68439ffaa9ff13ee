"""A feature spec proposed from the first part of an event log.

Only columns are looked at, never outcomes: the proposal can be made before any label is known, and says why
each column that it leaves out is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.bucket_sizes import Codes, bucket_count, encode_values
from pipelines.errors import DataError
from pipelines.events import feature_names
from pipelines.feature_columns import text_column
from pipelines.feature_spec import Categorical, Cross, FeatureSpec, Group, LeftOut, Numeric, Sequence
from pipelines.hashing import mix

__all__ = ["infer_spec"]

# Fewer rows than this prove nothing about values that do not come back.
_ENOUGH_ROWS = 200
# A column whose values are this rarely seen again names rows, not things.
_NEVER_AGAIN = 0.9
# user_id and item_id are worth an embedding as soon as they come back at all.
_ID_REPEATS = 1.2
# Whole numbers with at most so many values are names of things rather than amounts.
_FEW_VALUES = 64
_CUTS = 24
_LONGEST_SEQUENCE = 20
# A cross learns something only where its pairs come back: rows for each pair on average.
_USER_ITEM_REPEATS = 2.0
_CROSS_ROWS = 50.0
# A column whose shares move more than this tells the time (weekday, week); its pairs will not come back.
_MOST_DRIFT = 0.2
_MOST_CROSSES = 2
# A column is a property of the user (item) if each has, but for this share, one value.
_DETERMINED = 1.02

_PREFIXES: tuple[tuple[Group, tuple[str, ...]], ...] = (
    ("user", ("user", "u_", "customer", "visitor", "viewer", "member")),
    ("item", ("item", "i_", "ad_", "advertiser", "campaign", "creative", "product", "brand", "seller")),
)


@dataclass(frozen=True)
class _Inferred:
    """A categorical part with the values that it was inferred from, for crosses."""

    part: Categorical
    codes: Codes


class _Inference:
    def __init__(self, impressions: pa.Table, horizon: float) -> None:
        self.table = impressions
        self.rows = impressions.num_rows
        self.horizon = horizon
        self.categorical: list[_Inferred] = []
        self.numeric: list[Numeric] = []
        self.sequence: list[Sequence] = []
        self.left_out: list[LeftOut] = []
        self.owner: dict[Group, Codes] = {
            "user": encode_values(self.column("user_id")),
            "item": encode_values(self.column("item_id")),
        }

    def column(self, name: str) -> pa.Array:
        column = self.table.column(name)
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append(LeftOut(name=name, reason=reason))

    def add_id(self, name: str, group: Group) -> None:
        codes = self.owner[group]
        if codes.distinct <= 1:
            self.leave_out(name, f"constant: {codes.distinct} value in {self.rows} rows")
        elif self.rows < _ID_REPEATS * codes.distinct:
            self.leave_out(name, f"values hardly come back: {codes.distinct} values in {self.rows} rows")
        else:
            self.add_categorical(name, codes, group)

    def add_categorical(self, name: str, codes: Codes, group: Group, wide_only: bool = False) -> None:
        part = Categorical(
            name=name, buckets=bucket_count(codes, self.horizon), group=group, wide_only=wide_only
        )
        self.categorical.append(_Inferred(part, codes))

    def add_position(self) -> None:
        codes = encode_values(self.column("position"))
        if codes.distinct > 1:
            self.add_categorical("position", codes, "position", wide_only=True)
        elif codes.distinct:
            self.leave_out("position", f"constant: 1 value in {self.rows} rows")

    def add_feature(self, name: str) -> None:
        column = self.column(name)
        if pa.types.is_list(column.type):
            self.add_sequence(name, column)
            return
        is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        if is_number and not _names_things(name, column):
            self.add_number(name, column)
            return
        codes = encode_values(_without_fraction(column) if is_number else column)
        reason = self.reason_against(codes, column.null_count)
        if reason is None:
            self.add_categorical(name, codes, self.group_of(name, codes))
        else:
            self.leave_out(name, reason)

    def reason_against(self, codes: Codes, nulls: int) -> str | None:
        if codes.distinct <= 1 and not nulls:
            return f"constant: {codes.distinct} value in {self.rows} rows"
        if codes.rows < _ENOUGH_ROWS:
            return None
        if codes.distinct > _NEVER_AGAIN * codes.rows:
            return f"an identifier: {codes.distinct} values in {codes.rows} rows"
        if codes.novelty > _NEVER_AGAIN:
            return (
                "values do not come back: "
                f"{codes.novelty:.0%} of the last quarter's rows have one that was not seen before"
            )
        return None

    def add_number(self, name: str, column: pa.Array) -> None:
        value = np.asarray(column.drop_null().cast(pa.float64(), safe=False).to_numpy(), np.float64)
        if len(value) == 0 or value.min() == value.max():
            self.leave_out(name, f"constant: 1 value in {len(value)} rows")
            return
        group = self.group_of(name, _codes_of_numbers(column))
        self.numeric.append(_numeric_part(name, value, group))

    def add_sequence(self, name: str, column: pa.Array) -> None:
        lengths = pc.drop_null(pc.list_value_length(column)).to_numpy(zero_copy_only=False)
        codes = encode_values(column.flatten())
        if codes.distinct <= 1:
            self.leave_out(name, f"constant: {codes.distinct} value in the lists of {len(lengths)} rows")
            return
        reason = self.reason_against(codes, 0)
        if reason is not None:
            self.leave_out(name, f"list elements: {reason}")
            return
        longest = int(np.quantile(lengths, 0.95, method="higher"))
        self.sequence.append(
            Sequence(
                name=name,
                buckets=bucket_count(codes, self.horizon),
                max_length=min(max(longest, 1), _LONGEST_SEQUENCE),
                group=self.group_of(name, encode_values(text_column(column))),
            )
        )

    def group_of(self, name: str, codes: Codes) -> Group:
        for group, prefixes in _PREFIXES:
            if name.startswith(prefixes):
                return group
        determining: tuple[Group, ...] = ("item", "user")
        for group in determining:
            owner = self.owner[group]
            # Where owners hardly come back, they determine anything.
            if self.rows >= 3 * owner.distinct and _pairs(owner, codes) <= _DETERMINED * owner.distinct:
                return group
        return "context"

    def crosses(self) -> list[Cross]:
        """At most two: user x item where pairs come back, and item x a column with few values."""
        named = {one.part.name: one for one in self.categorical if not one.part.wide_only}
        if "item_id" not in named:
            return []
        found: list[Cross] = []
        item = named["item_id"]
        user = named.get("user_id")
        if user is not None and self.rows >= _USER_ITEM_REPEATS * _pairs(user.codes, item.codes):
            found.append(self.cross(user, item))
        # The more values a column has, the more its cross can say, as long as each pair is seen enough.
        candidates = sorted(
            (one for one in named.values() if self.is_crossable(item, one)),
            key=lambda one: (-one.codes.distinct, one.part.name),
        )
        found += [self.cross(item, one) for one in candidates]
        return found[:_MOST_CROSSES]

    def is_crossable(self, item: _Inferred, other: _Inferred) -> bool:
        few = other.part.group in ("context", "user") and 1 < other.codes.distinct <= _FEW_VALUES
        return (
            few
            and other.codes.drift <= _MOST_DRIFT
            and self.rows >= _CROSS_ROWS * _pairs(item.codes, other.codes)
        )

    def cross(self, left: _Inferred, right: _Inferred) -> Cross:
        both = (left.codes.code >= 0) & (right.codes.code >= 0)
        hashes = mix(left.codes.hashes[left.codes.code[both]], right.codes.hashes[right.codes.code[both]])
        codes = Codes.of_hashes(hashes)
        return Cross(of=(left.part.name, right.part.name), buckets=bucket_count(codes, self.horizon))


def infer_spec(impressions: pa.Table, horizon: float = 3.0) -> FeatureSpec:
    """Propose a feature spec.

    Parameters
    ----------
    impressions : pa.Table
        Conformed impressions in order of arrival, usually the warm-up part of a log. Everything, also means
        and quantiles, is taken from these rows.
    horizon : float
        How many times as many rows are still to come: tables get room for the values that they will bring.

    Returns
    -------
    FeatureSpec
        Columns that are not used are listed in ``left_out`` with the reason.

    Raises
    ------
    DataError
        If there are no impressions, or no column is worth using.

    Examples
    --------
    >>> n = 1_000
    >>> impressions = pa.table({
    ...     "event_time": range(n), "user_id": [f"u{i % 90}" for i in range(n)],
    ...     "item_id": [f"i{i % 7}" for i in range(n)], "position": [1 + i % 4 for i in range(n)],
    ...     "zone": ["n", "s"] * (n // 2), "price": [float(i * i % 977) for i in range(n)],
    ...     "token": [f"t{i}" for i in range(n)],
    ... })
    >>> spec = infer_spec(impressions)
    >>> spec.field_names
    ['user_id', 'item_id', 'zone', 'price', 'item_id_x_zone', 'position']
    >>> spec.left_out
    (LeftOut(name='token', reason='an identifier: 1000 values in 1000 rows'),)
    """
    if not impressions.num_rows:
        raise DataError("a feature spec is inferred from impressions. Received none.")
    inference = _Inference(impressions, horizon)
    inference.add_id("user_id", "user")
    inference.add_id("item_id", "item")
    if "position" in impressions.column_names:
        inference.add_position()
    for name in feature_names(impressions):
        inference.add_feature(name)
    spec = FeatureSpec(
        categorical=tuple(one.part for one in inference.categorical),
        numeric=tuple(inference.numeric),
        sequence=tuple(inference.sequence),
        cross=tuple(inference.crosses()),
        left_out=tuple(inference.left_out),
    )
    if not spec.field_names:
        raise DataError(
            f"none of the columns of {impressions.num_rows} impressions is worth using: "
            + "; ".join(f"{one.name}: {one.reason}" for one in spec.left_out)
        )
    return spec


def _names_things(name: str, column: pa.Array) -> bool:
    """Whether a column of numbers holds names of things rather than amounts."""
    values = column.drop_null()
    if (
        pa.types.is_floating(column.type)
        and not pc.all(pc.equal(pc.floor(values), values), min_count=0).as_py()
    ):
        return False
    return name == "id" or name.endswith("_id") or pc.count_distinct(values).as_py() <= _FEW_VALUES


def _without_fraction(column: pa.Array) -> pa.Array:
    return column.cast(pa.int64(), safe=False) if pa.types.is_floating(column.type) else column


def _codes_of_numbers(column: pa.Array) -> Codes:
    bits = np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)).view(np.uint64)
    return Codes.of_hashes(bits)


def _pairs(left: Codes, right: Codes) -> int:
    """How many different pairs of values there are; nulls do not count."""
    both = (left.code >= 0) & (right.code >= 0)
    return len(np.unique(left.code[both].astype(np.int64) * (right.distinct + 1) + right.code[both]))


def _numeric_part(name: str, value: NDArray[np.float64], group: Group) -> Numeric:
    low, high = np.quantile(value, [0.001, 0.999])
    if low == high:
        low, high = value.min(), value.max()
    low, high = _rounded((low, high), high - low)
    clipped = np.clip(value, low, high)
    plain, logged = clipped, np.log1p(clipped - low)
    is_skewed = low >= 0 and _skewness(plain) > 1 and abs(_skewness(logged)) < _skewness(plain)
    transformed = logged if is_skewed else plain
    mean, std = _rounded((transformed.mean(), transformed.std()), transformed.std())
    cuts = np.quantile(value, np.linspace(0, 1, _CUTS + 2)[1:-1])
    return Numeric(
        name=name,
        transform="log1p" if is_skewed else "identity",
        low=low,
        high=high,
        mean=mean,
        std=std,
        boundaries=tuple(dict.fromkeys(_rounded(cuts, high - low))),
        group=group,
    )


def _skewness(value: NDArray[np.float64]) -> float:
    spread = value.std()
    return float(np.mean(((value - value.mean()) / spread) ** 3)) if spread > 0 else 0.0


def _rounded(values: Iterable[float], spread: float) -> list[float]:
    """Six digits of the spread: as much as a person wants to read in the spec."""
    decimals = 6 - int(np.floor(np.log10(spread)))
    return [round(float(value), decimals) for value in values]
