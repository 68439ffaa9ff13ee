"""Segment corrections beside MCGrad, raw ratios and the truth: log loss and seconds; and the stream's speed.

::

    make bench-calibration-segments ARGS='--rows 1000000 --without-mcgrad'

A model is off by a factor of its own for each advertiser and, within it, for each campaign. Traffic goes to
5,000 campaigns by Zipf's law; a twentieth of the rows that are judged belongs to campaigns that are new. The
truth is known, so log loss is an expectation and free of the noise of labels: `excess` is what a method loses
against the oracle, in nats a row. Seconds are processor time, fitting and applying together.

Two sums, ``C`` and ``E``, would do for a shift by the logarithm of the multiplier. What that costs against
the four that are kept is shown beside: next to nothing for clicks, much for conversions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.gamma_poisson import prior_strength
from calibration.link import sigmoid
from calibration.segments import SegmentConfig, SegmentCorrection
from jobs.single_thread import use_one_thread

__all__ = ["main"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Method = Callable[["Rows", "Rows"], Floats]

_ADVERTISERS, _CAMPAIGNS, _NEW = 300, 5_000, 500
_NEW_SHARE = 0.05
_ADVERTISER_DEVIATION, _CAMPAIGN_DEVIATION, _ROW_DEVIATION = 0.3, 0.25, 0.8
_BASES = {"clicks": -4.0, "conversions": -0.7}
_BATCHES = (256, 1_024, 4_096, 16_384)


@dataclass(frozen=True)
class Rows:
    """Advertiser and campaign (n, 2), the model's logit, the true one, and the label."""

    keys: Ints
    logit: Floats
    truth: Floats
    label: Floats

    @property
    def is_new(self) -> NDArray[np.bool_]:
        """Whether a row's campaign is in the judged rows only."""
        return self.keys[:, 1] >= _CAMPAIGNS


class World:
    """Advertisers, campaigns and how far the model is off for each."""

    def __init__(self, base: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        every = _CAMPAIGNS + _NEW
        self.base = base
        self.advertiser = rng.integers(0, _ADVERTISERS, every)
        self.level = rng.normal(0.0, 0.5, every)
        above = rng.normal(0.0, _ADVERTISER_DEVIATION, _ADVERTISERS)
        self.error = above[self.advertiser] + rng.normal(0.0, _CAMPAIGN_DEVIATION, every)
        share = 1.0 / np.arange(1, _CAMPAIGNS + 1)
        self.share = share / share.sum()

    def draw(self, count: int, seed: int, new_share: float = 0.0) -> Rows:
        """Rows of this world; so large a share of them of new campaigns."""
        rng = np.random.default_rng(seed)
        campaign = rng.choice(_CAMPAIGNS, count, p=self.share)
        new = rng.random(count) < new_share
        campaign[new] = _CAMPAIGNS + rng.integers(0, _NEW, int(new.sum()))
        logit = self.base + self.level[campaign] + rng.normal(0.0, _ROW_DEVIATION, count)
        truth = logit + self.error[campaign]
        keys = np.stack([self.advertiser[campaign], campaign], axis=1)
        return Rows(keys, logit, truth, (rng.random(count) < sigmoid(truth)).astype(float))


def ours(*names: str) -> Method:
    """A correction by the named levels of advertiser_id and campaign_id."""

    def fit_and_apply(train: Rows, judged: Rows) -> Floats:
        config = SegmentConfig(names)
        places = [("advertiser_id", "campaign_id").index(column) for column in config.columns]
        fitted = SegmentCorrection.fit(config, train.keys[:, places], sigmoid(train.logit), train.label)
        return fitted.transform_logit(judged.logit, judged.keys[:, places])

    return fit_and_apply


def unshrunk(train: Rows, judged: Rows) -> Floats:
    """By campaign, the observed rate over the expected one, half a click added to both."""
    observed, expected = _two_sums(train)
    return judged.logit + np.log((observed + 0.5) / (expected + 0.5))[judged.keys[:, 1]]


def two_sums(train: Rows, judged: Rows) -> Floats:
    """By campaign, a shift by the logarithm of the shrunk multiplier."""
    observed, expected = _two_sums(train)
    seen = expected > 0.0
    a = prior_strength(observed[seen], expected[seen])
    return judged.logit + np.log((observed + a) / (expected + a))[judged.keys[:, 1]]


def _two_sums(train: Rows) -> tuple[Floats, Floats]:
    campaign, every = train.keys[:, 1], _CAMPAIGNS + _NEW
    observed, expected = (np.bincount(campaign, part, every) for part in (train.label, sigmoid(train.logit)))
    return observed.astype(np.float64), expected.astype(np.float64)


def mcgrad(train: Rows, judged: Rows) -> Floats:
    """MCGrad as it comes; ImportError where it is not installed."""
    import pandas as pd
    from mcgrad import methods

    names = ["advertiser_id", "campaign_id"]

    def frame(rows: Rows) -> pd.DataFrame:
        columns = dict(zip(names, rows.keys.T.astype(str), strict=True))
        return pd.DataFrame({"p": sigmoid(rows.logit), "label": rows.label.astype(int), **columns})

    model = methods.MCGrad(random_state=1)
    model.fit(frame(train), "p", "label", categorical_feature_column_names=names)
    p = np.clip(model.predict(frame(judged), "p", categorical_feature_column_names=names), 1e-12, 1 - 1e-12)
    return np.asarray(np.log(p) - np.log1p(-p), np.float64)


_METHODS: dict[str, Method] = {
    "raw": lambda _, judged: judged.logit,
    "ratio, not shrunk": unshrunk,
    "campaign, two sums": two_sums,
    "campaign": ours("campaign_id"),
    "advertiser, campaign": ours("advertiser_id", "advertiser_id*campaign_id"),
    "the same, in turn": ours("advertiser_id", "campaign_id"),
    "oracle": lambda _, judged: judged.truth,
}


def log_loss(logit: Floats, truth: Floats) -> Floats:
    """Expected log loss of each row."""
    loss: Floats = np.logaddexp(0.0, logit) - sigmoid(truth) * logit
    return loss


def compare(train: Rows, judged: Rows, methods: dict[str, Method]) -> None:
    """Print a line for each method."""
    best = log_loss(judged.truth, judged.truth)
    print(f"  {'method':<22} {'log loss':>9} {'excess':>10} {'of new':>10} {'seconds':>9}")
    for name, method in methods.items():
        began = time.process_time()
        try:
            logit = method(train, judged)
        except ImportError as error:
            print(f"  {name:<22} not installed ({error}); make setup-bench")
            continue
        seconds = time.process_time() - began
        loss = log_loss(logit, judged.truth)
        excess = loss - best
        print(
            f"  {name:<22} {loss.mean():9.6f} {excess.mean():10.6f} {excess[judged.is_new].mean():10.6f} "
            f"{seconds:9.3f}",
            flush=True,
        )


def stream_speed(rows: Rows) -> None:
    """Print rows a second of updates and corrections by the size of a batch, and what else it costs."""
    levels = SegmentConfig(("all", "advertiser_id", "advertiser_id*campaign_id"))
    print("\nlevels all, advertiser_id, advertiser_id*campaign_id, in a stream")
    print(f"  {'rows a batch':>12} {'update rows/s':>14} {'correct rows/s':>15}")
    for size in _BATCHES:
        segments = SegmentCorrection.fit(levels, rows.keys, sigmoid(rows.logit), rows.label)
        probability, batches = sigmoid(rows.logit), max(1, min(200_000, len(rows.logit)) // size)
        parts = [slice(place * size, (place + 1) * size) for place in range(batches)]
        began = time.process_time()
        for part in parts:
            segments.update(rows.keys[part], probability[part], rows.label[part])
        learned = time.process_time()
        for part in parts:
            segments.transform_logit(rows.logit[part], rows.keys[part])
        corrected = time.process_time()
        counted = batches * size
        print(f"  {size:12,} {counted / (learned - began):14,.0f} {counted / (corrected - learned):15,.0f}")
    twin = SegmentCorrection.from_state(segments.state())
    actions: dict[str, Callable[[], None]] = {
        "merge and refit": lambda: segments.merge(twin),
        "refit": segments.refit,
    }
    for name, action in actions.items():
        began = time.process_time()
        action()
        print(f"  {name} of {_CAMPAIGNS:,} campaigns: {1e3 * (time.process_time() - began):.0f} ms")
    print(f"  state: {len(json.dumps(segments.state())) / 1e6:.2f} MB of JSON")


def main() -> None:
    """Compare in both worlds, then measure the stream."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration_segments")
    parser.add_argument("--rows", type=int, default=500_000, help="to fit to")
    parser.add_argument("--judged", type=int, default=300_000, help="rows that are judged")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without-mcgrad", action="store_true", help="it takes minutes")
    given = parser.parse_args()
    use_one_thread()
    methods = dict(_METHODS)
    # Loads what the first fit imports.
    few = World(_BASES["clicks"], given.seed).draw(2_000, given.seed)
    methods["advertiser, campaign"](few, few)
    if not given.without_mcgrad:
        methods["mcgrad"] = mcgrad
    for name, base in _BASES.items():
        world = World(base, given.seed)
        train = world.draw(given.rows, given.seed + 1)
        judged = world.draw(given.judged, given.seed + 2, _NEW_SHARE)
        print(f"{name}: {given.rows:,} rows, rate {train.label.mean():.3f}, {_CAMPAIGNS:,} campaigns")
        compare(train, judged, methods)
    stream_speed(World(_BASES["clicks"], given.seed).draw(given.rows, given.seed + 1))


if __name__ == "__main__":
    main()
