"""What each forecast is exact on."""

import math

import pytest
import torch

import accel


def forecast(approximator, function, steps: list[int], at: int) -> float:
    history = approximator.start(10)
    assert not history.ready
    for step in steps:
        history.update(step, (torch.full((2, 3), float(function(step))), None), None)
    value, missing = history.predict(at, None)
    assert missing is None
    assert value.shape == (2, 3)
    return float(value[0, 0])


def test_hold_repeats() -> None:
    assert forecast(accel.HoldResidual(), lambda s: s * s, [0, 3], 5) == 9


@pytest.mark.parametrize("steps", [[0, 1], [0, 4], [2, 3, 7]])
@pytest.mark.parametrize("approximator", [accel.Newton(1), accel.Taylor(1)])
def test_order_one_is_exact_on_lines(approximator, steps) -> None:
    assert forecast(approximator, lambda s: 3 * s - 1, steps, 9) == pytest.approx(26)


@pytest.mark.parametrize("steps", [[0, 1, 2], [0, 3, 4], [1, 2, 6]])
def test_newton_is_exact_on_parabolas_at_any_gaps(steps) -> None:
    assert forecast(accel.Newton(2), lambda s: s * s, steps, 8) == pytest.approx(64, rel=1e-5)


def test_taylor_is_biased_on_parabolas_as_published() -> None:
    assert forecast(accel.Taylor(2), lambda s: s * s, [-2, -1, 0], 1) == pytest.approx(0)


def test_memory_is_bounded_by_the_order() -> None:
    for approximator, most in (
        (accel.HoldResidual(), 1),
        (accel.Newton(2), 3),
        (accel.Taylor(2), 3),
    ):
        history = approximator.start(10)
        for step in range(9):
            history.update(step, (torch.zeros(4), None), None)
        assert len(history.tensors()) == most


def test_half_precision_is_kept() -> None:
    history = accel.Newton(1).start(10)
    for step in (0, 1):
        history.update(step, (torch.full((4,), step, dtype=torch.bfloat16),), None)
    assert history.predict(3, None)[0].dtype == torch.bfloat16
    assert float(history.predict(3, None)[0][0]) == 3


@pytest.mark.parametrize("order", [-1, 1.5, True, "1"])
def test_wrong_orders_are_named(order) -> None:
    for kind in (accel.Newton, accel.Taylor):
        with pytest.raises(accel.AccelError, match="order"):
            kind(order)


def test_hermite_order_one_is_the_damped_line() -> None:
    for sigma, share in ((0.5, 0.5), (0.5**0.5, 1.0)):
        value = forecast(accel.HiCache(1, sigma), lambda s: 2 * s, [0, 1], 4)
        assert value == pytest.approx(2 + share * 6)


def test_hermite_order_two_by_hand() -> None:
    # F = s² at 0, 1, 2: Δ = 3, Δ² = 2; H₁(z) = 2z, H₂(z) = 4z² − 2 at z = σk = 1.5
    expected = 4 + 3 * 0.5 * 3 + 2 * 0.25 * 7 / 2
    value = forecast(accel.HiCache(2, 0.5), lambda s: s * s, [0, 1, 2], 5)
    assert value == pytest.approx(expected)


def test_chebyshev_finds_a_smooth_course_that_a_line_misses() -> None:
    def course(step: int) -> float:
        return math.cos(step / 4)

    steps, exact = [0, 1, 2, 3, 4, 6, 8], course(9)
    smooth = forecast(accel.Chebyshev(degree=4, ridge=1e-6, blend=1.0), course, steps, 9)
    line = forecast(accel.Chebyshev(blend=0.0), course, steps, 9)
    assert line == pytest.approx(forecast(accel.Newton(1), course, steps, 9), rel=1e-5)
    assert abs(smooth - exact) < 0.02 < abs(line - exact)


def test_chebyshev_keeps_what_it_may() -> None:
    for keep, held in ((None, 9), (3, 3)):
        history = accel.Chebyshev(keep=keep).start(10)
        for step in range(9):
            history.update(step, (torch.zeros(4), None), None)
        assert len(history.tensors()) == held


class Probe:
    """Signals of a span whose probe's residual is `value`."""

    def __init__(self, value: float) -> None:
        self.hidden, self.entry = torch.full((2,), value), torch.zeros(2)

    def mean_change(self, new, old) -> float:
        return float((new - old).abs().mean())


@pytest.mark.parametrize(
    ("now", "share"), [(3.0, 1.5), (2.5, 1.25), (2.1, 1.05), (1.2, 1.0), (9.0, 1.5)]
)
def test_aligned_goes_as_far_as_the_probe_within_its_limit(now, share) -> None:
    history = accel.Aligned(limit=1.5).start(10)
    for step, (probe, value) in enumerate([(0.0, 10.0), (2.0, 14.0)]):
        history.update(step, (torch.full((2,), value),), Probe(probe))
    assert float(history.predict(2, Probe(now))[0][0]) == pytest.approx(10 + share * 4)


def test_aligned_repeats_what_is_alone() -> None:
    history = accel.Aligned().start(10)
    history.update(0, (torch.ones(2),), Probe(1.0))
    assert float(history.predict(1, Probe(5.0))[0][0]) == 1
