"""Rivals that take one row at a time: how many rows a second they predict and learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["river_rate", "vowpal_wabbit_rate"]

Clock = Callable[[], float]


def vowpal_wabbit_rate(lines: Sequence[str], options: str, clock: Clock) -> float:
    """Rows a second of Vowpal Wabbit from lines of its text format, parsing included."""
    from vowpalwabbit import Workspace

    model = Workspace(f"--loss_function logistic -b 22 --quiet {options}")
    began = clock()
    for line in lines:
        example = model.parse(line)
        model.predict(example)
        model.learn(example)
        model.finish_example(example)
    return len(lines) / (clock() - began)


def river_rate(model: Any, rows: Sequence[Sequence[int]], clicked: Sequence[float], clock: Clock) -> float:
    """Rows a second of a River classifier, from ready dicts of the rows' buckets."""
    examples = [
        (dict.fromkeys(map(str, row), 1.0), bool(label)) for row, label in zip(rows, clicked, strict=True)
    ]
    began = clock()
    for features, label in examples:
        model.predict_proba_one(features)
        model.learn_one(features, label)
    return len(examples) / (clock() - began)
