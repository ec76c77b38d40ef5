"""What each forecast is exact on."""

import pytest
import torch

import accel


def forecast(approximator, function, steps: list[int], at: int) -> float:
    history = approximator.start()
    assert not history.ready
    for step in steps:
        history.update(step, (torch.full((2, 3), float(function(step))), None))
    value, missing = history.predict(at)
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
        history = approximator.start()
        for step in range(9):
            history.update(step, (torch.zeros(4), None))
        assert len(history.tensors()) == most


def test_half_precision_is_kept() -> None:
    history = accel.Newton(1).start()
    for step in (0, 1):
        history.update(step, (torch.full((4,), step, dtype=torch.bfloat16),))
    assert history.predict(3)[0].dtype == torch.bfloat16
    assert float(history.predict(3)[0][0]) == 3


@pytest.mark.parametrize("order", [-1, 1.5, True, "1"])
def test_wrong_orders_are_named(order) -> None:
    for kind in (accel.Newton, accel.Taylor):
        with pytest.raises(accel.AccelError, match="order"):
            kind(order)
