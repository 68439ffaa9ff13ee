"""What lies in the folder of one checkpoint: shards of arrays, plain data, and a manifest that seals them.

A *base* holds every table whole; a *delta* the rows that changed since the checkpoint before it, and its
``chain`` names the checkpoints it stands on, base first, each with its seal. All else is whole in both, but
for what a delta's ``unchanged`` names: that is as it was in the checkpoint before it.

``shards`` is a list. A shard's ``tables`` say what it holds of each: the rows from ``first`` on, in a base;
the rows in the array ``index``, in a delta. Rows are counted in the whole table, so a table may be split
over several shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from jobs.tensor_file import write_tensors
from pipelines.errors import StaleStateError
from pipelines.synced_files import sync_folder, write_synced

__all__ = [
    "FORMAT",
    "PLAIN",
    "OtherFormatError",
    "broken_file",
    "read_arrays",
    "read_manifest",
    "write_files",
]

FORMAT = 2
MANIFEST, PLAIN, SHARD = "MANIFEST.json", "state.json", "shard-00000.safetensors"
_INDEX = "@rows"
Arrays = dict[str, NDArray[Any]]


class OtherFormatError(StaleStateError):
    """A checkpoint of another version of ctrstream."""


def write_files(
    folder: Path,
    arrays: Mapping[str, NDArray[Any]],
    tables: Mapping[str, NDArray[Any]],
    changes: Mapping[str, NDArray[np.int64]] | None,
    plain: Mapping[str, Any],
    about: Mapping[str, Any],
    unchanged: Sequence[str] = (),
) -> dict[str, Any]:
    """Fill a checkpoint's folder, the manifest last; returns the manifest with its seal.

    Parameters
    ----------
    folder : Path
        Exists and is empty.
    changes : mapping of str to ndarray, or None
        Rows of each table to write; None writes all.
    about : mapping
        The rest of the manifest.
    unchanged : sequence of str
        Arrays that a delta leaves out, for the checkpoint before it has them.

    Raises
    ------
    OSError
        If the disk refuses.
    """
    left_out = set() if changes is None else set(unchanged)
    own = {name: array for name, array in arrays.items() if name not in left_out}
    tensors, parts = _shard(own, tables, changes)
    text = json.dumps(plain, sort_keys=True).encode()
    files = {SHARD: write_tensors(folder / SHARD, tensors), PLAIN: hashlib.sha256(text).hexdigest()}
    write_synced(folder / PLAIN, text)
    manifest = {
        "format": FORMAT,
        **about,
        "shards": [{"rank": 0, "file": SHARD, "tables": parts, "unchanged": sorted(left_out)}],
        "files": files,
    }
    manifest["seal"] = _seal(manifest)
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(folder)
    return manifest


def _shard(
    arrays: Mapping[str, NDArray[Any]],
    tables: Mapping[str, NDArray[Any]],
    changes: Mapping[str, NDArray[np.int64]] | None,
) -> tuple[Arrays, dict[str, dict[str, Any]]]:
    if changes is None:
        return {**arrays, **tables}, {name: {"first": 0} for name in tables}
    tensors, parts, indices = dict(arrays), {}, dict[bytes, str]()
    for name, rows in changes.items():
        # A table and its slots change in the same rows: one index serves both.
        index = indices.setdefault(rows.tobytes(), f"{_INDEX}/{len(indices)}")
        tensors[index], tensors[name] = rows, tables[name][rows]
        parts[name] = {"index": index}
    return tensors, parts


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, with its seal; its files are not looked at.

    Raises
    ------
    OtherFormatError
        If another version of ctrstream wrote it.
    StaleStateError
        If there is none that can be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise StaleStateError(f"checkpoint {folder.name} has no readable {MANIFEST}: {error}") from error
    is_object = isinstance(manifest, dict)
    unsealed = {key: value for key, value in manifest.items() if key != "seal"} if is_object else {}
    is_old = unsealed.get("format") == 1 and "seal" not in manifest  # the first format had none
    if not is_old and (not unsealed or manifest.get("seal") != _seal(unsealed)):
        raise StaleStateError(f"checkpoint {folder.name}: {MANIFEST} is corrupt")
    if manifest["format"] != FORMAT:
        raise OtherFormatError(
            f"checkpoint {folder.name}: expected format {FORMAT}. Received: {manifest['format']}",
            hint="use the version of ctrstream that wrote it, or start a new state folder from a release",
        )
    return manifest


def broken_file(folder: Path, manifest: Mapping[str, Any], seen: dict[Path, str]) -> str | None:
    """What is wrong with the first file that is not what the manifest says; None if all are.

    ``seen`` remembers what files have been hashed.
    """
    for file, expected in manifest["files"].items():
        path = folder / file
        found = seen[path] if path in seen else seen.setdefault(path, _sha256(path))
        if found != expected:
            return f"{file} is corrupt (sha256 {found[:12]}, expected {expected[:12]})"
    return None


def read_arrays(chain: Sequence[tuple[Path, Mapping[str, Any]]]) -> Arrays:
    """All arrays of the last checkpoint of a chain: folders and manifests, base first, verified before."""
    tables: Arrays = {}
    arrays: Arrays = {}
    for folder, manifest in chain:
        before, arrays, pieces = arrays, {}, dict[str, list[tuple[int, NDArray[Any]]]]()
        for shard in manifest["shards"]:
            tensors = load_file(folder / shard["file"])
            arrays.update({name: before[name] for name in shard["unchanged"]})
            for name, part in shard["tables"].items():
                values = tensors.pop(name)
                if "index" in part:
                    tables[name][tensors[part["index"]]] = values
                else:
                    pieces.setdefault(name, []).append((part["first"], values))
            arrays.update({name: found for name, found in tensors.items() if not name.startswith(_INDEX)})
        for name, found in pieces.items():
            ordered = [values for _, values in sorted(found, key=lambda piece: piece[0])]
            tables[name] = np.concatenate(ordered) if len(ordered) > 1 else ordered[0]
    return {**arrays, **tables}


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "missing"
