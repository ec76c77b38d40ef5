"""Weights are least squares, the schedule is the best of all, and a measured run comes first."""

import itertools

import numpy as np
import pytest
import torch
from contract_cases import COND, context_at
from tiny_pipelines import STEPS, TINY, built, run

import accel
from accel import FitCache
from accel.caches.products import Products
from accel.optimal_steps import (
    cheapest_path,
    drift_costs,
    fitted_weights,
    solver_strides,
)

COUNT = 7


def recorded(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Residuals and latents (steps, values) that move smoothly, and their inner products."""
    generator = np.random.default_rng(seed)
    both = generator.standard_normal((2 * COUNT, 12)).cumsum(axis=0)
    return both, both @ both.T


def error(both: np.ndarray, products: np.ndarray, pair: tuple[int, int], step: int) -> np.ndarray:
    (weights,) = fitted_weights(products, *pair, [step])
    return both[step] - weights @ both[[*pair, COUNT + step]]


@pytest.mark.parametrize("pair", [(0, 0), (0, 1), (1, 3)])
def test_no_other_weights_come_closer(pair) -> None:
    both, products = recorded()
    (weights,) = fitted_weights(products, *pair, [5])
    basis = both[[*pair, COUNT + 5]][int(pair[0] == pair[1]) :]
    best = np.linalg.lstsq(basis.T, both[5], rcond=None)[0]
    assert weights[-len(best) :] == pytest.approx(best, rel=1e-3)


def test_costs_are_the_drift_of_the_forecasts() -> None:
    both, products = recorded()
    strides = np.linspace(1, 2, COUNT)
    costs = drift_costs(products, strides)
    for pair in [(0, 0), *itertools.combinations(range(COUNT), 2)]:
        for end in range(pair[1] + 1, COUNT + 1):
            gap = range(pair[1] + 1, end)
            drift = sum((strides[s] * error(both, products, pair, s) for s in gap), np.zeros(12))
            assert costs[(*pair, end)] == pytest.approx((drift**2).sum(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("computes", [2, 3, 5, COUNT])
def test_the_cheapest_path_is_the_best_of_all(computes) -> None:
    costs = drift_costs(recorded()[1], np.ones(COUNT))

    def price(steps: tuple[int, ...]) -> float:
        ends, older = (*steps[1:], COUNT), (0, *steps[:-1])
        return sum(costs[i, j, n] for i, j, n in zip(older, steps, ends, strict=True))

    every = [(0, *rest) for rest in itertools.combinations(range(1, COUNT), computes - 1)]
    assert price(tuple(cheapest_path(costs, computes))) == pytest.approx(min(map(price, every)))


def test_errors_of_the_beginning_can_weigh_more() -> None:
    products = [recorded(seed)[1] for seed in range(3)]
    first = [FitCache.fitted(0.5, early, products, [1.0] * COUNT) for early in (-6.0, 6.0)]
    places = [np.flatnonzero(each.schedule).sum() for each in first]
    assert places[1] < places[0]


@pytest.mark.parametrize("family", TINY)
def test_the_first_run_measures_and_the_second_keeps_to_the_share(family, baseline) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, FitCache(share=0.5)) as handle:
        assert torch.equal(run(tiny), baseline(family))
        assert handle.report().share_computed == 1.0
        changed = run(tiny)
        assert torch.isfinite(changed).all()
        rows = handle.report().rows
        settled = handle.methods[0]
        assert torch.equal(run(tiny), changed)
    computed = sum(row.verdict == "computed" for row in rows)
    assert computed / len(rows) == pytest.approx(0.5, abs=0.13)
    assert settled.share == 0.5 and settled.weights
    assert accel.Recipe.of((settled,)).methods == (settled,)
    if family != "wan22":  # two experts, each with weights of its own
        with accel.patched(tiny.pipe, settled):
            assert torch.equal(run(tiny), changed)
    assert torch.equal(run(tiny), baseline(family))


def test_each_branch_has_weights_of_its_own_and_a_doubled_batch_shares_them() -> None:
    for family, branches in (("wan21", 2), ("flux", 1), ("sd15", 1)):
        tiny, _ = built(family)
        with accel.patched(tiny.pipe, FitCache(share=0.5)) as handle:
            run(tiny)
            settled = handle.methods[0]
        assert len(settled.weights) == branches
        assert all(len(branch) == settled.schedule.count(0) for branch in settled.weights)


def test_forecasts_beat_the_line_on_the_same_schedule() -> None:
    tiny, baseline = built("wan21")
    with accel.patched(tiny.pipe, FitCache(share=0.5)) as handle:
        run(tiny)
        fitted = run(tiny)
        schedule = handle.methods[0].schedule
    with accel.patched(tiny.pipe, accel.DPCache(schedule=schedule, whole=True)):
        line = run(tiny)
    assert (fitted - baseline).norm() < (line - baseline).norm()


def test_a_skipped_step_takes_its_weights_of_the_last_two_residuals_and_the_latent() -> None:
    tiny, _ = built("flux")
    scheduler, seen = tiny.pipe.scheduler, []
    weights = tuple((0.1 * k, 0.9 - 0.2 * k, 0.05 * k) for k in range(1, 4))
    settings = FitCache(schedule=(1, 1, 0, 0, 1, 1, 0, 1), weights=(weights,))

    def watch(output, timestep, sample, **options):
        seen.append((sample, output - sample))
        return step(output, timestep, sample, **options)

    with accel.patched(tiny.pipe, settings):
        step, scheduler.step = scheduler.step, watch
        try:
            run(tiny)
        finally:
            scheduler.step = step
    for (a, b, c), (older, newer, at) in zip(
        weights, [(0, 1, 2), (0, 1, 3), (4, 5, 6)], strict=True
    ):
        wanted = a * seen[older][1] + b * seen[newer][1] + c * seen[at][0]
        assert torch.allclose(seen[at][1], wanted, atol=1e-5)


def test_a_run_of_another_length_is_measured_anew() -> None:
    tiny, baseline = built("wan21")
    shorter = {"num_inference_steps": STEPS - 2}
    untouched = run(tiny, **shorter)
    with accel.patched(tiny.pipe, FitCache(share=0.5)) as handle:
        run(tiny)
        changed = run(tiny)
        assert torch.equal(run(tiny, **shorter), untouched)
        assert not torch.equal(run(tiny, **shorter), untouched)
        assert handle.report().share_computed == pytest.approx(0.5)
        assert len(handle.methods[0].schedule) == STEPS - 2
        assert torch.equal(run(tiny), changed)
        settled = FitCache(schedule=(1, 0) * (STEPS // 2), weights=(((0.0, 1.0, 0.0),) * 4,))
    with accel.patched(tiny.pipe, settled):
        assert all(torch.equal(run(tiny, **shorter), untouched) for _ in range(2))
        assert not torch.equal(run(tiny), baseline)


def test_where_other_steps_were_computed_the_line_stands_in() -> None:
    tiny, _ = built("wan21")
    zeros = {"schedule": (1, 1, 0, 1, 0, 1, 0, 0), "weights": (((9.0, 9.0, 9.0),) * 4,)}
    with accel.patched(tiny.pipe, FitCache(**zeros), accel.CfgCache(interval=3, start=0.1)):
        rough = run(tiny)
    assert torch.isfinite(rough).all()
    method = FitCache(**zeros)
    policy = method_policy(method)
    kept = [torch.full((2,), float(value)) for value in (1, 2)]
    policy.places, policy.kept = [0, 3], [(each,) for each in kept]  # 1 and 3 were to be computed
    forecast = (torch.zeros(2),)
    context = context_at(4, 8)
    assert policy.refine(context, None, forecast, None) is forecast


def method_policy(method: FitCache):
    from accel.caches.fit_cache import _Fitted

    return _Fitted(method, COND)


def test_rows_of_a_batch_are_independent() -> None:
    tiny, _ = built("flux")
    with accel.patched(tiny.pipe, FitCache(share=0.5)):
        run(tiny)
        alone = run(tiny)
        noise = torch.randn(2, *alone.shape[1:], generator=torch.Generator().manual_seed(5))
        both = run(tiny, latents=noise, num_images_per_prompt=2)
        each = [run(tiny, latents=noise[i : i + 1]) for i in range(2)]
    assert torch.allclose(both, torch.cat(each), atol=1e-4)


def test_products_put_inputs_last() -> None:
    found = Products(inputs=True)
    found.rows, found.places = [[1.0], [2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0, 10.0]], [0, 1]
    assert found.matrix().tolist() == [
        [1.0, 4.0, 2.0, 7.0],
        [4.0, 6.0, 5.0, 9.0],
        [2.0, 5.0, 3.0, 8.0],
        [7.0, 9.0, 8.0, 10.0],
    ]


def test_strides_are_what_the_solver_multiplies_predictions_with() -> None:
    tiny, _ = built("wan21")
    scheduler = tiny.pipe.scheduler
    scheduler.set_timesteps(STEPS)
    from accel.geometry import log_signal_to_noise

    found = solver_strides(log_signal_to_noise(scheduler), "flow")
    steps = (scheduler.sigmas[:-1] - scheduler.sigmas[1:]).tolist()
    assert found == pytest.approx(steps, abs=2e-3)
    assert solver_strides([0.0], "epsilon") == [1.0]
    assert solver_strides([0.0], "v_prediction") == pytest.approx([np.pi / 4])
    assert solver_strides([6.0], "sample") == pytest.approx([1.0], abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, "share"),
        ({"early": "much"}, "early"),
        ({"schedule": (1, 0)}, "give both"),
        ({"schedule": (0, 1), "weights": ((),)}, "first of them a 1"),
        ({"schedule": (1, 0), "weights": ()}, "three numbers for each of the 1 zeros"),
        ({"schedule": (1, 0), "weights": (((0.0, 1.0),),)}, "three numbers"),
    ],
)
def test_wrong_settings_are_named(wrong, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        FitCache(**wrong)
