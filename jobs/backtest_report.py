"""After a backtest: judge its predictions, write the report, say it in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.drift import drift_document
from jobs.evaluation import Evaluation, evaluate
from jobs.quality_lines import quality_tables

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.backtest import Backtest
    from pipelines.config import Config
    from pipelines.event_files import EventFiles
    from pipelines.feature_spec import FeatureSpec

__all__ = ["finish_backtest", "judge", "split_drift"]


def finish_backtest(result: Backtest, files: EventFiles, config: Config, out: Path) -> None:
    """Write ``metrics.json``, ``reliability.json``, ``drift.json``, ``report.html``; print the figures."""
    from rich.console import Console

    from jobs.report import write_report

    truth = read_truth(files.folder)
    evaluation = judge(result, files, config, truth)
    evaluation.write(out)
    drift = split_drift(files, result.first.student.spec, config, result.warm_up_until)
    (out / "drift.json").write_text(json.dumps(drift, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    report = write_report(out)
    console = Console()
    for table in quality_tables(evaluation):
        console.print(table)
    online = result.seconds["online"]
    console.print(
        f"{result.events:,} events learned online in {online:.1f} s: {result.events / online:,.0f} events/s. "
        f"Warm-up {result.seconds['warm_up']:.1f} s, training {result.seconds['train']:.1f} s."
    )
    console.print(f"Report: {report}")


def judge(result: Backtest, files: EventFiles, config: Config, truth: pa.Table | None) -> Evaluation:
    """Judge the predictions of a backtest by the outcomes of its log."""
    return evaluate(
        result.predictions,
        files.tables,
        config.attribution,
        truth=truth,
        warm_up_until=result.warm_up_until,
        skipped=result.skipped,
    )


def read_truth(folder: Path) -> pa.Table | None:
    """The truth beside a simulated log, if there is one."""
    import pyarrow.parquet as pq

    path = folder / "truth.parquet"
    return pq.read_table(path) if path.exists() else None


def split_drift(files: EventFiles, spec: FeatureSpec, config: Config, warm_up_until: int) -> dict[str, Any]:
    """Drift of the last quarter of the log against the warm-up."""
    times = files.impressions.column("event_time").to_numpy()
    first, last = int(times.min()), int(times.max()) + 1
    return drift_document(
        files.tables,
        spec,
        reference=(first, warm_up_until),
        current=(max(warm_up_until, last - (last - first) // 4), last),
        attribution=config.attribution,
    )
