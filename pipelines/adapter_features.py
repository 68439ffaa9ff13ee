"""Columns of a log as features: their JSON, and what is wrong with a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from pyspark.sql import functions as F

if TYPE_CHECKING:
    from pyspark.sql import Column

__all__ = ["Check", "FeatureType", "feature_check", "feature_value", "finite_number", "flag_check"]

FeatureType = Literal["category", "integer", "number", "list"]

# No `1d` and no `NaN`, which Java takes for numbers.
_NUMBER = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"
_EXPECTED = {"integer": "a whole number", "number": "a finite number"}


class Check(NamedTuple):
    """Whether a row is wrong (null: it is not), what was expected, and what was received."""

    bad: Column
    expected: str
    received: Column


def feature_value(cell: Column, kind: FeatureType, separator: str = "|") -> Column:
    """A cell as a value for `json_object`; null where it is absent, or not of its type (`feature_check`).

    Parameters
    ----------
    cell : Column
        String.
    kind : {"category", "integer", "number", "list"}
    separator : str
        What stands between the elements of a list.
    """
    if kind == "integer":
        return cell.try_cast("bigint")
    if kind == "number":
        return finite_number(cell)
    return F.split(cell, f"\\Q{separator}\\E") if kind == "list" else cell


def feature_check(name: str, cell: Column, kind: FeatureType) -> Check | None:
    """Whether a cell is not of its type; None where every text is."""
    if kind in ("category", "list"):
        return None
    value = cell.try_cast("bigint") if kind == "integer" else finite_number(cell)
    return Check(cell.isNotNull() & value.isNull(), f"feature {name} must be {_EXPECTED[kind]}", cell)


def finite_number(cell: Column) -> Column:
    """A text as float64; null where it is no finite number."""
    value = F.when(cell.rlike(_NUMBER), cell.try_cast("double"))
    return F.when(F.abs(value) < float("inf"), value)


def flag_check(name: str, cell: Column) -> Check:
    """Whether a cell is neither 0 nor 1."""
    return Check(F.coalesce(~cell.isin("0", "1"), F.lit(True)), f"{name} must be 0 or 1", cell)
