"""Shares by measured seconds, and a simulated run with recorded latencies and lost devices."""

import heapq
import itertools
import random

import pytest

from accel import placement
from accel.placement import Device

RECORDED = {
    # seconds an item, recorded on two CPU workers of a 2-core machine (one with 1 thread and all
    # steps, one with a third of the steps), and the same four times over for a larger fleet
    "fast": (0.41, 0.39, 0.40, 0.44, 0.40),
    "slow": (1.19, 1.24, 1.21, 1.30, 1.18),
}


def simulate(items, latencies, deadline=None, prices=None, dies=None, seed=0):
    """Workers that follow `takes`; returns the end, items made by each, and the price paid.

    `dies`: {name: time}: the device falls silent then, and its item is begun anew by another.
    """
    rng, dies = random.Random(seed), dies or {}
    rows = {name: [] for name in latencies}
    made, paid, left, end = dict.fromkeys(latencies, 0), 0.0, items, 0.0
    order = itertools.count()
    events = [(0.0, next(order), name, None) for name in latencies]
    busy = 0
    while events and (left or busy):
        now, _, name, seconds = heapq.heappop(events)
        if now >= dies.get(name, float("inf")):
            if seconds is not None:
                left, busy = left + 1, busy - 1  # its claim is given back
            continue
        if seconds is not None:
            rows[name].append((now, seconds))
            made[name] += 1
            busy, end = busy - 1, now
            paid += seconds * (prices or {}).get(name, 1.0)
        devices = placement.known({n: r for n, r in rows.items() if r}, prices)
        if name in devices:
            devices[name] = Device(devices[name].seconds, now, devices[name].price)
        if left and placement.takes(name, left, devices, now, deadline):
            took = rng.choice(latencies[name])
            left, busy = left - 1, busy + 1
            heapq.heappush(events, (now + took, next(order), name, took))
        elif left or busy:
            heapq.heappush(events, (now + 0.2, next(order), name, None))
    return end, made, paid


def test_shares_end_as_early_as_any_split() -> None:
    devices = {"a": Device(1.0), "b": Device(3.0, free=2.0), "c": Device(0.7, free=5.0)}
    counts = placement.shares(12, devices)
    assert sum(counts.values()) == 12
    best = min(
        placement.finish({"a": a, "b": b, "c": 12 - a - b}, devices)
        for a in range(13)
        for b in range(13 - a)
    )
    assert placement.finish(counts, devices) == pytest.approx(best)


def test_work_is_shared_by_speed_and_ends_near_the_bound() -> None:
    end, made, _ = simulate(200, RECORDED)
    mean = {name: sum(each) / len(each) for name, each in RECORDED.items()}
    bound = 200 / sum(1 / seconds for seconds in mean.values())
    assert sum(made.values()) == 200
    assert made["fast"] / made["slow"] == pytest.approx(mean["slow"] / mean["fast"], rel=0.1)
    assert end < 1.03 * bound
    equal = 100 * mean["slow"]
    assert end < 0.6 * equal


def test_a_slow_device_leaves_the_last_items_alone() -> None:
    end, made, _ = simulate(12, {"fast": (1.0,), "slow": (10.0,)})
    assert made == {"fast": 11, "slow": 1}
    assert end == pytest.approx(11.0, abs=0.5)


def test_items_of_a_lost_device_go_to_the_others() -> None:
    end, made, _ = simulate(100, RECORDED, dies={"fast": 10.0})
    assert sum(made.values()) == 100
    assert made["slow"] > 60
    remaining = 100 - made["fast"]
    assert end < 1.1 * remaining * 1.3


def test_a_deadline_is_kept_at_the_least_price() -> None:
    prices = {"fast": 10.0, "slow": 1.0}
    late = simulate(100, RECORDED, deadline=1000.0, prices=prices)
    soon = simulate(100, RECORDED, deadline=40.0, prices=prices)
    asap = simulate(100, RECORDED, prices=prices)
    assert late[1]["fast"] <= 5  # what it made until the slow one was measured
    assert late[0] <= 1000.0
    assert soon[0] <= 40.0
    assert late[2] < 0.5 * asap[2]


def test_an_impossible_deadline_uses_everything() -> None:
    devices = {"a": Device(1.0, price=1.0), "b": Device(1.0, price=9.0)}
    assert placement.plan(10, devices, deadline=1.0) == placement.shares(10, devices)
    assert placement.plan(4, devices, deadline=4.0) == {"a": 4, "b": 0}


def test_lost_and_unknown_devices() -> None:
    assert not placement.lost(Device(1.0, free=5.0), now=6.0)
    assert placement.lost(Device(1.0, free=5.0), now=20.0)
    assert placement.takes("new", 1, {"old": Device(0.1)}, now=0.0)
    assert not placement.takes("new", 0, {}, now=0.0)
    assert placement.plan(3, {}) == {}
