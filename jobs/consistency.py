"""``ctrstream consistency``: rescore what was served, offline, with the release that served it.

Features are extracted again from the impression as it was received and compared bucket by bucket; then the
logits and probabilities. Nothing is taken over from the server but the name of the release.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError

if TYPE_CHECKING:
    from jobs.release import Release
    from pipelines.feature_spec import FeatureSpec
    from pipelines.features import Encoded

__all__ = ["check_consistency", "column_names", "command"]

log = logging.getLogger(__name__)

Line = Mapping[str, Any]
_CHUNK_ROWS = 4096
# A probability is the calibrator's answer to a logit that may differ by some 1e-6.
_PROBABILITY_GATE = 1e-4


def check_consistency(served: Path, releases: Path) -> dict[str, Any]:
    """Rescore a log of served impressions.

    Parameters
    ----------
    served : Path
        ``served.jsonl`` of ``ctrstream serve``.
    releases : Path
        Folder with the releases that served.

    Returns
    -------
    dict
        ``rows`` (impressions compared); over all tasks ``max_abs_delta_logit, p99_abs_delta_logit,
        rows_over_gate`` (|Δlogit| > 1e-4 or not finite), ``share_over_noise`` (> 1e-5), ``spearman``;
        ``max_abs_delta_probability``; ``features`` (those that differ, by first row) and
        ``first_differing_feature``; ``tasks`` (`monitoring.consistency.consistency` of each);
        ``releases`` (rows of each); ``rows_of_changed_releases`` (served under another digest);
        ``rows_without_release`` (removed since); ``unreadable_lines`` (cut by a kill); ``status``, ``good``
        or ``bad``, and ``why``.

    Raises
    ------
    DataError
        If the log is missing or holds no row that can be rescored.
    StaleStateError
        If a release is damaged.
    """
    rescored = _Rescored()
    name, release = "", None
    for chunk_name, lines in _chunks(served, rescored):
        if chunk_name != name:  # one release at a time: the log is written in their order
            name, release = chunk_name, _load(releases, chunk_name)
        if release is None:
            rescored.without_release += len(lines)
        else:
            rescored.add(release, lines)
    if not rescored.rows:
        raise DataError(
            f"expected impressions in {served} that were served by releases in {releases}. Found none "
            f"({rescored.without_release} of removed releases, {rescored.unreadable} unreadable lines).",
            hint="score something first, and keep the releases that served",
        )
    return rescored.outcome()


class _Rescored:
    """Both sides of what was rescored so far, and what could not be."""

    def __init__(self) -> None:
        self.rows = 0
        self.without_release = 0
        self.unreadable = 0
        self.changed = 0
        self._releases: Counter[str] = Counter()
        self._logged: dict[str, list[NDArray[np.float64]]] = {}
        self._again: dict[str, list[NDArray[np.float64]]] = {}
        self._probability_delta = 0.0
        self._features: dict[str, dict[str, Any]] = {}

    def add(self, release: Release, lines: Sequence[Line]) -> None:
        """Score the impressions of some lines again."""
        from jobs.served_log import DIGEST_DIGITS

        encoded = release.encode([line["impression"] for line in lines])
        self._compare_features(release.spec, encoded, lines)
        for task, scored in release.score(encoded).items():
            self._logged.setdefault(task, []).append(_column(lines, "logit", task))
            self._again.setdefault(task, []).append(scored.logit)
            delta = np.abs(_column(lines, "probability", task) - scored.probability)
            # NaN, a task that was not logged, is the logits' finding.
            self._probability_delta = max(self._probability_delta, float(np.nan_to_num(delta).max()))
        self.changed += sum(line.get("digest") != release.digest()[:DIGEST_DIGITS] for line in lines)
        self._releases[release.name] += len(lines)
        self.rows += len(lines)

    def _compare_features(self, spec: FeatureSpec, encoded: Encoded, lines: Sequence[Line]) -> None:
        from monitoring.consistency import differing_features

        again = _joined(encoded.buckets, encoded.numbers, encoded.ids)
        shape = (encoded.buckets.shape[1], encoded.numbers.shape[1], encoded.ids.shape[1])
        if any(
            (len(line["buckets"]), len(line["numbers"]), len(line.get("ids", ()))) != shape for line in lines
        ):
            self._differs("(number of columns)", len(lines), 0)
            return
        buckets = np.array([line["buckets"] for line in lines], np.int32)
        numbers = np.array([line["numbers"] for line in lines], np.float32)
        ids = np.array([line.get("ids", ()) for line in lines], np.int64)
        for found in differing_features(_joined(buckets, numbers, ids), again, column_names(spec)):
            self._differs(found["feature"], found["rows"], found["first_row"])

    def _differs(self, feature: str, rows: int, first_row: int) -> None:
        first = {"feature": feature, "rows": 0, "first_row": self.rows + first_row}
        self._features.setdefault(feature, first)["rows"] += rows

    def outcome(self) -> dict[str, Any]:
        """What `check_consistency` returns."""
        from monitoring.consistency import consistency

        logged = {task: np.concatenate(parts) for task, parts in sorted(self._logged.items())}
        again = {task: np.concatenate(self._again[task]) for task in logged}
        tasks = {task: consistency(logged[task], again[task]) for task in logged}
        overall = consistency(np.concatenate(list(logged.values())), np.concatenate(list(again.values())))
        features = sorted(self._features.values(), key=lambda feature: int(feature["first_row"]))
        for feature in features:
            feature["share"] = feature["rows"] / self.rows
        first = features[0]["feature"] if features else None
        bad = [f"{len(features)} features differ, `{first}` first"] if features else []
        bad += [f"{task}: {found['why']}" for task, found in tasks.items() if found["status"] != "good"]
        if self._probability_delta > _PROBABILITY_GATE:
            bad.append(f"probabilities differ by up to {self._probability_delta:.2g}")
        if self.changed:
            bad.append(f"{self.changed} rows were served by a release that was changed since")
        return {
            "rows": self.rows,
            "max_abs_delta_logit": overall["max_abs_delta"],
            "p99_abs_delta_logit": overall["p99_abs_delta"],
            "rows_over_gate": overall["rows_over_gate"],
            "share_over_noise": overall["share_over_noise"],
            "spearman": overall["spearman"],
            "max_abs_delta_probability": self._probability_delta,
            "features": features,
            "first_differing_feature": first,
            "tasks": tasks,
            "releases": dict(self._releases),
            "rows_of_changed_releases": self.changed,
            "rows_without_release": self.without_release,
            "unreadable_lines": self.unreadable,
            "status": "bad" if bad else "good",
            "why": "; ".join(bad) or f"{self.rows} rows agree, max |Δlogit| {overall['max_abs_delta']:.2g}",
        }


def column_names(spec: FeatureSpec) -> list[str]:
    """Names of the encoded columns: ``item_id``, ``history[2]``; ``age (number)``; ``item_id (id)``."""
    fields, seen = spec.column_field, Counter[int]()
    lengths = Counter(fields)
    names = []
    for field in fields:
        name = spec.field_names[field]
        names.append(name if lengths[field] == 1 else f"{name}[{seen[field]}]")
        seen[field] += 1
    numbers = [f"{number.name} (number)" for number in spec.numeric]
    return names + numbers + [f"{names[column]} (id)" for column in spec.id_columns]


def _chunks(served: Path, rescored: _Rescored) -> Iterator[tuple[str, list[Line]]]:
    """Neighbouring lines of one release."""
    import orjson

    def lines() -> Iterator[Line]:
        with served.open("rb") as file:
            for text in file:
                try:
                    line = orjson.loads(text)
                except orjson.JSONDecodeError:
                    rescored.unreadable += bool(text.strip())
                    continue
                yield line

    try:
        for name, group in groupby(lines(), key=lambda line: str(line["release"])):
            while chunk := list(islice(group, _CHUNK_ROWS)):
                yield name, chunk
    except FileNotFoundError as error:
        raise DataError(f"there is no log of served impressions at {served}.", hint="see --served") from error


def _load(releases: Path, name: str) -> Release | None:
    from jobs.release import Release
    from jobs.release_manifest import parse_name

    parse_name(name)  # it came from a file: no path may be smuggled in
    return Release.load(releases / name) if (releases / name).exists() else None


def _column(lines: Sequence[Line], key: str, task: str) -> NDArray[np.float64]:
    values = [line[key].get(task) for line in lines]
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _joined(
    buckets: NDArray[np.int32], numbers: NDArray[np.float32], ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Buckets, the bits of the numbers and ids side by side: numbers must be equal to the bit."""
    bits = np.ascontiguousarray(numbers).view(np.int32)
    return np.concatenate([buckets, bits, ids], axis=1, dtype=np.int64)


@click.command()
@click.option(
    "--served",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="served.jsonl of `ctrstream serve`.",
)
@click.option(
    "--releases",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder with the releases that served.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures to this JSON file."
)
@click.pass_context
def command(ctx: click.Context, served: Path, releases: Path, out: Path | None) -> None:
    """Rescore served requests offline and compare features and logits.

    Exit code 0 if no row differs by more than 1e-4 in the logit and no feature differs, else 1. Prints the
    figures as JSON.
    """
    from jobs.options import writable_folder

    if out is not None:
        writable_folder(out.parent)
    outcome = check_consistency(served, releases)
    text = json.dumps(outcome, indent=2)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    click.echo(text)
    if outcome["status"] != "good":
        log.error("served and rescored differ: %s", outcome["why"])
        ctx.exit(1)
    log.info("%s", outcome["why"])
