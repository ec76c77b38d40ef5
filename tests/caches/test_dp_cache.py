"""The schedule is the best of all, and its costs are the forecasts' real errors."""

import itertools

import numpy as np
import pytest
import torch
from tiny_pipelines import built, run

import accel
from accel.caches.dp_cache import best_steps, forecast_costs

STEPS = 8


def residuals() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(STEPS, 20).cumsum(0).double()


def costs(line: bool) -> np.ndarray:
    values = residuals().numpy()
    return forecast_costs(values @ values.T, line)


@pytest.mark.parametrize("line", [True, False])
def test_costs_are_the_errors_of_the_forecasts(line) -> None:
    values, found = residuals(), costs(line)
    approximator = accel.Newton(1) if line else accel.HoldResidual()
    for i, j in itertools.combinations_with_replacement(range(STEPS), 2):
        for step in range(j + 1, STEPS):
            history = approximator.start(STEPS)
            for known in sorted({i, j}):
                history.update(known, (values[known],), None)
            forecast = history.predict(step, None)[0].double()
            error = float((forecast - values[step]).square().sum() / values[step].square().sum())
            assert found[i, j, step] == pytest.approx(error, rel=1e-5)


def price(steps: tuple[int, ...], found: np.ndarray, minimax: bool) -> float:
    errors = [0.0]
    for step in range(STEPS):
        if step not in steps:
            known = [s for s in steps if s < step]
            errors.append(found[known[-2] if len(known) > 1 else known[-1], known[-1], step])
    return max(errors) if minimax else sum(errors)


@pytest.mark.parametrize("computes", [2, 3, 5, 8])
@pytest.mark.parametrize("minimax", [True, False])
@pytest.mark.parametrize("line", [True, False])
def test_dynamic_programming_equals_brute_force(line, minimax, computes) -> None:
    found = costs(line)
    chosen = tuple(best_steps(found, computes, minimax))
    assert len(set(chosen)) == computes
    assert chosen[0] == 0
    every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), computes - 1)]
    least = min(price(steps, found, minimax) for steps in every)
    assert price(chosen, found, minimax) == pytest.approx(least)


@pytest.mark.parametrize("family", ["wan21", "sd3", "sd15"])
def test_first_run_measures_and_the_second_keeps_to_the_share(family, baseline) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, accel.DPCache(share=0.5)) as handle:
        assert torch.equal(run(tiny), baseline(family))
        assert handle.report().share_computed == 1.0
        run(tiny)
        assert handle.report().share_computed == pytest.approx(0.5)
        (settled,) = handle.methods
    assert sum(settled.schedule) * 2 == len(settled.schedule)
    assert accel.Recipe.of((settled,)).methods == (settled,)


def test_each_of_two_experts_has_its_own_schedule() -> None:
    tiny, _ = built("wan22")
    with accel.patched(tiny.pipe, accel.DPCache(share=0.5)) as handle:
        run(tiny)
        run(tiny)
        rows = handle.report().rows
    for name in ("transformer", "transformer_2"):
        own = [row for row in rows if row.denoiser == name]
        branches = len({row.branch for row in own})
        steps = len(own) // branches
        computed = sum(row.verdict == "computed" for row in own)
        assert computed == branches * max(round(0.5 * steps), 2), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, "share"),
        ({"objective": "least"}, "objective"),
        ({"schedule": ()}, "schedule"),
        ({"schedule": (0, 1)}, "schedule"),
        ({"schedule": (1, 2)}, "schedule"),
    ],
)
def test_wrong_settings_are_named(wrong, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        accel.DPCache(**wrong)
