"""Features as JSON, in Spark expressions: to the letter what `pipelines.codec.features_to_json` writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import orjson
from pyspark.sql import functions as F

if TYPE_CHECKING:
    from pyspark.sql import Column

__all__ = ["json_number", "json_object"]

# Spark writes these control characters with capital hex digits, orjson with small ones.
_HEX_ESCAPES = ("0b", "0e", "0f", "1a", "1b", "1c", "1d", "1e", "1f")
# Numbers from 1e-6 up to 1e10 are written without an exponent.
_LEAST_FIXED, _LEAST_SCIENTIFIC = -6, 10


def json_object(values: Mapping[str, Column], numbers: Collection[str] = ()) -> Column:
    """Features in order of their names as the text of one JSON object; nulls are left out.

    Parameters
    ----------
    values : mapping of str to Column
        Strings (valid UTF-8), whole numbers, arrays of strings; finite float64 where named in ``numbers``.
    numbers : collection of str
    """
    if not numbers:
        whole = _written(values, sorted(values))
    else:
        parts = []
        for is_number, names in groupby(sorted(values), lambda name: name in numbers):
            if is_number:
                parts += [_member(name, json_number(values[name])) for name in names]
            else:
                parts.append(F.btrim(_written(values, list(names)), F.lit("{}")))
        filled = F.array_remove(F.array(*parts), "")
        whole = F.concat(F.lit("{"), F.array_join(filled, ","), F.lit("}"))
    return F.when(whole.contains("\\u00"), _small_hex(whole)).otherwise(whole)


def json_number(number: Column) -> Column:
    """A finite float64 as JSON: the shortest text that gives the number back; null stays null.

    Java before version 19 writes a digit or more too many for a few numbers of 16 or 17 digits, and for a few
    beyond 2**53. The number is the same.
    """
    text = number.cast("string")
    mantissa = _without_zero(F.substring_index(text, "E", 1))
    exponent = F.substring_index(text, "E", -1).cast("int")
    digits = F.regexp_replace(mantissa, r"[-.]", "")
    sign = F.when(text.startswith("-"), F.lit("-")).otherwise(F.lit(""))
    small = F.concat(sign, F.lit("0."), F.repeat(F.lit("0"), -exponent - 1), digits)
    whole = F.rpad(digits, F.greatest(exponent + 1, F.length(digits)), F.lit("0"))
    fraction = F.substring(whole, exponent + 2, F.length(whole))
    large = F.concat(
        sign,
        F.substring(whole, F.lit(1), exponent + 1),
        F.when(F.length(fraction) > 0, F.concat(F.lit("."), fraction)).otherwise(F.lit("")),
    )
    plus = F.when(exponent > 0, F.lit("+")).otherwise(F.lit(""))
    scientific = F.concat(mantissa, F.lit("e"), plus, exponent.cast("string"))
    return (
        F.when(~text.contains("E"), _without_zero(text))
        .when((exponent >= _LEAST_FIXED) & (exponent < 0), small)
        .when((exponent >= 0) & (exponent < _LEAST_SCIENTIFIC), large)
        .otherwise(scientific)
    )


def _written(values: Mapping[str, Column], names: Sequence[str]) -> Column:
    """By Spark's own writer, which is the fastest, but writes float64 as Java does."""
    return F.to_json(F.struct(*[values[name].alias(name) for name in names]))


def _member(name: str, text: Column) -> Column:
    return F.concat(F.lit(orjson.dumps(name).decode() + ":"), text)


def _without_zero(text: Column) -> Column:
    return F.when(text.endswith(".0"), F.left(text, F.length(text) - 2)).otherwise(text)


def _small_hex(text: Column) -> Column:
    for digits in _HEX_ESCAPES:
        # An even number of backslashes before it are backslashes of the text.
        escape = rf"(?<!\\)((?:\\\\)*)\\u00{digits.upper()}"
        text = F.regexp_replace(text, escape, rf"$1\\u00{digits}")
    return text
