"""The table of ids against a plain dictionary, for any ids at any times, restored at any point."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models import id_table
from models.id_table import IdTable
from models.key_index import KeyIndex
from models.sighting_filter import SightingFilter
from pipelines.config_sections import TablesConfig
from pipelines.duration import HOUR_MS
from pipelines.errors import StaleStateError
from pipelines.hashing import mix
from pipelines.table_rows import TableRows

MINUTE_MS = 60_000


def keys_of(numbers: list[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """A 64-bit key for each number, negative ones among them; 0 stays 0."""
    values = np.asarray(numbers).astype(np.uint64)
    mixed = mix(np.full(len(values), 9, np.uint64), values)
    return np.where(values == 0, np.uint64(0), mixed).view(np.int64)


@dataclass
class Reference:
    """What `IdTable` says of itself, id by id."""

    capacity: int
    admit_after: int
    ttl: int
    first_slots: int
    slots: int = 0
    clock: int = -1
    hour: int = -1
    slot_of: dict[int, int] = field(default_factory=dict)
    last_seen: dict[int, int] = field(default_factory=dict)
    sightings: Counter[int] = field(default_factory=Counter)

    def see(self, ids: list[int], now: int) -> tuple[list[int], list[int]]:
        self.clock = max(self.clock, now)
        freed: list[int] = []
        if self.clock // HOUR_MS != self.hour:
            self.hour = self.clock // HOUR_MS
            freed += self.remove(
                [one for one in self.slot_of if self.last_seen[one] <= self.clock - self.ttl]
            )
        wanted: list[int] = []
        known = set(self.slot_of)
        for one in ids:
            if one in known:
                self.last_seen[one] = self.clock
            elif one:
                self.sightings[one] += 1
                if one not in wanted:
                    wanted.append(one)
        wanted = [one for one in wanted if self.sightings[one] >= self.admit_after]
        free = self.slots - len(self.slot_of)
        if len(wanted) > free and self.slots < self.capacity:
            needed = self.slots + len(wanted) - free
            self.slots = min(self.capacity, max(self.first_slots, 2 * self.slots, needed))
            free = self.slots - len(self.slot_of)
        if len(wanted) > free:
            old = sorted(
                (self.last_seen[one], slot, one)
                for one, slot in self.slot_of.items()
                if self.last_seen[one] < self.clock
            )
            count = max(len(wanted) - free, self.capacity // 16)
            freed += self.remove([one for _, _, one in old[:count]])
        new = [slot for slot in range(self.slots) if slot not in self.slot_of.values()][: len(wanted)]
        for one, slot in zip(wanted, new, strict=False):
            self.slot_of[one], self.last_seen[one] = slot, self.clock
        return sorted(set(freed)), new

    def remove(self, ids: list[int]) -> list[int]:
        for one in ids:
            del self.last_seen[one]
        return [self.slot_of.pop(one) for one in ids]


def apply(mirror: dict[str, NDArray[Any]], table: IdTable) -> None:
    whole, tables = table.take_changes()
    mirror.update(whole)
    for name, (part,) in tables.items():
        if part.rows is None:
            mirror[name] = part.values
        else:
            mirror[name][part.rows] = part.values


LOOK = st.tuples(
    st.lists(st.integers(0, 40), max_size=12),
    st.sampled_from([0, 1, 7 * MINUTE_MS, HOUR_MS, 5 * HOUR_MS, -MINUTE_MS]),
    st.booleans(),
)


@settings(max_examples=200)
@given(
    looks=st.lists(LOOK, max_size=25),
    capacity=st.integers(1, 40),
    admit_after=st.integers(1, 3),
    ttl=st.sampled_from([MINUTE_MS, HOUR_MS, 6 * HOUR_MS]),
    first_slots=st.sampled_from([1, 3]),
)
def test_slots_are_those_of_a_plain_dictionary_restored_at_any_point(
    looks: list[tuple[list[int], int, bool]], capacity: int, admit_after: int, ttl: int, first_slots: int
) -> None:
    config = TablesConfig(capacity=capacity, admit_after=admit_after, ttl=ttl, filter_cells=1 << 14)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_table, "_FIRST_SLOTS", first_slots)
        table, reference = IdTable(config, seed=3), Reference(capacity, admit_after, ttl, first_slots)
        mirror: dict[str, NDArray[Any]] = {}
        now = 100 * HOUR_MS
        for ids, later, is_restored in looks:
            now += later
            changes = table.see(keys_of(ids), now)
            freed, new = reference.see(ids, now)
            assert (changes.freed.tolist(), changes.new.tolist()) == (freed, new)
            assert [ids[place] for place in changes.place.tolist()] == [
                one for one, slot in reference.slot_of.items() if slot in new
            ]
            every = np.arange(1, 41)
            assert table.find(keys_of(every)).tolist() == [
                reference.slot_of.get(one, -1) for one in every.tolist()
            ]
            assert (table.slots, len(table)) == (reference.slots, len(reference.slot_of))
            assert table.free.tolist() == sorted(set(range(table.slots)) - set(reference.slot_of.values()))
            live = table.keys[table.keys != 0]
            assert len(np.unique(live)) == len(live) <= capacity
            apply(mirror, table)
            state = table.arrays()
            assert {name: values.tolist() for name, values in mirror.items()} == {
                name: values.tolist() for name, values in state.items()
            }
            assert {name: values.shape for name, values in state.items()} == table.shapes(table.slots)
            if is_restored:
                table = IdTable(config, seed=3)
                table.load(state)


def test_ids_that_are_found_without_the_rest_of_the_state_are_the_same() -> None:
    table, served = (IdTable(TablesConfig(admit_after=1), seed=1) for _ in range(2))
    table.see(keys_of([3, 5, 9]), now=0)
    served.load({"weights/ids": table.keys})
    assert served.find(keys_of([[9], [4]][0] + [4])).tolist() == [2, -1]


def test_after_reset_nothing_is_known_and_everything_is_as_in_the_beginning() -> None:
    config = TablesConfig(capacity=8, admit_after=2, filter_cells=1024)
    table, fresh = IdTable(config, seed=1), IdTable(config, seed=1)
    table.see(keys_of([1, 1, 2]), now=7 * HOUR_MS)
    table.reset()
    assert {name: values.tolist() for name, values in table.arrays().items()} == {
        name: values.tolist() for name, values in fresh.arrays().items()
    }
    assert all(part.rows is None for (part,) in table.take_changes()[1].values())


def test_more_rows_than_the_capacity_are_refused() -> None:
    with pytest.raises(StaleStateError, match=r"at most 4 rows of ids. Received: 5"):
        IdTable(TablesConfig(capacity=4), seed=1).load({"weights/ids": np.zeros(5, np.int64)})


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 10_000)), max_size=60), st.integers(1, 400))
def test_an_index_finds_each_key_in_the_slot_it_was_put_in(
    steps: list[tuple[bool, int]], at_once: int
) -> None:
    index, expected = KeyIndex(np.zeros(20_000, np.int64)), dict[int, int]()
    for is_put, start in steps:
        numbers = [n for n in range(start, start + at_once) if (n in expected) != is_put]
        if is_put:
            free = [slot for slot in range(len(numbers) + len(expected)) if slot not in expected.values()]
            slots = free[: len(numbers)]
            index.put(np.array(slots, np.int64), keys_of(numbers))
            expected.update(zip(numbers, slots, strict=True))
        else:
            index.remove(np.array([expected.pop(n) for n in numbers], np.int64))
    every = np.arange(1, 10_500)
    assert index.find(keys_of(every)).tolist() == [expected.get(n, -1) for n in every.tolist()]


def test_keys_whose_low_bits_are_equal_are_told_apart() -> None:
    keys = (np.arange(1, 200, dtype=np.int64) << 40) | 5
    index = KeyIndex(np.zeros(256, np.int64))
    index.put(np.arange(199), keys)
    assert index.find(keys).tolist() == list(range(199))
    assert index.find((np.arange(200, 300, dtype=np.int64) << 40) | 5).tolist() == [-1] * 100


def test_a_small_filter_never_counts_too_few_and_seldom_too_many() -> None:
    cells = 1 << 12
    sightings = SightingFilter(cells, seed=2)
    noise = np.random.default_rng(0)
    truth, wrong, looked = Counter[int](), 0, 0
    while True:
        numbers = np.unique(noise.integers(1, 1 << 40, 16))
        before = sightings.counted
        found = sightings.add(keys_of(numbers), np.ones(len(numbers), np.int64))
        truth.update(numbers.tolist())
        expected = np.array([truth[number] for number in numbers.tolist()])
        assert (found >= expected).all()
        wrong, looked = wrong + int((found > expected).sum()), looked + len(numbers)
        if sightings.counted < before:
            break
    # Each hash hits a cell in use with a chance below 1 - exp(-1/4), all four with 0.24 %.
    assert looked >= cells / 16
    assert wrong / looked < 0.01


def test_a_filter_that_was_filled_forgets_half_and_says_that_all_of_it_changed() -> None:
    sightings = SightingFilter(1024, seed=2)
    sightings.add(keys_of([1]), np.array([40]))
    sightings.take_touched()
    sightings.add(keys_of([1]), np.array([3]))
    touched = sightings.take_touched()
    assert touched is not None
    assert len(touched) == 4
    assert sightings.add(keys_of([2]), np.array([21])).tolist() == [21]
    assert sightings.take_touched() is None
    assert sightings.add(keys_of([1, 2]), np.array([1, 1])).tolist() == [43 // 2 + 1, 21 // 2 + 1]
    # An endless stream of new ids does not fill it.
    for start in range(1, 100_000, 50):
        sightings.add(keys_of(np.arange(start, start + 50)), np.ones(50, np.int64))
    assert sightings.counts.sum() <= 4 * 2 * (1024 / 16 + 50)


def test_changes_are_copies() -> None:
    table = IdTable(TablesConfig(admit_after=1), seed=1)
    table.see(keys_of([1, 2]), now=0)
    _, tables = table.take_changes()
    before = {name: part.values.copy() for name, (part,) in tables.items()}
    table.see(keys_of([3, 1]), now=HOUR_MS)
    assert isinstance(tables["weights/ids"][0], TableRows)
    assert all((before[name] == part.values).all() for name, (part,) in tables.items())
