"""``ctrstream evaluate``: measure recorded predictions by the outcomes in the log."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.options import as_of_option, config_options, output_option
from pipelines.duration import format_duration, parse_duration
from pipelines.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table

    from jobs.evaluation import Evaluation
    from pipelines.config import Config
    from pipelines.config_sections import AttributionConfig

__all__ = ["check_truth_windows", "command", "read_table"]

log = logging.getLogger(__name__)

_file = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--predictions", "predictions_path", type=_file, required=True, help="predictions.parquet.")
@click.option(
    "--events",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the log that was predicted.",
)
@as_of_option()
@click.option(
    "--truth", "truth_path", type=_file, help="truth.parquet of a simulated log: adds regret and true PCOC."
)
@output_option(help="Folder for metrics.json and reliability.json; created when missing.")
@config_options
def command(
    predictions_path: Path,
    folder: Path,
    as_of: int | None,
    truth_path: Path | None,
    out: Path,
    config: Config,
) -> None:
    """Measure recorded predictions: log loss, NE, AUC, GAUC, PCOC, calibration tests, regret.

    Labels follow [attribution] of the configuration: give the --config of the run that made the predictions.
    """
    from rich.console import Console

    from jobs.evaluation import evaluate
    from pipelines.event_files import EventFiles

    predictions = read_table(predictions_path, "predictions")
    truth = None if truth_path is None else read_table(truth_path, "truth")
    if truth_path is not None:
        check_truth_windows(truth_path, config.attribution)
    evaluation = evaluate(
        predictions, EventFiles(folder).tables, config.attribution, as_of=as_of, truth=truth
    )
    for path in evaluation.write(out):
        log.info("wrote %s", path)
    for task, reason in evaluation.metrics["skipped"].items():
        log.warning("task skipped task=%s reason=%r", task, reason)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    for task in evaluation.tasks:
        console.print(summary_table(evaluation, task))


def read_table(path: Path, what: str) -> pa.Table:
    """Read a Parquet file.

    Raises
    ------
    DataError
        If there is none, or it is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"expected {what} in the Parquet file {path}. There is no such file.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot read {what} from {path}: {error}.") from error


def check_truth_windows(truth_path: Path, attribution: AttributionConfig) -> None:
    """Refuse a truth that was computed for other windows than those that the labels follow.

    Reads ``[attribution]`` of the ``simulation.toml`` beside the truth file; nothing is checked without one.

    Raises
    ------
    ConfigError
        If a window differs: regret would compare two different questions.
    """
    settings = truth_path.with_name("simulation.toml")
    if not settings.exists():
        return
    windows = tomllib.loads(settings.read_text(encoding="utf-8")).get("attribution", {})
    for name, text in windows.items():
        wanted, given = parse_duration(text), getattr(attribution, name)
        if wanted != given:
            raise ConfigError(
                f"the truth in {truth_path} is the probability within a {name} of {text}. "
                f"Received attribution.{name} = {format_duration(given)}.",
                hint=f"add --set attribution.{name}={text}",
            )


def summary_table(evaluation: Evaluation, task: str) -> Table:
    """Quality of each predictor over the judged rows, for a terminal."""
    from rich.table import Table

    found = evaluation.metrics[task]
    rows: dict[str, dict[str, Any]] = (
        found["by_maturity"]["mature"] if found["judged_on"] == "mature" else found["totals"]
    )
    table = Table(title=f"{task}: {found['judged_on']} labels", title_justify="left")
    table.add_column("predictor")
    for name in ("rows", "positives", "log loss", "NE", "AUC", "GAUC", "PCOC"):
        table.add_column(name, justify="right")
    for predictor, figures in rows.items():
        table.add_row(
            predictor,
            f"{figures['rows']:,}",
            f"{figures['positives']:,}",
            *(_shown(figures[name], 5) for name in ("log_loss", "ne", "auc", "gauc")),
            _shown(figures["pcoc"], 4),
        )
    base = found["base_rate"]["judged"]
    table.add_row(
        "running base rate",
        f"{base['rows']:,}",
        f"{base['positives']:,}",
        _shown(base["log_loss"], 5),
        _shown(base["ne"], 5),
        "-",
        "-",
        _shown(base["pcoc"], 4),
    )
    return table


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
