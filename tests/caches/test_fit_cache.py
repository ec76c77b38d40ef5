"""Weights are least squares, the schedule is the best of all, and a measured run comes first."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contract_cases import context_at
from tiny_pipelines import STEPS, TINY, built, run

import accel
from accel import FitCache
from accel.caches.fit_cache import _Fitted, _Kept
from accel.caches.products import BranchProducts
from accel.optimal_steps import (
    cheapest_path,
    drift_costs,
    fitted_weights,
    solver_strides,
)

COUNT = 7
SOURCES = [(0, (0,)), (1, (1,)), (0, (0, 1)), (1, (0, 1))]
"""A branch, and those whose residuals its forecast is made of."""


def recorded(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two branches' residuals and the latents (3, steps, values), and their inner products."""
    generator = np.random.default_rng(seed)
    every = generator.standard_normal((3 * COUNT, 12)).cumsum(axis=0)
    return every.reshape(3, COUNT, 12), (every @ every.T).reshape((3, COUNT) * 2)


def regressors(every: np.ndarray, sources: tuple[int, ...], pair: tuple[int, int], step: int):
    return np.stack(
        [*(every[source, place] for source in sources for place in pair), every[2, step]]
    )


@pytest.mark.parametrize("pair", [(0, 0), (0, 1), (1, 3)])
@pytest.mark.parametrize(("branch", "sources"), SOURCES)
def test_no_other_weights_come_closer(branch, sources, pair) -> None:
    every, products = recorded()
    (weights,) = fitted_weights(products, branch, sources, pair, [5])
    basis = regressors(every, sources, pair, 5)
    best = np.linalg.lstsq(basis.T, every[branch, 5], rcond=None)[0]
    assert weights @ basis == pytest.approx(best @ basis, rel=1e-3, abs=1e-3)
    assert pair[0] != pair[1] or not any(weights[:-1:2])


@pytest.mark.parametrize(("branch", "sources"), SOURCES)
def test_costs_are_the_drift_of_the_forecasts(branch, sources) -> None:
    every, products = recorded()
    strides = np.linspace(1, 2, COUNT)
    costs = drift_costs(products, branch, sources, strides)

    def error(pair: tuple[int, int], step: int) -> np.ndarray:
        (weights,) = fitted_weights(products, branch, sources, pair, [step])
        return every[branch, step] - weights @ regressors(every, sources, pair, step)

    for pair in [(0, 0), *itertools.combinations(range(COUNT), 2)]:
        for end in range(pair[1] + 1, COUNT + 1):
            gap = range(pair[1] + 1, end)
            drift = sum((strides[s] * error(pair, s) for s in gap), np.zeros(12))
            assert costs[(*pair, end)] == pytest.approx((drift**2).sum(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("computes", [2, 3, 5, COUNT])
def test_the_cheapest_path_is_the_best_of_all(computes) -> None:
    costs = drift_costs(recorded()[1], 0, (0,), np.ones(COUNT))

    def price(steps: tuple[int, ...]) -> float:
        ends, older = (*steps[1:], COUNT), (0, *steps[:-1])
        return sum(costs[i, j, n] for i, j, n in zip(older, steps, ends, strict=True))

    every = [(0, *rest) for rest in itertools.combinations(range(1, COUNT), computes - 1)]
    assert price(tuple(cheapest_path(costs, computes))) == pytest.approx(min(map(price, every)))


def test_errors_of_the_beginning_can_weigh_more() -> None:
    products = recorded()[1]
    first = [FitCache.fitted([0.5], early, False, products, [1.0] * COUNT)[0] for early in (-6, 6)]
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


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("family", "branches"), [("wan21", 2), ("flux", 1), ("sd15", 2)])
def test_each_branch_has_weights_of_its_own(family, branches, across) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, FitCache(share=0.5, across=across)) as handle:
        run(tiny)
        settled = handle.methods[0]
    assert len(settled.weights) == branches
    for branch in settled.weights:
        assert len(branch) == settled.schedule.count(0)
        assert {len(row) for row in branch} == {2 * branches + 1 if across else 3}


def test_two_calls_and_a_doubled_batch_have_the_same_weights() -> None:
    tiny, _ = built("sd15")
    found = []
    for others in ((), (accel.GuidanceInterval(highest=1e9),)):  # which makes two calls of one
        with accel.patched(tiny.pipe, FitCache(share=0.5, across=True), *others) as handle:
            run(tiny)
            settled = handle.methods[0]
        with accel.patched(tiny.pipe, settled, *others):
            found.append((settled.schedule, np.array(settled.weights), run(tiny)))
    (schedule, weights, picture), (again, same, alike) = found
    assert schedule == again
    assert weights == pytest.approx(same, abs=1e-2)
    assert torch.allclose(picture, alike, atol=1e-2)


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
            del scheduler.step
    for (a, b, c), (older, newer, at) in zip(
        weights, [(0, 1, 2), (0, 1, 3), (4, 5, 6)], strict=True
    ):
        wanted = a * seen[older][1] + b * seen[newer][1] + c * seen[at][0]
        assert torch.allclose(seen[at][1], wanted, atol=1e-5)


def test_across_takes_the_other_branch_too() -> None:
    tiny, _ = built("wan21")
    rows = tuple((0.1 * k, 0.9, -0.1 * k, 0.05, 0.02 * k) for k in range(1, 4))
    weights = (rows, tuple(tuple(-each for each in row) for row in rows))
    settings = FitCache(across=True, schedule=(1, 1, 0, 0, 1, 1, 0, 1), weights=weights)
    seen, call = [], tiny.pipe.transformer.forward

    def watch(hidden_states, *args, **kwargs):
        output = call(hidden_states, *args, **kwargs)
        seen.append(output[0] - hidden_states)
        return output

    latents, guided = [], []

    def step(output, timestep, sample, **options):
        latents.append(sample)
        guided.append(output)
        return stepped(output, timestep, sample, **options)

    tiny.pipe.transformer.forward = watch
    try:
        with accel.patched(tiny.pipe, settings):
            stepped, tiny.pipe.scheduler.step = tiny.pipe.scheduler.step, step
            run(tiny, guidance_scale=3.0)
    finally:
        del tiny.pipe.scheduler.step
        del tiny.pipe.transformer.forward
    cond, uncond = seen[::2], seen[1::2]  # of steps 0, 1, 4, 5 and 7
    for row, (older, newer, at) in zip(rows, [(0, 1, 2), (0, 1, 3), (2, 3, 6)], strict=True):
        terms = cond[older], cond[newer], uncond[older], uncond[newer], latents[at]
        forecast = sum(weight * term for weight, term in zip(row, terms, strict=True))
        wanted = latents[at] - forecast + 3 * (forecast + forecast)
        assert torch.allclose(guided[at], wanted, atol=1e-4)


def test_nothing_is_held_after_the_measuring_run(monkeypatch) -> None:
    tiny, _ = built("wan21")
    made, begin = [], BranchProducts.__init__

    def watch(self, run):
        begin(self, run)
        made.append(self)

    monkeypatch.setattr(BranchProducts, "__init__", watch)
    with accel.patched(tiny.pipe, FitCache(share=0.5)):
        run(tiny)
        assert len(made) == 1 and made[0].gram.rows and not made[0].gram.values


def test_without_guidance_there_is_nothing_to_look_across_at() -> None:
    tiny, _ = built("wan21")
    rows = ((0.0, 1.0, 0.0, 0.0, 0.0),) * 4
    settings = FitCache(across=True, schedule=(1, 0) * (STEPS // 2), weights=(rows, rows))
    alone = run(tiny, guidance_scale=1.0)
    with accel.patched(tiny.pipe, settings) as handle:
        assert torch.equal(run(tiny, guidance_scale=1.0), alone)
        assert handle.report().share_computed == 1.0
        run(tiny)
        assert handle.report().share_computed == 0.5


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
    kept = _Kept({0: [(0, torch.ones(2)), (3, torch.ones(2))]})  # 1 and 3 were to be computed
    policy = _Fitted(method, None, kept)
    policy.own, forecast = (0,), (torch.zeros(2),)
    signals = SimpleNamespace(hidden=torch.zeros(2))
    assert policy.refine(context_at(4, 8), signals, forecast, None) is forecast
    kept[0][0] = (1, torch.ones(2))
    (fitted,) = policy.refine(context_at(4, 8), signals, forecast, None)
    assert fitted.tolist() == [18.0, 18.0]


def test_rows_of_a_batch_are_independent() -> None:
    tiny, _ = built("flux")
    with accel.patched(tiny.pipe, FitCache(share=0.5)):
        run(tiny)
        alone = run(tiny)
        noise = torch.randn(2, *alone.shape[1:], generator=torch.Generator().manual_seed(5))
        both = run(tiny, latents=noise, num_images_per_prompt=2)
        each = [run(tiny, latents=noise[i : i + 1]) for i in range(2)]
    assert torch.allclose(both, torch.cat(each), atol=1e-4)


def test_products_are_those_of_branches_that_always_ran() -> None:
    found = BranchProducts(run=0)
    values = {}
    for place in range(3):
        latent = torch.full((1, 2), 10.0 + place)
        for branch in (1, 0, 2) if place != 1 else (1, 0):
            values[branch, place] = torch.full((1, 2), 1.0 + branch + place / 10)
            clock = SimpleNamespace(schedule=3, log_snr=[0.0] * 3)
            context = SimpleNamespace(schedule=3, place=place, clock=clock)
            found.add(context, branch, latent, values[branch, place])
        values[-1, place] = latent
    order = [(branch, place) for branch in (0, 1, -1) for place in range(3)]
    every = torch.stack([values[each].flatten() for each in order]).double().numpy()
    assert found.places == [0, 1, 2]
    assert found.matrix().reshape(9, 9) == pytest.approx(every @ every.T)


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


def test_both_looks_of_heun_at_a_step_count() -> None:
    """A step of Heun goes by the mean of two evaluations, the second at the next level."""
    once = solver_strides([0.0, 1.0, 2.0], "epsilon")
    twice = solver_strides([0.0, 1.0, 1.0, 2.0, 2.0], "epsilon")
    assert twice == pytest.approx([once[0] / 2] * 2 + [once[1] / 2] * 2 + [once[2]])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, "share"),
        ({"early": "much"}, "early"),
        ({"schedule": (1, 0)}, "give both"),
        ({"schedule": (0, 1), "weights": ((),)}, "first of them a 1"),
        ({"across": 1}, "across"),
        ({"schedule": (1, 0), "weights": ()}, "3 numbers for each of the 1 zeros"),
        ({"schedule": (1, 0), "weights": (((0.0, 1.0),),)}, "3 numbers"),
        ({"across": True, "schedule": (1, 0), "weights": (((0.0,) * 3,),) * 2}, "5 numbers"),
    ],
)
def test_wrong_settings_are_named(wrong, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        FitCache(**wrong)
