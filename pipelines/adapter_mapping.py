"""What a table of anyone's means, column by column: the TOML file of ``--format table``, and its checks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from pipelines.adapter_features import FeatureType
from pipelines.adapter_times import TimeFormat, TimeUnit, format_instant
from pipelines.config import config_error
from pipelines.config_sections import Duration, Section
from pipelines.errors import ConfigError

__all__ = [
    "GENERATE",
    "REST",
    "ImpressionColumns",
    "InputFiles",
    "LongMapping",
    "OutcomeColumns",
    "OutcomeFile",
    "WideMapping",
    "load_options",
]

GENERATE = "generate"
REST: Literal["rest"] = "rest"
# The delay of a click that a log tells without its time.
_CLICK_DELAY = 10_000

Options = TypeVar("Options", bound=BaseModel)
Character = Annotated[str, Field(min_length=1, max_length=1)]


class InputFiles(Section):
    """The files and how they are written; all but ``files`` is for text files.

    Attributes
    ----------
    files : tuple of str
        Patterns of names in the folder; ``.parquet`` files are Parquet, others text, perhaps compressed.
    separator, quote : str
        Of cells; an empty quote: cells are never quoted, which is faster.
    header : bool
        Whether the first line names the columns.
    columns : tuple of str
        Their names, where it does not.
    null_values : tuple of str
        Cells that mean nothing.
    list_separator : str
        Between the elements of a list in one cell.
    """

    files: tuple[str, ...] = ("*.csv", "*.csv.gz", "*.parquet")
    separator: Character = ","
    quote: Annotated[str, Field(max_length=1)] = '"'
    header: bool = True
    columns: tuple[str, ...] = ()
    null_values: tuple[str, ...] = ("",)
    list_separator: Annotated[str, Field(min_length=1)] = "|"

    @model_validator(mode="after")
    def _names_are_known(self) -> InputFiles:
        if self.header == bool(self.columns):
            raise ValueError("columns belong to files without a header: header = false and columns = [...]")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("columns must differ")
        return self


class ImpressionColumns(Section):
    """Columns of impressions.

    Attributes
    ----------
    event_id : str
        Or ``generate``: a stable hash of the row.
    event_time : str
    arrival_time : str, optional
    user_id, item_id : str, optional
        Absent: every row has the id ``none``.
    position, propensity : str, optional
    features : tuple of str or "rest"
        ``rest``: all columns that mean nothing else, but those in ``exclude``.
    exclude : tuple of str
    time_format : TimeFormat, optional
        Where it is another than that of ``[time]``.
    """

    event_id: str = GENERATE
    event_time: str
    arrival_time: str | None = None
    user_id: str | None = None
    item_id: str | None = None
    position: str | None = None
    propensity: str | None = None
    features: tuple[str, ...] | Literal["rest"] = REST
    exclude: tuple[str, ...] = ()
    time_format: TimeFormat | None = None

    @model_validator(mode="after")
    def _exclude_means_something(self) -> ImpressionColumns:
        if self.exclude and self.features != REST:
            raise ValueError('exclude takes columns from features = "rest"; a list names all that there are')
        return self


class OutcomeColumns(Section):
    """Columns of an impression's row that tell of its click, or of its conversion.

    Attributes
    ----------
    flag : str, optional
        0 or 1. Absent: there was one where its time (or delay) is not null.
    time : str, optional
        When it happened.
    delay : str, optional
        Or how long after the impression (a conversion: after ``delay_from``), in ``delay_unit``.
    delay_unit : {"s", "ms", "us"}
    delay_from : {"click", "impression"}
        Of a conversion; a click's delay is always from the impression.
    assumed_delay : int, optional
        The delay where a row has a flag, but neither time nor delay, ms. A click's is 10 s by default.
    value, credit : str, optional
        Of a conversion.
    time_format : TimeFormat, optional
        Where it is another than that of ``[time]``.
    """

    flag: str | None = None
    time: str | None = None
    delay: str | None = None
    delay_unit: TimeUnit = "s"
    delay_from: Literal["click", "impression"] = "click"
    assumed_delay: Duration | None = None
    value: str | None = None
    credit: str | None = None
    time_format: TimeFormat | None = None

    @model_validator(mode="after")
    def _happens_at_some_time(self) -> OutcomeColumns:
        if self.flag is None and self.time is None and self.delay is None:
            raise ValueError("name a flag, a time or a delay")
        if self.time is not None and self.delay is not None:
            raise ValueError("name a time or a delay, not both")
        return self


class OutcomeFile(Section):
    """Files that have a row for each click, or for each conversion."""

    files: tuple[str, ...]
    event_id: str = GENERATE
    impression_id: str
    event_time: str
    arrival_time: str | None = None
    value: str | None = None
    credit: str | None = None
    op: str | None = None
    time_format: TimeFormat | None = None


class _Mapping(Section):
    input: InputFiles = InputFiles()
    time: TimeFormat = TimeFormat()
    impression: ImpressionColumns
    types: dict[str, FeatureType] = Field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the files of impressions."""
        return self.input.files


class WideMapping(_Mapping):
    """One row an impression, with what came of it."""

    layout: Literal["wide"] = "wide"
    click: OutcomeColumns | None = None
    conversion: OutcomeColumns | None = None

    @model_validator(mode="after")
    def _outcomes_are_whole(self) -> WideMapping:
        if self.click is not None and (self.click.value or self.click.credit):
            raise ValueError("click.value and click.credit belong to the conversion")
        conversion = self.conversion
        if conversion is not None and not (conversion.time or conversion.delay or conversion.assumed_delay):
            raise ValueError("conversion needs a time, a delay or an assumed_delay")
        return self

    @property
    def click_delay(self) -> int | None:
        """The assumed delay of a click, ms; None: one without its time is an error."""
        click = self.click
        if click is None or click.assumed_delay or click.time or click.delay:
            return None if click is None else click.assumed_delay
        return _CLICK_DELAY


class LongMapping(_Mapping):
    """Files of impressions, of clicks and of conversions."""

    layout: Literal["long"]
    click: OutcomeFile | None = None
    conversion: OutcomeFile | None = None

    @model_validator(mode="after")
    def _columns_have_a_meaning(self) -> LongMapping:
        if self.click is not None and (self.click.value or self.click.credit or self.click.op):
            raise ValueError("click.value, click.credit and click.op belong to the conversion")
        return self

    @property
    def clicks(self) -> tuple[str, ...]:
        """Patterns of the files of clicks."""
        return () if self.click is None else self.click.files

    @property
    def conversions(self) -> tuple[str, ...]:
        """Patterns of the files of conversions."""
        return () if self.conversion is None else self.conversion.files


def load_options(model: type[Options], path: Path | None, origin: int | None = None) -> Options:
    """Read a format's TOML file.

    Parameters
    ----------
    model : type
        Options of the format. `WideMapping` gives way to `LongMapping` where ``layout = "long"``.
    path : Path, optional
        Absent: defaults.
    origin : int, optional
        What relative times count from, ms since the epoch; wins over the file's.

    Raises
    ------
    ConfigError
        If the file is missing or not TOML, a key is unknown (the nearest valid one is named) or a value
        does not fit, or the format's times are not relative.
    """
    document = {} if path is None else _read(path)
    chosen: type[BaseModel] = model
    if model is WideMapping and document.get("layout") == "long":
        chosen = LongMapping
    if origin is not None:
        _set_origin(chosen, document, origin)
    try:
        return chosen.model_validate(document)  # type: ignore[return-value]
    except ValidationError as error:
        raise config_error(error, chosen, "mapping key", "docs/formats.md lists the keys") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the mapping {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def _set_origin(model: type[BaseModel], document: dict[str, Any], origin: int) -> None:
    if "origin" in model.model_fields:
        document["origin"] = origin
    elif issubclass(model, _Mapping) and isinstance(document.setdefault("time", {}), dict):
        document["time"]["origin"] = origin
    else:
        raise ConfigError(
            f"--origin is for times that count from an unknown begin. Received: {format_instant(origin)}.",
            hint="the times of this format are dates already: leave it out",
        )
