"""Times as logs write them, to int64 milliseconds since the epoch, in Spark expressions."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BeforeValidator, PlainSerializer, model_validator

from pipelines.config_sections import Section
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import Column

__all__ = [
    "Instant",
    "TimeFormat",
    "TimeUnit",
    "format_instant",
    "milliseconds",
    "parse_instant",
    "scaled",
    "timestamp_milliseconds",
]

TimeUnit = Literal["s", "ms", "us"]

_PER_SECOND: dict[str, int] = {"s": 1, "ms": 1_000, "us": 1_000_000}
# No time beyond year 30,000 in either direction: such numbers overflow or are of another unit.
_LARGEST_S = 10**12
_NUMBER = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*$"
_ISO = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?"
_OFFSET = r"(Z|[+-][0-9]{2}:?[0-9]{2})$"
# strftime directive -> Spark's pattern letters. Numbers are written with all their digits.
_DIRECTIVES = {
    "Y": "yyyy",
    "y": "yy",
    "m": "MM",
    "b": "MMM",
    "B": "MMMM",
    "d": "dd",
    "j": "DDD",
    "H": "HH",
    "I": "hh",
    "p": "a",
    "M": "mm",
    "S": "ss",
    "f": "SSSSSS",
}


def parse_instant(text: str) -> int:
    """Milliseconds since the epoch of an ISO-8601 time with an offset.

    Raises
    ------
    ValueError
        If the text is no such time.

    Examples
    --------
    >>> parse_instant("1970-01-01T02:00:01+02:00")
    1000
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"expected an ISO-8601 time such as 2026-01-01T00:00:00Z. Received: {text!r}"
        ) from error
    if moment.tzinfo is None:
        raise ValueError(f"expected a time with an offset, such as {text}Z. Received: {text!r}")
    since_epoch = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since_epoch.days * 86_400 + since_epoch.seconds) * 1000 + since_epoch.microseconds // 1000


def format_instant(milliseconds: int) -> str:
    """An instant as ISO-8601 in UTC.

    Examples
    --------
    >>> format_instant(1_767_225_600_000)
    '2026-01-01T00:00:00.000Z'
    """
    seconds, rest = divmod(milliseconds, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"


def _to_instant(value: object) -> object:
    if isinstance(value, datetime):  # TOML has times of its own
        return parse_instant(value.isoformat())
    return parse_instant(value) if isinstance(value, str) else value


Instant = Annotated[
    int, BeforeValidator(_to_instant), PlainSerializer(format_instant, return_type=str, when_used="json")
]


class TimeFormat(Section):
    """How times are written: a count of units since an origin, ISO-8601, or a strftime pattern.

    Attributes
    ----------
    unit : {"s", "ms", "us", "iso"}
        ``s``, ``ms``, ``us``: a number, fractions allowed. Ignored where there is a pattern.
    pattern : str, optional
        In strftime's directives ``%Y %y %m %b %B %d %j %H %I %p %M %S %f``, numbers with all their digits.
    zone : str, optional
        IANA name of the clock of a pattern, or of ISO-8601 times that name no offset.
    origin : int
        What a number counts from, ms since the epoch.

    Examples
    --------
    >>> TimeFormat(pattern="%d.%m.%Y %H:%M", zone="Europe/Paris").spark_pattern
    "dd'.'MM'.'yyyy' 'HH':'mm"
    """

    unit: Literal["s", "ms", "us", "iso"] = "ms"
    pattern: str | None = None
    zone: str | None = None
    origin: Instant = 0

    @model_validator(mode="after")
    def _is_complete(self) -> TimeFormat:
        if self.pattern is not None:
            _spark_pattern(self.pattern)
            if self.zone is None:
                raise ValueError("a pattern needs the zone of its clock, as in zone = 'UTC'")
        elif self.zone is not None and self.unit != "iso":
            raise ValueError(f"a zone belongs to a pattern or to unit iso. Got unit {self.unit!r}")
        if self.origin and (self.pattern is not None or self.unit == "iso"):
            raise ValueError("an origin belongs to times that are numbers")
        if self.zone is not None:
            try:
                ZoneInfo(self.zone)
            except (ZoneInfoNotFoundError, ValueError, OSError) as error:
                raise ValueError(f"expected the IANA name of a time zone. Got {self.zone!r}") from error
        return self

    @property
    def spark_pattern(self) -> str | None:
        """The pattern in Spark's letters."""
        return None if self.pattern is None else _spark_pattern(self.pattern)

    def describe(self) -> str:
        """What a time must look like, for messages."""
        if self.pattern is not None:
            return f"a time of the form {self.pattern}"
        if self.unit == "iso":
            return "an ISO-8601 time" + (" with an offset" if self.zone is None else "")
        return f"a number of {self.unit}"


def _spark_pattern(pattern: str) -> str:
    parts = []
    for match in re.finditer(r"%(?P<directive>.?)|(?P<literal>[^%]+)", pattern, re.DOTALL):
        directive, literal = match["directive"], match["literal"]
        if directive == "%":
            literal = "%"
        if literal is not None:
            parts.append("'" + literal.replace("'", "''") + "'")
        elif directive in _DIRECTIVES:
            parts.append(_DIRECTIVES[directive])
        else:
            known = " ".join(f"%{name}" for name in _DIRECTIVES)
            raise ValueError(f"a pattern may hold {known}. Got %{directive} in {pattern!r}")
    return "".join(parts)


def milliseconds(text: Column, form: TimeFormat) -> Column:
    """Times as int64 ms since the epoch; null where the text is no such time. Finer digits are cut.

    Parameters
    ----------
    text : Column
        Strings; the session's time zone must be UTC (`pipelines.spark_session`).
    form : TimeFormat
    """
    from pyspark.sql import functions as F

    if form.pattern is not None:
        moment = F.try_to_timestamp(text, F.lit(form.spark_pattern))
        return F.unix_millis(_at(moment, form.zone))
    if form.unit != "iso":
        return scaled(text, form.unit) + F.lit(form.origin)
    moment = text.try_cast("timestamp")
    known = F.when(text.rlike(_ISO + _OFFSET), moment)
    if form.zone is not None:
        known = known.when(text.rlike(_ISO + "$"), _at(moment, form.zone))
    return F.unix_millis(known)


def timestamp_milliseconds(moment: Column, kind: str, form: TimeFormat) -> Column:
    """A column of Spark's type ``timestamp`` or ``timestamp_ntz`` as int64 ms; the latter needs a zone.

    Raises
    ------
    ConfigError
        If the column names no zone, nor does the form.
    """
    from pyspark.sql import functions as F

    if kind == "timestamp":
        return F.unix_millis(moment)
    if form.zone is None:
        raise ConfigError(
            "expected times with a zone. Received a column of timestamps without one.",
            hint='name the zone of their clock: unit = "iso" and zone = "UTC" in [time] or in a time_format',
        )
    return F.unix_millis(_at(moment.cast("timestamp"), form.zone))


def scaled(text: Column, unit: TimeUnit) -> Column:
    """A number of seconds, ms or µs as int64 ms; null where the text is none. Finer digits are cut."""
    from pyspark.sql import functions as F

    limit = _LARGEST_S * _PER_SECOND[unit]
    # Whole numbers are the rule, and far cheaper than decimals.
    whole = text.try_cast("bigint")
    whole = F.when(whole.between(-limit, limit), whole)
    exact = F.when(text.rlike(_NUMBER), text.try_cast("decimal(38,9)"))
    exact = F.when(exact.between(-limit, limit), exact)
    if unit == "s":
        return F.coalesce(whole * 1000, F.floor(exact * 1000).cast("bigint"))
    if unit == "ms":
        return F.coalesce(whole, F.floor(exact).cast("bigint"))
    return F.floor(exact / 1000).cast("bigint")


def _at(moment: Column, zone: str | None) -> Column:
    """The instant of a clock's time: of two in autumn the earlier one; in the gap of spring, an hour on."""
    from pyspark.sql import functions as F

    return moment if zone in (None, "UTC") else F.to_utc_timestamp(moment, str(zone))
