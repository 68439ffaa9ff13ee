"""The formats that ``samples ingest`` reads: which files they are made of, and how they become lake rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pipelines.adapter_avazu import AvazuOptions, avazu
from pipelines.adapter_criteo import (
    CriteoAttributionOptions,
    CriteoConversionsOptions,
    criteo_attribution,
    criteo_conversions,
)
from pipelines.adapter_events import union
from pipelines.adapter_kuairand import KuaiRandOptions, kuairand
from pipelines.adapter_mapping import LongMapping, WideMapping, load_options
from pipelines.adapter_table import long_table, wide_table
from pipelines.adapter_taobao import TaobaoOptions, taobao
from pipelines.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["ADAPTERS", "Adapter", "adapted_rows", "load_adapter", "log_files"]

# What the roles of a format's files are called in its options.
_PATTERNS = {"log": "files"}
# Where the files are says nothing about their events.
_FILE_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("files", "ads", "users", "videos"), True),
    **{section: {"files"} for section in ("input", "click", "conversion")},
}


@dataclass(frozen=True)
class Adapter:
    """A format, ready to read.

    Attributes
    ----------
    name : str
    options : BaseModel
        Of the format's own model.
    read : callable
        ``read(spark, paths by role, options)`` gives frames of lake rows by role.
    logs : tuple of str
        Roles of files that hold events.
    tables : tuple of str
        Roles of files that describe users or items.
    """

    name: str
    options: BaseModel
    read: Callable[[SparkSession, Mapping[str, Sequence[str]], Any], dict[str, DataFrame]]
    logs: tuple[str, ...] = ("log",)
    tables: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """Name and digest of the options: what decides which events a file gives."""
        options = self.options.model_dump(mode="json", exclude=_FILE_OPTIONS)
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        return f"{self.name}@{digest[:12]}/"

    def kind(self, role: str) -> str:
        """What the lake notes of a file of a role, beside its content."""
        return f"{self.family}{role}"


# Format -> model of its options, reader, tables beside its log.
ADAPTERS: dict[str, tuple[type[BaseModel], Callable[..., dict[str, DataFrame]], tuple[str, ...]]] = {
    "criteo-attribution": (CriteoAttributionOptions, criteo_attribution, ()),
    "criteo-conversions": (CriteoConversionsOptions, criteo_conversions, ()),
    "avazu": (AvazuOptions, avazu, ()),
    "taobao": (TaobaoOptions, taobao, ("ads", "users")),
    "kuairand": (KuaiRandOptions, kuairand, ("users", "videos")),
    "table": (WideMapping, wide_table, ()),
}


def load_adapter(name: str, mapping: Path | None = None, origin: int | None = None) -> Adapter:
    """A format with its options.

    Parameters
    ----------
    name : str
        One of `ADAPTERS`.
    mapping : Path, optional
        TOML file of the options; the format ``table`` needs one.
    origin : int, optional
        What relative times count from, ms since the epoch.

    Raises
    ------
    ConfigError
        If the options do not fit (`pipelines.adapter_mapping.load_options`), or are missing.
    """
    model, read, tables = ADAPTERS[name]
    if name == "table" and mapping is None:
        raise ConfigError(
            "expected --mapping FILE.toml: the format table says nothing about its columns.",
            hint="docs/formats.md has examples",
        )
    options = load_options(model, mapping, origin)
    if isinstance(options, LongMapping):
        return Adapter(name, options, long_table, ("log", "clicks", "conversions"))
    return Adapter(name, options, read, tables=tables)


def log_files(adapter: Adapter, names: Sequence[str], folder: str) -> dict[str, list[str]]:
    """The files of a folder that the format is made of, by role.

    Raises
    ------
    DataError
        If there is none of a log's, or of a table's.
    """
    found = {}
    for role in (*adapter.logs, *adapter.tables):
        patterns: tuple[str, ...] = getattr(adapter.options, _PATTERNS.get(role, role))
        found[role] = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if patterns and not found[role]:
            raise DataError(
                f"expected {' or '.join(patterns)} in {folder} (format {adapter.name}). "
                f"The folder has: {', '.join(names[:12]) or '(nothing)'}.",
                hint="other names: set the patterns in a --mapping file (docs/formats.md)",
            )
    return found


def adapted_rows(
    spark: SparkSession, adapter: Adapter, paths: Mapping[str, Sequence[str]], known: Sequence[str] = ()
) -> DataFrame:
    """Rows of the lake from the files of a log.

    Parameters
    ----------
    spark : SparkSession
    adapter : Adapter
    paths : mapping of str to sequence of str
        By role: files of the log that are to be read, and all files of its tables.
    known : sequence of str
        Names of tables' files whose unusable lines are in the lake already.

    Raises
    ------
    DataError
        If a file has not the columns of its format.
    ConfigError
        If a mapping does not fit the files.
    """
    from pyspark.sql import functions as F

    frames = adapter.read(spark, paths, adapter.options)
    for role in adapter.tables:
        frames[role] = frames[role].where(~F.col("source").isin(list(known)))
    return union(list(frames.values()))
