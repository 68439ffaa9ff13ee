"""How long a calibrator takes to fit, what it keeps, and how well it predicts, beside other libraries.

::

    make bench-calibration ARGS='--rows 100000 1000000 10000000 --spark-rows 2000000'

Labels of logits whose true map is curved and waves, as no parametric method has it. Each way is fitted in a
process of its own, to the same files; printed are

- the median seconds of the fits, and how many times as long as strictly increasing isotonic, the default,
- the expected log loss on fresh rows, from the true probabilities, so without label noise; scikit-learn's and
  netcal's isotonic regression say 0 or 1 for some rows that can be clicked: these are moved to 1e-6 from it,
- AUC lost by ties, in units of 1e-4,
- how much the process grew while it was fitted (MiB resident at its most), and what Python and numpy asked
  for at their most (tracemalloc, in a fit of its own),
- bytes of the state as JSON, with the sketch and frozen (ours only).

``--spark-rows`` compares Spark's own isotonic regression with sketches by Spark SQL, on one file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.process_memory import memory_mib
from calibration import quality
from calibration.link import sigmoid
from calibration.selection import METHODS

__all__ = ["main"]

Floats = NDArray[np.float64]
Predict = Callable[[Floats], Floats]

_FRESH = 400_000
_LEAST = 1e-6
_GOALS = (
    "goals: scikit-learn isotonic at least 20 at the most rows, memory at most 50 MiB, state at most 10 MB"
)


def truth(logit: Floats) -> Floats:
    """True logits: saturating, with a wave that no line and no beta map has."""
    return -0.5 - np.logaddexp(0.0, -(logit + 1.0)) + 0.15 * logit + 0.14 * np.sin(2.0 * logit) / 2.0


def draw(rows: int, seed: int) -> tuple[Floats, Floats]:
    """The model's logits, and labels."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-3.0, 1.5, rows)
    return logit, (rng.random(rows) < sigmoid(truth(logit))).astype(np.float64)


# -- ways: each is fitted to logits and labels and gives a map from logits to probabilities -----------------


def _ours(kind: str) -> Callable[[Floats, Floats], Predict]:
    return lambda logit, label: METHODS[kind].fit(logit, label).transform


def _sklearn_isotonic(logit: Floats, label: Floats) -> Predict:
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression(out_of_bounds="clip").fit(logit, label).predict  # type: ignore[no-any-return]


def _sklearn_logistic(logit: Floats, label: Floats) -> Predict:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=np.inf).fit(logit[:, None], label)
    return lambda fresh: fitted.predict_proba(fresh[:, None])[:, 1]


def _netcal(module: str, name: str, **settings: Any) -> Callable[[Floats, Floats], Predict]:
    def fit(logit: Floats, label: Floats) -> Predict:
        import importlib

        method = getattr(importlib.import_module(module), name)(**settings)
        method.fit(sigmoid(logit), label.astype(np.int64))
        return lambda fresh: np.asarray(method.transform(sigmoid(fresh)), np.float64)

    return fit


_REFERENCE = "isotonic"
WAYS: dict[str, Callable[[Floats, Floats], Predict]] = {
    **{kind: _ours(kind) for kind in (_REFERENCE, *(kind for kind in METHODS if kind != _REFERENCE))},
    "sklearn isotonic": _sklearn_isotonic,
    "sklearn logistic": _sklearn_logistic,
    "netcal isotonic": _netcal("netcal.binning", "IsotonicRegression"),
    "netcal histogram": _netcal("netcal.binning", "HistogramBinning", bins=20),
    "netcal logistic": _netcal("netcal.scaling", "LogisticCalibration"),
    "netcal beta": _netcal("netcal.scaling", "BetaCalibration"),
}


def expected_loss(probability: Floats, true_logit: Floats) -> float:
    """Expected log loss, nats."""
    p, said = sigmoid(true_logit), np.clip(probability, _LEAST, 1.0 - _LEAST)
    return float(-(p * np.log(said) + (1.0 - p) * np.log1p(-said)).mean())


def expected_auc(probability: Floats, true_logit: Floats) -> float:
    """AUC of the expected positives and negatives among these rows, ties counted half."""
    values, place = np.unique(probability, return_inverse=True)
    rows = np.bincount(place, minlength=len(values)).astype(np.float64)
    positives = np.bincount(place, sigmoid(true_logit), minlength=len(values)).astype(np.float64)
    return quality.auc(rows, positives)


def measured(way: str, folder: Path, repeats: int) -> dict[str, Any]:
    """One way in this process: seconds, memory, held-out figures, bytes of state."""
    fit = WAYS[way]
    logit, label = np.load(folder / "logit.npy"), np.load(folder / "label.npy")
    try:
        # Imports and tables belong to the process, not to the fit.
        fit(logit[:5_000], label[:5_000])
    except ImportError as error:
        return {"missing": f"{error.name} is not installed: make setup-bench"}
    before, seconds = memory_mib("VmRSS"), []
    for _ in range(repeats):
        began = time.perf_counter()
        predict = fit(logit, label)
        seconds.append(time.perf_counter() - began)
    grown = max(0.0, memory_mib("VmHWM") - before)
    fresh, _ = draw(_FRESH, 1)
    said, true_logit = predict(fresh), truth(fresh)
    found = {
        "seconds": float(np.median(seconds)),
        "grown": grown,
        "loss": expected_loss(said, true_logit),
        "auc_lost": expected_auc(fresh, true_logit) - expected_auc(said, true_logit),
    }
    tracemalloc.start()
    fit(logit, label)
    found["traced"] = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    if way in METHODS:
        fitted = METHODS[way].fit(logit, label)
        found["state"] = len(json.dumps(fitted.state()))
        found["frozen"] = len(json.dumps(fitted.frozen().state()))
    return found


def in_a_process(way: str, folder: Path, repeats: int) -> dict[str, Any]:
    """:func:`measured`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.calibration", "--way", way, "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--repeats", str(repeats)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(rows: int, ways: list[str], repeats: int) -> None:
    """All ways on one sample, as a table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        logit, label = draw(rows, 0)
        np.save(folder / "logit.npy", logit)
        np.save(folder / "label.npy", label)
        fresh, _ = draw(_FRESH, 1)
        print(f"\n{rows:,} rows, {label.mean():.2%} positives; medians of {repeats} fits\n")
        print(f"raw logits {expected_loss(sigmoid(fresh), truth(fresh)):.6f}, ", end="")
        print(f"truth {expected_loss(sigmoid(truth(fresh)), truth(fresh)):.6f}\n")
        print("| | s | x | log loss | AUC lost, 1e-4 | MiB grown | traced | state, frozen |")
        print("|---|---|---|---|---|---|---|---|")
        reference = None
        for way in ways:
            found = in_a_process(way, folder, repeats)
            if "missing" in found:
                print(f"| {way} | {found['missing']} | | | | | | |", flush=True)
                continue
            reference = reference or found["seconds"]
            state = f"{found['state']:,}, {found['frozen']:,}" if "state" in found else ""
            print(
                f"| {way} | {found['seconds']:.3f} | {found['seconds'] / reference:.1f} | "
                f"{found['loss']:.6f} | {1e4 * found['auc_lost']:.2f} | {found['grown']:.0f} | "
                f"{found['traced']:.0f} | {state} |",
                flush=True,
            )


def compare_spark(rows: int, repeats: int) -> None:
    """Spark's own isotonic regression against a sketch by Spark SQL, the calibrator included."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyspark.ml.regression import IsotonicRegression
    from pyspark.sql import functions as F

    from calibration.isotonic import IsotonicCalibrator
    from calibration.sketch_book import SketchKey
    from jobs.sketch_spark import sketch_book
    from pipelines.spark_session import spark_session, stop_spark

    with tempfile.TemporaryDirectory() as temporary:
        logit, label = draw(rows, 0)
        pq.write_table(pa.table({"logit": logit, "label": label}), f"{temporary}/rows.parquet")
        session = spark_session("bench-calibration", master="local[2]", long_running=True)
        try:
            table = session.read.parquet(f"{temporary}/rows.parquet")
            keyed = table.select("*", *(F.lit("all").alias(name) for name in SketchKey._fields))
            sketched: list[float] = []
            theirs: list[float] = []
            for _ in range(repeats + 1):
                began = time.perf_counter()
                ((_, sketch),) = sketch_book(keyed)
                IsotonicCalibrator.fit_sketch(sketch)
                sketched.append(time.perf_counter() - began)
                began = time.perf_counter()
                IsotonicRegression(featuresCol="logit", labelCol="label").fit(table)
                theirs.append(time.perf_counter() - began)
        finally:
            stop_spark(session)
    print(f"\nSpark, {rows:,} rows: sketch by SQL and isotonic, spark.ml; goal: at least 20 times as long\n")
    # A scheduled job pays for the first round, compiling included; a session that stays pays for the others.
    for name, mine, other in (
        ("first in a session", sketched[0], theirs[0]),
        ("later, median", float(np.median(sketched[1:])), float(np.median(theirs[1:]))),
    ):
        print(f"{name}: {mine:.2f} s, spark.ml {other:.2f} s: {other / mine:.1f} times as long")


def main() -> None:
    """Run all of it and print tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--spark-rows", type=int, default=2_000_000, help="0: without Spark")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=list(WAYS), help="run one way in this process, print JSON")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measured(given.way, given.folder, given.repeats)))
        return
    for rows in given.rows:
        compare(rows, given.ways, given.repeats)
    if given.rows:
        print(f"\n{_GOALS}")
    if given.spark_rows:
        compare_spark(given.spark_rows, given.repeats)


if __name__ == "__main__":
    main()
