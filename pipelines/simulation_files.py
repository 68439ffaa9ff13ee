"""A simulated log as files: events in the contract's layout, truth and settings beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from pipelines.errors import DataError
from pipelines.events import TOPICS
from pipelines.simulation_malformed import event_objects
from pipelines.simulator import Simulation

__all__ = ["MALFORMED_FILE", "SETTINGS_FILE", "TRUTH_FILE", "FileFormat", "write_simulation"]

FileFormat = Literal["parquet", "jsonl"]

# None of the names begins like a topic, so that no reader of events takes it for one.
TRUTH_FILE = "truth.parquet"
MALFORMED_FILE = "malformed.jsonl"
SETTINGS_FILE = "simulation.toml"


def write_simulation(simulation: Simulation, folder: Path, file_format: FileFormat = "parquet") -> list[Path]:
    """Write a simulated log; a log that was simulated into the same folder before is replaced.

    1. ``simulation.toml``: marks the folder as a simulated one.
    2. ``impressions``, ``clicks``, ``conversions`` as ``.parquet`` or ``.jsonl``, in order of arrival.
    3. ``malformed.jsonl``, if there are such messages: ``topic``, ``value`` (raw text), ``arrival_time``.
    4. ``truth.parquet``: never to be read as features.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    DataError
        If the folder holds events that were not simulated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_former(folder)
    settings = folder / SETTINGS_FILE
    settings.write_text(tomli_w.dumps(settings_of(simulation)), encoding="utf-8")
    written = [settings]
    tables = (simulation.impressions, simulation.clicks, simulation.conversions)
    for kind, table in enumerate(tables):
        path = folder / f"{TOPICS[kind]}.{file_format}"
        if file_format == "parquet":
            _write_parquet(table, path)
        else:
            _write_lines(event_objects(table, kind), path)
        written.append(path)
    if simulation.malformed:
        _write_lines((asdict(message) for message in simulation.malformed), folder / MALFORMED_FILE)
        written.append(folder / MALFORMED_FILE)
    _write_parquet(simulation.truth, folder / TRUTH_FILE)
    return [*written, folder / TRUTH_FILE]


def settings_of(simulation: Simulation) -> dict[str, Any]:
    """What ``simulation.toml`` holds: the config, the windows, the known facts, and what was written."""
    config = simulation.config.to_mapping()
    windows = {name: config[name] for name in ("click_window", "attribution_window")}
    return {
        "simulation": config,
        "attribution": windows,
        "truth": simulation.facts,
        "counts": simulation.counts,
    }


def _remove_former(folder: Path) -> None:
    former = sorted(path for topic in TOPICS for path in folder.glob(f"{topic}*") if path.is_file())
    if former and not (folder / SETTINGS_FILE).exists():
        raise DataError(
            f"expected an empty folder, or one that holds a simulated log. Received: {folder} with "
            f"{', '.join(path.name for path in former)} and no {SETTINGS_FILE}.",
            hint="choose another folder with --out: events that were not simulated are never replaced",
        )
    ours = [f"{topic}.{suffix}" for topic in TOPICS for suffix in ("parquet", "jsonl")]
    for name in [*ours, MALFORMED_FILE, TRUTH_FILE]:
        (folder / name).unlink(missing_ok=True)


def _write_parquet(table: pa.Table, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    pq.write_table(table, part, compression="zstd", compression_level=1)
    os.replace(part, path)


def _write_lines(objects: Iterable[dict[str, Any]], path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        for value in objects:
            file.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
    os.replace(part, path)
