"""Settings of the wrong kind are refused by one clear error, whatever method they are for."""

from __future__ import annotations

import math

import pytest

import accel
from accel.method import is_schedule, is_series

WRONG = [
    ("AdaCache", {"codebook": 5}),
    ("AdaCache", {"codebook": ((math.nan, 2),)}),
    ("AdaCache", {"codebook": (("x", 2),)}),
    ("AdaCache", {"codebook": ((-1.0, 2),)}),
    ("Attention", {"plan": 3}),
    ("Attention", {"plan": {"attn": 3}}),
    ("BAC", {"schedules": 3}),
    ("BAC", {"schedules": (3,)}),
    ("DPCache", {"schedule": 3}),
    ("ERTACache", {"scales": 3}),
    ("ERTACache", {"scales": ()}),
    ("FitCache", {"schedule": 3, "weights": 3}),
    ("FitCache", {"schedule": (1, 0), "weights": 3}),
    ("FitCache", {"schedule": (1, 0), "weights": (3,)}),
    ("LinearAG", {"coefficients": 3}),
    ("MagCache", {"ratios": 5}),
    ("MagCache", {"ratios": {"cond": 5}}),
    ("Progressive", {"scales": 5}),
    ("Progressive", {"shares": 5}),
    ("PyramidAttentionBroadcast", {"window": 5}),
    ("PyramidAttentionBroadcast", {"mlp_blocks": 5}),
    ("RALU", {"shares": 5}),
    ("RALU", {"ends": ("a", "b")}),
    ("RALU", {"shifts": 5}),
    ("SmoothCache", {"errors": 3}),
    ("SmoothCache", {"errors": {"self": 3}}),
    ("StepMask", {"mask": 5}),
    ("TeaCache", {"polynomial": 3}),
    ("TeaCache", {"domain": 3}),
]


@pytest.mark.parametrize(("name", "settings"), WRONG)
def test_a_setting_of_the_wrong_kind_is_an_accel_error(name, settings) -> None:
    with pytest.raises(accel.AccelError) as error:
        getattr(accel, name)(**settings)
    assert name in str(error.value) and any(field in str(error.value) for field in settings)


def test_series_and_schedules() -> None:
    assert is_series((1, 2), lambda each: each > 0) and is_series([], bool, least=0)
    assert not is_series((), bool) and not is_series("ab", bool) and not is_series(3, bool)
    assert is_schedule([1, 0, 0]) and is_schedule((1,))
    assert not is_schedule((0, 1)) and not is_schedule(()) and not is_schedule((1, 2))
