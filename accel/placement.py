"""Which of several unlike devices takes the next item, from the seconds that items took on each.

After Adaptive Orchestration (Biran & Kissos 2025) and Mélange (Griggs et al. 2024): while the cheap
devices can finish in time, they get the work (cost mode); otherwise every device that is there gets
a share by its speed (capacity mode). Differs from both: those route an endless stream of requests
under a latency limit, a batch ends, so the limit is a deadline for all of it and shares are whole
items. No device state is kept: the decision is made anew for each item, so that a lost device's
share goes to the others as soon as it is known to be lost.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LOST_AFTER = 5.0
"""A device that is silent this many times longer than an item takes is taken for lost."""
GRACE = 2.0
"""Seconds of silence that are always forgiven."""


@dataclass(frozen=True)
class Device:
    """What is known of a device: measured `seconds` an item, when it is `free` again, and the
    `price` of one of its seconds (any unit)."""

    seconds: float
    free: float = 0.0
    price: float = 1.0

    @property
    def cost(self) -> float:
        """Price of an item."""
        return self.seconds * self.price


def shares(items: int, devices: Mapping[str, Device], now: float = 0.0) -> dict[str, int]:
    """How many of `items` each device takes so that the last one ends as early as possible.

    Each item goes where it would be finished first, which is optimal for items of equal size.
    """
    counts = dict.fromkeys(devices, 0)
    ends = [(max(d.free, now) + d.seconds, name) for name, d in devices.items()]
    heapq.heapify(ends)
    for _ in range(items if ends else 0):
        end, name = ends[0]
        counts[name] += 1
        heapq.heapreplace(ends, (end + devices[name].seconds, name))
    return counts


def finish(counts: Mapping[str, int], devices: Mapping[str, Device], now: float = 0.0) -> float:
    """When the last item of these shares ends."""
    ends = [
        max(devices[name].free, now) + count * devices[name].seconds
        for name, count in counts.items()
        if count
    ]
    return max(ends, default=now)


def plan(
    items: int, devices: Mapping[str, Device], now: float = 0.0, deadline: float | None = None
) -> dict[str, int]:
    """The shares of `items`; with a `deadline`, those of the fewest, cheapest devices that keep it.

    Devices are added from the cheapest item upwards until the deadline is kept; when even all of
    them are too slow, all are used.
    """
    ordered = sorted(devices, key=lambda name: (devices[name].cost, name))
    for count in range(1, len(ordered)):
        if deadline is None:
            break
        chosen = {name: devices[name] for name in ordered[:count]}
        counts = shares(items, chosen, now)
        if finish(counts, chosen, now) <= deadline:
            return dict.fromkeys(devices, 0) | counts
    return shares(items, devices, now)


def takes(
    name: str,
    items: int,
    devices: Mapping[str, Device],
    now: float,
    deadline: float | None = None,
) -> bool:
    """Whether idle device `name` takes one of the `items` that nobody has begun.

    A device that was not measured yet takes one, to be measured. A slow device leaves the last
    items to faster ones that would finish them earlier.
    """
    if name not in devices:
        return items > 0
    there = {key: each for key, each in devices.items() if key == name or not lost(each, now)}
    return plan(items, there, now, deadline)[name] > 0


def lost(device: Device, now: float) -> bool:
    """Whether a device should have reported long ago."""
    return now > device.free + LOST_AFTER * device.seconds + GRACE


def known(
    finished: Mapping[str, Sequence[tuple[float, float]]],
    prices: Mapping[str, float] | None = None,
    recent: int = 8,
) -> dict[str, Device]:
    """Devices from what they finished: for each, (time, seconds) in order; the last few count.

    A device is thought to have begun its next item when it finished its last.
    """
    prices = prices or {}
    found = {}
    for name, rows in finished.items():
        last = sorted(seconds for _, seconds in rows[-recent:])
        seconds = last[len(last) // 2]
        found[name] = Device(seconds, rows[-1][0] + seconds, prices.get(name, 1.0))
    return found
