"""``ctrstream drift``: compare features, labels and predictions of two windows of an event log."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.options import config_options, parse_utc_ms, writable_folder
from pipelines.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from pipelines.config import Config
    from pipelines.config_sections import AttributionConfig
    from pipelines.feature_spec import FeatureSpec
    from pipelines.outcomes import Tables

__all__ = ["Span", "command", "drift_between", "drift_document", "drift_of_labels", "drift_of_predictions"]

log = logging.getLogger(__name__)

# Event time, ms: from the first up to but not including the second.
Span = tuple[int, int]
_SHOWN_FEATURES = 20


class SpanParameter(click.ParamType[Span]):
    """A click type for ``FROM/TO``, two ISO-8601 times with an offset."""

    name = "FROM/TO"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Span:
        """Turn text into a span, or fail as a usage error."""
        if isinstance(value, tuple):
            return value
        start, slash, end = str(value).partition("/")
        try:
            if not slash:
                raise ValueError(f"expected FROM/TO, two times with a slash between. Got {value!r}.")
            span = parse_utc_ms(start), parse_utc_ms(end)
            if span[0] >= span[1]:
                raise ValueError(f"expected FROM before TO. Got {start} and {end}.")
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return span


@click.command()
@click.option(
    "--events",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder with the event log.",
)
@click.option("--reference", type=SpanParameter(), required=True, help="Window to compare with.")
@click.option("--current", type=SpanParameter(), required=True, help="Window to judge.")
@click.option(
    "--predictions",
    "predictions_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="predictions.parquet: adds the drift of the predictions.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("drift.json"))
@config_options
def command(
    folder: Path, reference: Span, current: Span, predictions_path: Path | None, out: Path, config: Config
) -> None:
    """Compare features, labels and predictions of two windows (event time, FROM included, TO not).

    Features follow the spec in [features] of the configuration; without one, every column of the
    impressions is a feature of the kind that its type says.
    """
    from rich.console import Console

    from jobs.evaluate import read_table
    from pipelines.event_files import EventFiles
    from pipelines.feature_spec import FeatureSpec

    writable_folder(out.parent)
    spec = None if config.features.spec is None else FeatureSpec.read(config.features.spec)
    predictions = None if predictions_path is None else read_table(predictions_path, "predictions")
    document = drift_document(
        EventFiles(folder).tables,
        spec,
        reference=reference,
        current=current,
        attribution=config.attribution,
        predictions=predictions,
    )
    out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    log.info("wrote %s", out)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    for part in ("features", "labels", "predictions"):
        if document[part]:
            console.print(_table(part, document[part]))


def drift_document(
    tables: Tables,
    spec: FeatureSpec | None,
    *,
    reference: Span,
    current: Span,
    attribution: AttributionConfig,
    predictions: pa.Table | None = None,
) -> dict[str, Any]:
    """Content of ``drift.json``: ``reference`` and ``current`` (from, to in ms), and by what is compared,
    ``features``, ``labels`` and ``predictions``, rows of `monitoring.drift.drift_table`, worst first.
    """
    return {
        "reference": list(reference),
        "current": list(current),
        "features": drift_between(tables, spec, reference=reference, current=current),
        "labels": drift_of_labels(tables, attribution, reference=reference, current=current),
        "predictions": []
        if predictions is None
        else drift_of_predictions(predictions, reference=reference, current=current),
    }


def drift_between(
    tables: Tables, spec: FeatureSpec | None, *, reference: Span, current: Span
) -> list[dict[str, Any]]:
    """Drift of each feature between two windows of impressions, worst first.

    Parameters
    ----------
    tables : impressions, clicks, conversions
    spec : FeatureSpec, optional
        What the features are; crosses and the hour of day follow from others and are left out. Without it
        the type of each column decides.
    reference, current : (from, to)
        Event time, ms; ``to`` is not included.

    Returns
    -------
    list of dict
        Rows of `monitoring.drift.drift_table`. ``oov_rate`` is the share of current values that no
        impression before the current window had. A list is compared value by value; a null or an empty list
        counts as one null.

    Raises
    ------
    DataError
        If a window holds no impressions, or a numeric feature holds something else.

    Examples
    --------
    >>> import pyarrow as pa
    >>> shown = pa.table({"event_time": [1, 2, 3, 4], "campaign": ["a", "b", "b", "c"]})
    >>> drift_between((shown, shown, shown), None, reference=(1, 3), current=(3, 5))[0]["oov_rate"]
    0.5
    """
    from monitoring.drift import drift_table
    from monitoring.feature_summary import summarise

    impressions = tables[0]
    kinds = _kinds(impressions, spec)
    before, now = (_window(impressions, span) for span in (reference, current))
    reference_columns = {name: _values(before, name, kind) for name, kind in kinds.items()}
    summaries = summarise(
        reference_columns,
        kinds={name: "numeric" if kind == "numeric" else "categorical" for name, kind in kinds.items()},
    )
    found = summarise({name: _values(now, name, kind) for name, kind in kinds.items()}, like=summaries)
    earlier = _window(impressions, (_first_time(impressions), current[0]), may_be_empty=True)
    vocabularies = {
        name: set(_values(earlier, name, kind).tolist()) for name, kind in kinds.items() if kind != "numeric"
    }
    return drift_table(summaries, found, vocabularies)


def drift_of_labels(
    tables: Tables, attribution: AttributionConfig, *, reference: Span, current: Span
) -> list[dict[str, Any]]:
    """Drift of the labels of closed windows, and of the delays of the outcomes in seconds.

    A task that has no closed window in the reference is left out.
    """
    from pipelines.outcomes import latest_arrival, outcomes_as_of

    sides: list[dict[str, Any]] = []
    for start, end in (reference, current):
        columns: dict[str, Any] = {}
        for task, outcome in outcomes_as_of(tables, attribution, latest_arrival(tables)).items():
            inside = outcome.mature & (outcome.opened >= start) & (outcome.opened < end)
            if inside.any():
                positive = inside & (outcome.label > 0)
                columns[f"{task} label"] = (outcome.label[inside] > 0).astype("int64")
                if positive.any():
                    columns[f"{task} delay, s"] = outcome.outcome_delay[positive] / 1000.0
        sides.append(columns)
    return _compare_columns(*sides)


def drift_of_predictions(predictions: pa.Table, *, reference: Span, current: Span) -> list[dict[str, Any]]:
    """Drift of the logits of each task, by the time of prediction; left out where the reference has none."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    time = np.asarray(predictions["predicted_at"].to_numpy(), np.int64)
    tasks = pc.cast(predictions["task"], pa.string())
    logit = np.asarray(predictions["logit"].to_numpy(), np.float64)
    sides: list[dict[str, Any]] = []
    for start, end in (reference, current):
        inside = (time >= start) & (time < end)
        columns: dict[str, Any] = {}
        for task in sorted(set(pc.unique(tasks).to_pylist())):
            own = inside & pc.equal(tasks, task).to_numpy()
            if own.any():
                columns[f"{task} logit"] = logit[own]
        sides.append(columns)
    return _compare_columns(*sides)


def _compare_columns(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    from monitoring.drift import drift_table
    from monitoring.feature_summary import summarise

    reference = summarise(before)
    current = summarise({name: values for name, values in now.items() if name in reference}, like=reference)
    return drift_table(reference, current)


def _kinds(impressions: pa.Table, spec: FeatureSpec | None) -> dict[str, str]:
    """Feature -> ``categorical``, ``numeric`` or ``sequence``."""
    if spec is not None:
        return {
            **{part.name: "categorical" for part in spec.categorical},
            **{part.name: "numeric" for part in spec.numeric},
            **{part.name: "sequence" for part in spec.sequence},
        }
    import pyarrow as pa

    from pipelines.events import feature_names

    kinds = {}
    for name in feature_names(impressions):
        kind = impressions.schema.field(name).type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kinds[name] = "sequence"
        else:
            kinds[name] = "numeric" if pa.types.is_floating(kind) else "categorical"
    return kinds


def _first_time(impressions: pa.Table) -> int:
    import pyarrow.compute as pc

    return int(pc.min(impressions["event_time"]).as_py() or 0)


def _window(impressions: pa.Table, span: Span, *, may_be_empty: bool = False) -> pa.Table:
    import pyarrow.compute as pc

    time = impressions["event_time"]
    chosen = impressions.filter(pc.and_(pc.greater_equal(time, span[0]), pc.less(time, span[1])))
    if chosen.num_rows == 0 and not may_be_empty:
        ends = pc.min_max(time).as_py()
        extent = "no impressions" if ends["min"] is None else f"{_iso(ends['min'])} to {_iso(ends['max'])}"
        raise DataError(
            f"expected impressions in the window {_iso(span[0])} to {_iso(span[1])}. The log holds {extent}.",
            hint="choose windows inside the log",
        )
    return chosen


def _values(table: pa.Table, name: str, kind: str) -> NDArray[np.generic]:
    """One value a row as numpy: float64 for numbers, else texts with None for null; lists are flattened."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from pipelines.feature_columns import as_lists, as_numbers, text_column

    if name not in table.column_names:
        absent = np.nan if kind == "numeric" else None
        return np.full(table.num_rows, absent, np.float64 if kind == "numeric" else object)
    column = table.column(name).combine_chunks()
    if kind == "numeric":
        return as_numbers(column, name)
    if kind == "sequence":
        lists = as_lists(column)
        if pa.types.is_null(lists.type):
            return np.full(table.num_rows, None, object)
        empty = int(pc.sum(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0)).as_py() or 0)
        column = pa.concat_arrays([text_column(lists.flatten()), pa.nulls(empty, pa.string())])
    return np.asarray(text_column(column).to_numpy(zero_copy_only=False), object)


def _iso(time: int) -> str:
    return datetime.fromtimestamp(time / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _table(part: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The worst rows, for a terminal."""
    from rich.table import Table

    shown = rows[:_SHOWN_FEATURES]
    left = f", the {len(shown)} worst of {len(rows)}" if len(shown) < len(rows) else ""
    table = Table(title=f"{part}{left}", title_justify="left")
    table.add_column("name", overflow="fold")
    table.add_column("verdict")
    for name in ("PSI excess", "KS", "null before", "null now", "OOV"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    names = ("psi_excess", "ks", "null_rate_reference", "null_rate_current", "oov_rate")
    for row in shown:
        numbers = ["-" if row[name] is None else f"{row[name]:.3f}" for name in names]
        table.add_row(row["feature"], row["verdict"], *numbers, row["why"])
    return table
