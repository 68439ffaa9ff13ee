"""How fast samples are read batch by batch, and in how much memory, against the usual ways to read them.

::

    make bench-stream ARGS='--rows 8000000 --batch 4096'

Each way runs in a process of its own over the same Parquet files: 24 buckets, 8 numbers and the other columns
of a training set, 16 files with row groups of 131,072 rows. Measured is one pass: rows a second of wall time
and of processor time, and how much the resident set grew from just after the imports to its peak. Every way
gives all columns of each batch as arrays; a sum over two of them shows that the rows are the same.

``--train`` measures training instead: an epoch of the network, and the trees with one round, on rows in files
and on the same rows loaded first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.process_memory import memory_mib
from pipelines.feature_spec import Categorical, FeatureSpec, Numeric
from pipelines.sample_stream import DataFile, SampleStream, to_training_set
from pipelines.stream_columns import TRAINING_COLUMNS
from pipelines.streamed_rows import StreamedRows
from pipelines.training_set import TrainingRows, TrainingSet

__all__ = ["main"]

_FILES, _GROUP_ROWS = 16, 131_072
_DAY_MS = 86_400_000
_WIDTHS = {"buckets": 24, "numbers": 8, "segment_key": 1}
_NAMES = TRAINING_COLUMNS.names
# A batch: all columns, by name.
Arrays = dict[str, Any]


def write_files(folder: Path, rows: int) -> None:
    """Sixteen days, each sorted by time; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    for day in range(_FILES):
        path = folder / f"{day:02d}.parquet"
        if not path.exists():
            print(f"writing {path}")
            part = path.with_suffix(".part")
            count = rows * (day + 1) // _FILES - rows * day // _FILES
            pq.write_table(rows_of_day(day, count), part, row_group_size=_GROUP_ROWS, compression="snappy")
            part.rename(path)


def rows_of_day(day: int, n: int) -> pa.Table:
    """Ids as skewed as in ad logs, numbers without structure, one outcome in ten."""
    noise = np.random.default_rng(day)
    offsets = np.arange(_WIDTHS["buckets"], dtype=np.int32) * 100_000
    skewed = (noise.pareto(1.1, (n, _WIDTHS["buckets"])) * 20).astype(np.int64) % 100_000
    one = np.ones(n, np.float32)
    columns = {
        "sample_id": pa.array([f"{day:02d}-{number:09d}:click" for number in range(n)]),
        "buckets": _lists(skewed.astype(np.int32) + offsets),
        "numbers": _lists(noise.standard_normal((n, _WIDTHS["numbers"]), dtype=np.float32)),
        "user_key": pa.array(noise.integers(0, 1 << 20, n)),
        "segment_key": _lists(noise.integers(0, 100, (n, 1))),
        "label": pa.array((noise.random(n) < 0.1).astype(np.float32)),
        "weight": pa.array(one),
        "event_time": pa.array(np.sort(noise.integers(0, _DAY_MS, n)) + day * _DAY_MS),
        "mature": pa.array(one > 0),
        "observed_share": pa.array(one),
    }
    return pa.table(columns)


def _lists(matrix: NDArray[Any]) -> pa.ListArray:
    edges = np.arange(len(matrix) + 1, dtype=np.int32) * np.int32(matrix.shape[1])
    return pa.ListArray.from_arrays(pa.array(edges), pa.array(matrix.ravel()))


def _as_arrays(table: pa.Table | pa.RecordBatch) -> Arrays:
    """The quick way by hand: flatten and reshape."""
    found = {}
    for name in _NAMES:
        column = table.column(name)
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if name in _WIDTHS:
            found[name] = np.asarray(column.flatten()).reshape(-1, _WIDTHS[name])
        else:
            found[name] = column.to_numpy(zero_copy_only=False)
    return found


def _stream(paths: list[Path]) -> SampleStream:
    files = [DataFile(str(path), pq.read_metadata(path).num_rows) for path in paths]
    return SampleStream.of(files, matrices=_WIDTHS)


def ours(paths: list[Path], rows: int) -> Iterable[TrainingSet]:
    """Our stream in the order of the files, made ahead in a thread."""
    return _stream(paths).batch(rows).map(to_training_set).prefetch(2)


def ours_one_thread(paths: list[Path], rows: int) -> Iterable[TrainingSet]:
    """The same without a thread."""
    return _stream(paths).batch(rows).map(to_training_set)


def ours_in_time(paths: list[Path], rows: int) -> Iterable[TrainingSet]:
    """Our stream with the order of time checked; files that overlap would be merged."""
    return _stream(paths).in_time_order().batch(rows).map(to_training_set).prefetch(2)


def ours_shuffled(paths: list[Path], rows: int) -> Iterable[TrainingSet]:
    """Our stream through a buffer of 131,072 rows of 8 row groups."""
    return _stream(paths).shuffle(_GROUP_ROWS, 1).batch(rows).map(to_training_set).prefetch(2)


def whole_files(paths: list[Path], rows: int) -> Iterator[Arrays]:
    """All files into memory with pyarrow, then slices."""
    arrays = _as_arrays(pq.read_table(paths, columns=_NAMES))
    for start in range(0, len(arrays["label"]), rows):
        yield {name: values[start : start + rows] for name, values in arrays.items()}


def bare_arrow(paths: list[Path], rows: int) -> Iterator[Arrays]:
    """`iter_batches` of each file by hand: batches end where files end."""
    for path in paths:
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(rows, columns=_NAMES, use_threads=False):
                yield _as_arrays(batch)


def arrow_dataset(paths: list[Path], rows: int) -> Iterator[Arrays]:
    """`pyarrow.dataset` with its own threads and read-ahead: batches end where row groups end."""
    import pyarrow.dataset as pads

    for batch in pads.dataset([str(path) for path in paths]).to_batches(columns=_NAMES, batch_size=rows):
        yield _as_arrays(batch)


def torch_in_memory(paths: list[Path], rows: int) -> Iterator[Arrays]:
    """A `DataLoader` over a `TensorDataset` of everything, whole batches at a time."""
    import torch
    from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

    arrays = _as_arrays(pq.read_table(paths, columns=_NAMES))
    tensors = TensorDataset(
        *(torch.from_numpy(np.require(arrays[name], requirements="W")) for name in _NAMES)
    )
    del arrays
    batches = BatchSampler(SequentialSampler(tensors), rows, drop_last=False)
    for batch in DataLoader(tensors, sampler=batches, batch_size=None):
        yield dict(zip(_NAMES, (part.numpy() for part in batch), strict=True))


def _torch_iterable(paths: list[Path], rows: int, workers: int) -> Iterator[Arrays]:
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    class Rows(IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for arrays in bare_arrow(paths, rows):
                yield {
                    name: torch.from_numpy(np.require(values, requirements="W"))
                    for name, values in arrays.items()
                }

    for batch in DataLoader(Rows(), batch_size=None, num_workers=workers):
        yield {name: part.numpy() for name, part in batch.items()}


def torch_iterable(paths: list[Path], rows: int) -> Iterator[Arrays]:
    """A `DataLoader` over an `IterableDataset` that reads with pyarrow."""
    return _torch_iterable(paths, rows, 0)


def torch_iterable_worker(paths: list[Path], rows: int) -> Iterator[Arrays]:
    """The same with a worker process; its memory is not counted."""
    return _torch_iterable(paths, rows, 1)


WAYS: dict[str, Callable[[list[Path], int], Iterable[Any]]] = {
    way.__name__: way
    for way in (
        ours,
        ours_one_thread,
        ours_in_time,
        ours_shuffled,
        bare_arrow,
        arrow_dataset,
        whole_files,
        torch_in_memory,
        torch_iterable,
        torch_iterable_worker,
    )
}


def _train_network(rows: TrainingRows) -> None:
    from models.student import Student
    from pipelines.config_sections import StudentConfig

    Student.create(_spec(), StudentConfig(batch_rows=1024)).fit(rows, epochs=1)


def _train_trees(rows: TrainingRows) -> None:
    from models.gbdt import GbdtModel
    from pipelines.config_sections import TeacherConfig

    GbdtModel.fit(rows, _spec(), TeacherConfig(rounds=1), label_delay=30 * 60_000)


def _spec() -> FeatureSpec:
    return FeatureSpec(
        categorical=tuple(Categorical(name=f"c{n}", buckets=100_000) for n in range(_WIDTHS["buckets"])),
        numeric=tuple(
            Numeric(name=f"n{n}", low=-9, high=9, mean=0, std=1) for n in range(_WIDTHS["numbers"])
        ),
    )


def _streamed(paths: list[Path], train: Callable[[TrainingRows], None]) -> int:
    rows = StreamedRows(_stream(paths).in_time_order())
    train(rows)
    return len(rows)


def _loaded(paths: list[Path], train: Callable[[TrainingRows], None]) -> int:
    rows = TrainingSet(**_as_arrays(pq.read_table(paths, columns=_NAMES)))
    train(rows)
    return len(rows)


TRAINING: dict[str, Callable[[list[Path]], int]] = {
    "network_from_files": lambda paths: _streamed(paths, _train_network),
    "network_loaded": lambda paths: _loaded(paths, _train_network),
    "trees_from_files": lambda paths: _streamed(paths, _train_trees),
    "trees_loaded": lambda paths: _loaded(paths, _train_trees),
}


def measured(way: str, paths: list[Path], rows: int) -> dict[str, float]:
    """One pass: ``rows, sum, wall`` and ``cpu`` (seconds), ``grown`` (MiB)."""
    if way.startswith(("torch", "network")):
        import torch

        torch.set_num_threads(1)
    before, began, cpu = memory_mib("VmRSS"), time.perf_counter(), time.process_time()
    count, total = 0, 0.0
    if way in TRAINING:
        count = TRAINING[way](paths)
    else:
        for batch in WAYS[way](paths, rows):
            arrays = batch if isinstance(batch, dict) else vars(batch)
            label, last = arrays["label"], arrays["buckets"][:, -1]
            count += len(label)
            total += float(label.sum(dtype=np.float64) + last.sum(dtype=np.int64))
    return {
        "rows": count,
        "sum": total,
        "wall": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "grown": memory_mib("VmHWM") - before,
    }


def main() -> None:
    """Run every way in a process of its own and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sample_stream", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3, help="passes of each way; the quickest counts")
    parser.add_argument("--train", action="store_true", help="measure training")
    parser.add_argument("--way", choices=[*WAYS, *TRAINING], help="run one way in this process, print JSON")
    given = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"ctrstream-bench-samples-{given.rows}"
    paths = [folder / f"{day:02d}.parquet" for day in range(_FILES)]
    if given.way:
        print(json.dumps(measured(given.way, paths, given.batch)))
        return
    write_files(folder, given.rows)
    size = sum(path.stat().st_size for path in paths)
    print(f"{given.rows:,} rows, {size / 1e6:,.0f} MB of Parquet, batches of {given.batch}")
    found = {way: _quickest(way, given) for way in (TRAINING if given.train else WAYS)}
    expected = {(part["rows"], part["sum"]) for part in found.values()}
    if len(expected) != 1:
        raise SystemExit(f"the ways do not agree on the rows: {expected}")
    base = next(iter(found.values()))
    heads = ("rows/s", "first / it", "rows/cpu s", "first / it", "memory MiB", "it / first")
    print(f"{'':<22}" + "".join(f"{head:>13}" for head in heads))
    for way, part in found.items():
        figures = [
            f"{part['rows'] / part[name]:>13,.0f}{part[name] / base[name]:>13.2f}" for name in ("wall", "cpu")
        ]
        print(f"{way:<22}{''.join(figures)}{part['grown']:>13,.0f}{part['grown'] / base['grown']:>13.2f}")


def _quickest(way: str, given: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.sample_stream", "--way", way]
    command += ["--rows", str(given.rows), "--batch", str(given.batch)]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(given.repeat)
    ]
    best: dict[str, float] = min(runs, key=lambda run: float(run["wall"]))
    return best | {"grown": max(run["grown"] for run in runs)}


if __name__ == "__main__":
    main()
