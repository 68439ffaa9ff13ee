"""A run folder as the report reads it: what is there, and what is not."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config_sections import TASKS
from pipelines.errors import DataError

__all__ = ["RunFolder"]

_FILES = ("metrics", "reliability", "drift", "consistency", "freshness", "accounting", "summary")


@dataclass(frozen=True)
class RunFolder:
    """Content of a run folder; a document that is not there is None.

    Attributes
    ----------
    path : Path
    metrics, reliability : dict
        As `jobs.evaluation` writes them.
    drift : dict
        As `jobs.drift.drift_document` makes it.
    consistency : dict
        As `jobs.consistency.check_consistency` returns it.
    freshness : dict
        ``stages`` (name -> figures of `monitoring.freshness.LatencyHistogram.value`), ``budget_s``.
    accounting : dict
        ``read``, ``classes`` (kind -> class -> rows), ``difference``.
    summary : dict
        What ``ctrstream demo`` leaves: ``stages, rows, recovery, quality, freshness_s, consistency, links``.
    config : dict
        ``config.toml``; ``config_digest`` and ``spec_digest`` are the sha256 of the files.
    releases : tuple of str
        Names of the releases, oldest first.
    """

    path: Path
    metrics: dict[str, Any] | None
    reliability: dict[str, Any] | None
    drift: dict[str, Any] | None
    consistency: dict[str, Any] | None
    freshness: dict[str, Any] | None
    accounting: dict[str, Any] | None
    summary: dict[str, Any] | None
    config: dict[str, Any] | None
    config_digest: str | None
    spec_digest: str | None
    releases: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read whatever the folder holds.

        Raises
        ------
        DataError
            If there is no such folder, it holds nothing that a report is made of, or a file is damaged.
        """
        if not path.is_dir():
            raise DataError(f"expected a run folder. There is none at {path}.", hint=_HINT)
        documents = {name: _json(path / f"{name}.json") for name in _FILES}
        if not any(documents.values()):
            raise DataError(
                f"expected a run folder with {', '.join(f'{name}.json' for name in _FILES)}. "
                f"{path} holds none of them.",
                hint=_HINT,
            )
        config = path / "config.toml"
        return cls(
            path=path,
            **documents,
            config=_toml(config),
            config_digest=_digest(config),
            spec_digest=_digest(path / "feature_spec.toml"),
            releases=_releases(path / "releases"),
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks with figures."""
        return tuple(task for task in TASKS if task in (self.metrics or {}))

    def task(self, task: str) -> dict[str, Any]:
        """Figures of one task."""
        found: dict[str, Any] = (self.metrics or {})[task]
        return found


_HINT = "`ctrstream backtest --events DIR --out RUN` makes one"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not valid JSON: {error}.", hint="run the command that writes it again"
        ) from error
    if not isinstance(document, dict):
        raise DataError(f"expected a JSON object in {path}. Received: {type(document).__name__}.")
    return document


def _toml(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid TOML: {error}.") from error


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _releases(folder: Path) -> tuple[str, ...]:
    """Releases by (epoch, step): their names sort like that within a kind."""
    found = [path.parent.name for path in folder.glob("*/MANIFEST.json")]
    return tuple(sorted(found, key=lambda name: (name.split("-")[1:], name)))
