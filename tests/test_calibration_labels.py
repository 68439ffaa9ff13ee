"""What the online calibrator hears: each kind of labels is unbiased, and its origin is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.chain import CalibrationChain
from calibration.delayed import exposure_weights
from calibration.label_origin import LabelOrigin
from calibration.online import OnlineConfig, OnlinePlatt
from jobs.calibration_feed import CalibrationFeed
from jobs.calibration_labels import begun_origin, label_origin
from jobs.online import OnlineLoop
from jobs.online_state import load_loop_state, loop_state
from models.base import sigmoid
from pipelines.config import load_config
from pipelines.config_sections import AttributionConfig
from pipelines.delay import DelayCurve
from pipelines.delay_evenness import delay_unevenness
from pipelines.duration import DAY_MS, HOUR_MS
from pipelines.errors import ConfigError, DataError, StaleStateError
from pipelines.events import CLICK, CONVERSION
from pipelines.hashing import hash_text
from pipelines.joined import Arrivals, Outcomes
from pipelines.joiner import CONVERSION_TASK, Joiner
from tests.small_run import SETTINGS, SmallRun

DAYS, CLICKS, WIDTH, OBSERVED, MEAN = 12, 30_000, 2 * DAY_MS, 3 * HOUR_MS, 8 * HOUR_MS
RULE = AttributionConfig(attribution_window=WIDTH, observation_window=OBSERVED, allowed_lateness=1)
# The model's error: in level and in slope.
SHIFT, SLOPE = 0.5, 0.8


def share_seen(elapsed: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray((1.0 - np.exp(-elapsed / MEAN)) / (1.0 - np.exp(-WIDTH / MEAN)))


GRID = np.linspace(0, WIDTH, 200)
CURVE = DelayCurve(GRID[1:], share_seen(GRID[1:]), 1e6)


class TheModel:
    """A student that says of a row what its number is."""

    def predict_logit(self, buckets: Any, numbers: NDArray[np.float64], ids: Any) -> NDArray[np.float64]:
        return numbers[:, 0]


@dataclass(frozen=True)
class World:
    """Clicks with exactly known probabilities, more at noon than at night, and a model that is off."""

    time: NDArray[np.int64]
    truth: NDArray[np.float64]
    logit: NDArray[np.float64]
    credit: NDArray[np.float64]
    bought: NDArray[np.int64]
    bought_at: NDArray[np.int64]

    @classmethod
    def of(cls, seed: int, credit: float = 1.0, *, swing: float = 1.0) -> World:
        rng = np.random.default_rng(seed)
        time = rng.integers(0, DAYS * DAY_MS, 3 * CLICKS)
        busy = 1.0 - swing * np.cos(2 * np.pi * (time % DAY_MS) / DAY_MS)
        time = np.sort(time[rng.random(len(time)) < busy / 3.0])
        own = rng.normal(-1.2, 0.7, len(time))
        converts = np.flatnonzero(rng.random(len(time)) < sigmoid(own))
        # Exponential, but none after the window.
        delay = -MEAN * np.log1p(-rng.random(len(converts)) * (1.0 - np.exp(-WIDTH / MEAN)))
        at = time[converts] + delay.astype(np.int64)
        order = np.argsort(at, kind="stable")
        shares = np.full(len(converts), credit)
        model = (own - SHIFT) / SLOPE
        return cls(time, credit * sigmoid(own), model, shares, converts[order], at[order])

    def arrivals(self, rows: slice) -> Arrivals:
        n = len(self.time[rows])
        features: dict[str, NDArray[Any]] = {
            "logit": self.logit[rows, None].astype(np.float32),
            "numbers": self.logit[rows, None],
            "buckets": np.zeros((n, 1), np.int32),
            "segment_key": np.zeros((n, 0), np.int64),
            "first_logit": np.full((n, 1), np.nan, np.float32),
            "heard": np.zeros((n, 1), np.bool_),
        }
        first = rows.start
        return Arrivals([f"i{first + k}" for k in range(n)], self.time[rows], self.time[rows], features)

    def outcomes(self, kind: int, rows: NDArray[np.int64], at: NDArray[np.int64]) -> Outcomes:
        names = [f"i{row}" for row in rows.tolist()]
        hashes = np.array([hash_text(f"{kind}.{name}") for name in names], np.uint64)
        credit = self.credit[: len(rows)] if kind == CONVERSION else np.ones(len(rows))
        no_place = np.zeros((len(rows), 3), np.int64)
        return Outcomes(names, at, at, hashes, np.zeros(len(rows), np.int8), credit, no_place)


Hears = Callable[[CalibrationChain, Joiner, Any, int], None]


def replay(world: World, policy: str, hears: Callable[[Joiner], Hears]) -> tuple[float, float]:
    """PCOC against the truth of what is predicted in the second half, and its standard error."""
    joiner, centre = Joiner(RULE, policy), float(world.logit.mean())
    chain = CalibrationChain(online=OnlinePlatt(OnlineConfig(1e-9, 1e-10), centre))
    hear, step = hears(joiner), 20 * 60_000
    predicted = truth = 0.0
    for clock in range(step, DAYS * DAY_MS, step):
        rows = slice(*np.searchsorted(world.time, [clock - step, clock]).tolist())
        bought = slice(*np.searchsorted(world.bought_at, [clock - step, clock]).tolist())
        if clock > DAYS // 2 * DAY_MS and rows.stop > rows.start:
            predicted += float(chain.transform(world.logit[rows]).sum())
            truth += float(world.truth[rows].sum())
        clicks = world.outcomes(CLICK, np.arange(rows.start, rows.stop), world.time[rows])
        sales = world.outcomes(CONVERSION, world.bought[bought], world.bought_at[bought])
        joined = joiner.process(world.arrivals(rows), clicks, sales, clock)
        if "logit" in joiner.features:
            hear(chain, joiner, joined, clock)
        joiner.release(joined)
    return predicted / truth, 1.0 / float(np.sqrt(truth))


def feed_of(mode: str, policy: str) -> Callable[[Joiner], Hears]:
    def begin(joiner: Joiner) -> Hears:
        digest = "curve" if mode == "delay_model" else None
        late = 1.0 if policy == "fnw" else 1.0 - float(share_seen(np.array([OBSERVED]))[0])
        feed = CalibrationFeed(
            CONVERSION_TASK,
            0,
            LabelOrigin(mode, policy, WIDTH, WIDTH, digest),
            CURVE,
            lambda elapsed: np.full(len(elapsed), late, np.float64),
            clock=0,
            patience=WIDTH,
        )
        model: Any = TheModel()

        def hear(chain: CalibrationChain, joiner: Joiner, joined: Any, clock: int) -> None:
            feed.note(joiner, model, joined.examples[CONVERSION_TASK])
            feed.teach(chain, joiner, joined, clock)

        return hear

    return begin


def naive(joiner: Joiner) -> Hears:
    """The rows of the stream as they come, each at its label."""

    def hear(chain: CalibrationChain, joiner: Joiner, joined: Any, clock: int) -> None:
        rows = joined.examples[CONVERSION_TASK]
        if len(rows):
            chain.update(joiner.features["logit"][rows.slot, 0], rows.label)

    return hear


@pytest.mark.parametrize("policy", ["fnw", "esdfm"])
@pytest.mark.parametrize(("mode", "swing"), [("matured", 1.0), ("delay_model", 1.0), ("policy", 0.5)])
def test_each_kind_of_labels_finds_the_true_level(mode: str, swing: float, policy: str) -> None:
    # Where traffic falls to nothing at night, the traffic ratio of policies is a few per cent off.
    pcoc, error = replay(World.of(5, swing=swing), policy, feed_of(mode, policy))
    assert abs(pcoc - 1.0) < 2.0 * error


@pytest.mark.parametrize(("policy", "least"), [("fnw", 0.15), ("esdfm", 0.1)])
def test_raw_rows_of_the_stream_would_not(policy: str, least: float) -> None:
    pcoc, error = replay(World.of(5), policy, naive)
    assert pcoc < 1.0 - least < 1.0 - 5.0 * error


def test_part_credit_counts_as_its_part() -> None:
    pcoc, error = replay(World.of(6, credit=0.6), "esdfm", feed_of("delay_model", "esdfm"))
    assert abs(pcoc - 1.0) < 3.0 * error


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_looks_add_up_to_the_score_of_the_final_label(label: float) -> None:
    rng = np.random.default_rng(1)
    f = rng.uniform(0.01, 0.99, 200)
    ages = np.sort(np.concatenate([np.zeros((1, 200)), rng.random((4, 200)), np.ones((1, 200))]), axis=0)
    last = 3 if label > 0 else 5
    score = np.zeros(200)
    for look in range(last):
        seen = np.full(200, label if look == last - 1 else 0.0)
        positive, negative = exposure_weights(f, seen, ages[look], ages[look + 1])
        score += positive * (1.0 - f) - negative * f
    np.testing.assert_allclose(score, label - f, rtol=1e-9)


def test_the_weights_have_the_gradient_of_the_likelihood_of_a_stretch() -> None:
    rng = np.random.default_rng(2)
    z, before = rng.normal(-1.0, 1.5, 100), rng.uniform(0.0, 0.6, 100)
    now = before + rng.uniform(0.0, 0.4, 100)

    def log_likelihood(logit: NDArray[np.float64], came: bool) -> NDArray[np.float64]:
        p = sigmoid(logit)
        hazard = p * (now - before) / (1.0 - p * before)
        return np.log(hazard if came else 1.0 - hazard)

    for came in (False, True):
        numeric = (log_likelihood(z + 1e-6, came) - log_likelihood(z - 1e-6, came)) / 2e-6
        f = sigmoid(z)
        positive, negative = exposure_weights(f, np.full(100, float(came)), before, now)
        np.testing.assert_allclose(positive * (1.0 - f) - negative * f, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("heard", "share"), [(0.5, 0.4), (-0.1, 0.5), (0.0, 1.1), (0.0, np.nan)])
def test_a_share_that_falls_or_is_none_is_refused(heard: float, share: float) -> None:
    with pytest.raises(DataError, match="share"):
        exposure_weights([0.2], [0], [heard], [share])


def test_a_window_is_heard_with_the_logit_from_before_its_first_row_was_learned() -> None:
    world = World.of(7)
    joiner, heard = Joiner(RULE, "esdfm"), []

    class Improved(TheModel):
        def predict_logit(self, buckets: Any, numbers: Any, ids: Any) -> NDArray[np.float64]:
            return np.asarray(numbers[:, 0] + 1.0)

    class Listener(CalibrationChain):
        def update(self, logit: Any, label: Any, weight: Any = None, segment_keys: Any = None) -> None:
            heard.append(np.asarray(logit))

    feed = CalibrationFeed(
        CONVERSION_TASK,
        0,
        LabelOrigin("matured", "esdfm", WIDTH, WIDTH),
        None,
        lambda elapsed: np.zeros(len(elapsed)),
        clock=0,
        patience=WIDTH,
    )
    rows, model = slice(0, 50), Improved()
    at = world.time[rows]
    nothing = world.outcomes(CONVERSION, np.zeros(0, np.int64), np.zeros(0, np.int64))
    clicks = world.outcomes(CLICK, np.arange(50), at)
    empty = world.outcomes(CLICK, np.zeros(0, np.int64), np.zeros(0, np.int64))
    none = world.arrivals(slice(50, 50))
    last = int(at[-1])
    for clock in (last, last + OBSERVED + 1, last + WIDTH + HOUR_MS):
        first = clock == last
        joined = joiner.process(
            world.arrivals(rows) if first else none, clicks if first else empty, nothing, clock
        )
        student: Any = model
        feed.note(joiner, student, joined.examples[CONVERSION_TASK])
        feed.teach(Listener(), joiner, joined, clock)
    found = np.concatenate(heard)
    np.testing.assert_allclose(np.sort(found), np.sort(world.logit[rows] + 1.0), rtol=1e-5)


def curve_of(n: int, scale: NDArray[np.float64] | float = 1.0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(3)
    opened = rng.integers(0, 4 * DAY_MS, n)
    by_day = np.where(opened % DAY_MS < DAY_MS // 2, scale, 1.0)
    delay = np.minimum(rng.exponential(2 * HOUR_MS, n) * by_day, DAY_MS).astype(np.int64)
    return opened, delay, np.full(n, DAY_MS)


def test_auto_takes_the_delay_model_where_delays_are_the_same_all_day() -> None:
    config = load_config(None, ["labels.policy=esdfm", "attribution.attribution_window=1d"])
    modes = {}
    for scale in (1.0, 4.0):
        opened, delay, follow_up = curve_of(8_000, scale)
        unevenness = delay_unevenness(opened, delay, follow_up)
        curve = DelayCurve.fit(delay, follow_up)
        origin = label_origin(config, "conversion", curve, unevenness)
        modes[scale] = (origin.mode, origin.delay is not None)
    assert modes == {1.0: ("delay_model", True), 4.0: ("matured", False)}
    # Not known, or nothing to know it from.
    assert label_origin(config, "conversion", curve).mode == "matured"
    assert delay_unevenness(*curve_of(150)) is None
    assert label_origin(config, "conversion", None).lag == DAY_MS + config.attribution.allowed_lateness


@pytest.mark.parametrize(
    ("mode", "policy", "lag"),
    [
        ("matured", "fnw", DAY_MS + 1),
        ("policy", "wait", DAY_MS + 1),
        ("policy", "esdfm", OBSERVED),
        ("policy", "relabel", DAY_MS),
    ],
)
def test_the_lag_is_the_time_until_labels_are_heard(mode: str, policy: str, lag: int) -> None:
    settings = [
        f"calibration.labels={mode}",
        f"labels.policy={policy}",
        "attribution.attribution_window=1d",
        "attribution.allowed_lateness=1",
        "attribution.observation_window=3h",
    ]
    assert label_origin(load_config(None, settings), "conversion", CURVE).lag == lag


def test_the_delay_model_needs_a_curve() -> None:
    config = load_config(None, ["calibration.labels=delay_model", "labels.policy=fnw"])
    assert label_origin(config, "click", CURVE).mode == "delay_model"
    with pytest.raises(DataError, match="needs a delay curve"):
        label_origin(config, "click", None)


def test_what_training_settled_stands_and_what_is_named_is_taken_at_its_word() -> None:
    auto = load_config(None, ["labels.policy=esdfm"])
    settled = label_origin(auto, "conversion", CURVE, 0.0)
    assert begun_origin(settled, auto, "conversion", CURVE) == settled
    named = load_config(None, ["labels.policy=esdfm", "calibration.labels=policy"])
    assert begun_origin(settled, named, "conversion", CURVE).mode == "policy"
    assert begun_origin(None, auto, "conversion", CURVE).mode == "matured"


def test_a_state_that_heard_other_labels_is_refused(small_run: SmallRun) -> None:
    arrays, plain = loop_state(small_run.backtest.loop)
    origin = plain["calibrators"]["conversion"]["labels"]
    assert origin["policy"] == "fnw"
    assert origin["window"] == DAY_MS
    other = "policy" if origin["mode"] != "policy" else "matured"
    config = load_config(None, [*SETTINGS, f"calibration.labels={other}"])
    with pytest.raises(StaleStateError, match=f"mode {origin['mode']!r}, expected {other!r}"):
        load_loop_state(small_run.begun(OnlineLoop(config)), arrays, plain)


def test_windows_that_were_open_when_learning_began_are_not_heard(small_run: SmallRun) -> None:
    loop = small_run.warm_loop()
    joiner = loop.joiner
    slots = joiner.open_windows(CONVERSION_TASK).slot
    assert len(slots) > 0
    assert np.isnan(joiner.features["logit"][slots]).all()
    feed, chain = loop.feeds["conversion"], loop.calibrators["conversion"]
    before = chain.state()
    joined = joiner.process(*_nothing(joiner), loop.clock + 3 * HOUR_MS)
    feed.teach(chain, joiner, joined, loop.clock + 3 * HOUR_MS)
    assert chain.state() == before


def _nothing(joiner: Joiner) -> tuple[Arrivals, Outcomes, Outcomes]:
    none, hashes = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    empty = Outcomes([], none, none, hashes, np.zeros(0, np.int8), np.zeros(0), np.zeros((0, 3), np.int64))
    columns = {name: values[:0] for name, values in joiner.features.items()}
    return Arrivals([], none, none, columns), empty, empty


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "raw"}, "must be one of"),
        ({"lag": -1}, ">= 0"),
        ({"mode": "delay_model"}, "delay curve"),
        ({"delay": "digest"}, "delay curve"),
    ],
)
def test_an_origin_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"mode": "matured", "policy": "fnw", "window": 1, "lag": 1, "delay": None}
    with pytest.raises(ConfigError, match=message):
        LabelOrigin(**{**good, **wrong})
    state = LabelOrigin(**good).state()
    for damage in (wrong, {"window": "1"}, {"delay": 3}, {"kind": "other"}, {"more": 1}):
        with pytest.raises(StaleStateError):
            LabelOrigin.from_state({**state, **damage})


def test_the_settled_origin_is_in_the_state_of_the_chain() -> None:
    own = LabelOrigin("delay_model", "esdfm", WIDTH, OBSERVED, "digest")
    chain = CalibrationChain(online=OnlinePlatt(), labels=own)
    again = CalibrationChain.from_json(chain.to_json())
    assert again.labels == own
    assert again.digest() == chain.digest() != CalibrationChain(online=OnlinePlatt()).digest()
