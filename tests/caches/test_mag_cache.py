"""MagCache's published schedules and rules."""

import pytest
from contract_cases import context_at

import accel
from accel.caches.mag_cache import _RatioChain

FLUX = (
    "1 1.21094 1.11719 1.07812 1.0625 1.03906 1.03125 1.03906 1.02344 1.03125 1.02344 0.98047 "
    "1.01562 1.00781 1 1.00781 1 1.00781 1 1 0.99609 0.99609 0.98047 0.98828 0.96484 0.95703 "
    "0.93359 0.89062"
)
KONTEXT = (
    "1 1.19531 1.07812 1.02344 1.03125 1.00781 1.02344 1.01562 1.01562 1 1.01562 1 1.00781 1 "
    "1.00781 1 1.00781 0.99609 1.01562 0.99219 1 0.99219 0.98438 0.99609 0.96484 0.96094 0.9375 "
    "0.93359"
)
HUNYUAN = (
    "1 1.0754 1.27807 1.11596 1.09504 1.05188 1.00844 1.05779 1.00657 1.04142 1.03101 1.00679 "
    "1.02556 1.00908 1.06949 1.05438 1.02214 1.02321 1.03019 1.00779 1.03381 1.01886 1.01161 "
    "1.02968 1.00544 1.02822 1.00689 1.02119 1.0105 1.01044 1.01572 1.02972 1.0094 1.02368 1.0226 "
    "0.98965 1.01588 1.02146 1.0018 1.01687 0.99436 1.00283 1.01139 0.97122 0.98251 0.94513 "
    "0.97656 0.90943 0.85703 0.75456"
)
WAN = (
    "1 1.0124 1.00166 0.99791 0.99682 0.99634 0.99567 0.99416 0.99578 0.9957 0.99511 0.99535 "
    "0.99552 0.99541 0.9954 0.99489 0.99518 0.99484 0.99481 0.99415 0.99419 0.99396 0.99388 "
    "0.99349 0.99309 0.9927 0.99228 0.99171 0.99137 0.99068 0.99005 0.98944 0.98849 0.98758 "
    "0.98644 0.98504 0.9836 0.98202 0.97977 0.97717 0.9741 0.97003 0.96538 0.9593 0.95086 0.94013 "
    "0.92402 0.90241 0.86821 0.81838"
)


def schedule(settings: accel.MagCache, steps: int) -> list[int]:
    """Computed steps of one branch, driven as the engine drives it."""
    assert isinstance(settings.ratios, tuple)
    policy, computed, skipped = _RatioChain(settings, settings.ratios), [], 0
    for step in range(steps):
        context = context_at(step, steps, skipped=skipped)
        if policy.skip(context, None) and computed:
            skipped += 1
        else:
            policy.computed(context, None, None)
            computed.append(step)
            skipped = 0
    return computed


def table(text: str) -> tuple[float, ...]:
    return tuple(float(value) for value in text.split())


@pytest.mark.parametrize(
    ("ratios", "threshold", "skips", "retention", "expected"),
    [
        (FLUX, 0.24, 5, 0.1, "0 1 2 5 9 15 21 26"),
        (KONTEXT, 0.05, 4, 0.2, "0 1 2 3 4 5 7 10 15 20 23 25 26 27"),
        (HUNYUAN, 0.12, 4, 0.2, "0 1 2 3 4 5 6 7 8 9 12 15 18 22 25 29 33 38 43 46 48 49"),
        (HUNYUAN, 0.24, 6, 0.2, "0 1 2 3 4 5 6 7 8 9 14 18 23 29 34 41 46 48 49"),
        (WAN, 0.12, 4, 0.2, "0 1 2 3 4 5 6 7 8 9 14 19 24 29 34 38 41 44 46 48 49"),
    ],
)
def test_published_schedules(ratios, threshold, skips, retention, expected) -> None:
    known = table(ratios)
    settings = accel.MagCache(threshold, skips, retention, known)
    assert schedule(settings, len(known)) == [int(step) for step in expected.split()]


def test_ratios_of_one_leave_only_the_limits() -> None:
    settings = accel.MagCache(0.01, 3, 0.25, (1.0,) * 12)
    assert schedule(settings, 12) == [0, 1, 2, 6, 10]


def test_one_low_ratio_forces_a_compute_and_is_used_up() -> None:
    ratios = (1.0,) * 5 + (0.5,) + (1.0,) * 6
    assert schedule(accel.MagCache(0.1, 20, 0, ratios), 12) == [0, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": -1},
        {"threshold": float("nan")},
        {"threshold": "0.1"},
        {"max_skips": 1.5},
        {"retention": 2},
        {"ratios": (1.0,)},
        {"ratios": (1.0, -1.0)},
    ],
)
def test_wrong_settings_are_named(wrong) -> None:
    with pytest.raises(accel.AccelError, match=next(iter(wrong))):
        accel.MagCache(**wrong)
