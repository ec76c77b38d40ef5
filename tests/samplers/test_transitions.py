"""A transition lands exactly on the noise level that the next stage starts from."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from accel import AccelError
from accel.layout import Form, Layout
from accel.noise_levels import NoiseLevels
from accel.transitions import correlated, data_in, draw_noise, renoised, repeated, resize

COUNT = 1_000_000
LEVELS = {
    "flow": NoiseLevels("flow", "velocity", (1.0, 0.8, 0.4, 0.0), 1000),
    "vp": NoiseLevels("vp", "epsilon", (14.6, 2.0, 0.5, 0.0), 1000, (0.03, 1.0, 14.6)),
    "vp-v": NoiseLevels("vp", "v_prediction", (14.6, 2.0, 0.5, 0.0), 1000, (0.03, 1.0, 14.6)),
    "ve": NoiseLevels("ve", "epsilon", (14.6, 2.0, 0.5, 0.0), 1000, (0.03, 1.0, 14.6)),
}


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.randn(1, count, 1, generator=torch.Generator().manual_seed(seed))


def close(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 0.01 * max(abs(wanted), 0.1)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_t1_has_the_mean_and_variance_of_the_level(levels) -> None:
    for sigma in levels.sigmas[1:-1]:
        a, s = levels.weights(sigma)
        state = renoised(torch.full((1, COUNT, 1), 3.0), noise(COUNT, 0), (a, s))
        assert close(float(state.mean()), 3 * a)
        assert close(float(state.var()), s**2)


@pytest.mark.parametrize("factor", [2.0, 3.0, 7.52])
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_t2_has_the_mean_variance_and_no_covariance(levels, factor) -> None:
    """A quarter of the elements stays single, the others become four."""
    old_sigma = levels.sigmas[-2]
    old, new = (
        levels.weights(levels.sigma(levels.ratio(old_sigma) * scale)) for scale in (1.0, factor)
    )
    parents = torch.cat((torch.arange(COUNT // 4), COUNT // 4 + torch.arange(COUNT) // 4))
    data = torch.full((1, COUNT // 2, 1), 3.0)
    state = repeated(
        old[0] * data + old[1] * noise(COUNT // 2, 1), noise(len(parents), 2), parents, 1, old, new
    )[0, :, 0]
    single, blocks = state[: COUNT // 4], state[COUNT // 4 :].reshape(-1, 4) - 3 * new[0]
    for part in (single, blocks.flatten() + 3 * new[0]):
        assert close(float(part.mean()), 3 * new[0])
        assert close(float(part.var()), new[1] ** 2)
    covariance = blocks.T @ blocks / len(blocks)
    off = covariance - torch.diag(covariance.diag())
    assert float(off.abs().max()) < 0.01 * new[1] ** 2


@pytest.mark.parametrize("live", [(1, 500, 500), (1, 750, 750)])
def test_pooled_noise_is_white_again_and_belongs_to_its_places(live) -> None:
    full = (1, 1000, 1000)
    layout, form = Layout.resized(full, live), Form(packed=False, flat=True)
    drawn = noise(COUNT, 5).reshape(1, 1, *full[1:])
    found = form.pixels(form.pooled(drawn, layout))[0, 0]
    assert close(float(found.mean()) + 1, 1)
    assert close(float(found.var()), 1)
    rows = found.reshape(live[1:])
    assert abs(float((rows[:, 1:] * rows[:, :-1]).mean())) < 0.01
    inside = layout.spread == 7
    wanted = drawn.flatten()[inside].sum() / math.sqrt(int(inside.sum()))
    assert torch.allclose(found[7], wanted)
    whole = Layout.resized(full, full)
    assert torch.equal(form.pooled(drawn, whole), drawn)


@pytest.mark.parametrize("live", [(1, 4, 4), (1, 6, 6)])
def test_packed_tokens_are_pooled_and_repeated_as_the_picture_that_they_hold(live) -> None:
    """Tokens of four latent pixels: what a token holds is not mixed with where it lies."""
    full, form = (1, 8, 8), Form(packed=True, patch=2)
    layout, side = Layout.resized(full, live), 2 * live[1]
    planes = noise(5 * 16 * 16, 8).reshape(1, 5, 1, 16, 16)
    assert torch.equal(form.planes(form.tokens(planes), full), planes)
    small = form.planes(form.pooled(form.tokens(planes), layout), live)
    shown = form.planes(form.put(form.tokens(small), layout), full)
    assert torch.equal(shown[:, :, 0], functional.interpolate(small[:, :, 0], (16, 16)))
    assert torch.equal(form.take(form.tokens(shown), layout), form.tokens(small))
    line = torch.arange(16) * side // 16
    cells = (line[:, None] * side + line).flatten()
    sums = torch.zeros(1, 5, 1, side * side).index_add(3, cells, planes.flatten(3))
    wanted = sums / torch.bincount(cells).sqrt()
    assert torch.allclose(small.flatten(3), wanted, atol=1e-5)


def test_in_a_mixed_layout_each_pixel_comes_from_the_one_that_it_lies_in() -> None:
    full, form = (1, 4, 4), Form(packed=True, patch=2)
    coarse = Layout.resized(full, (1, 2, 2))
    mixed = Layout.mixed(coarse, torch.tensor([True, False, False, False]))
    small = noise(3 * 16, 9).reshape(1, 3, 1, 4, 4)
    pixels = form.pixels(form.tokens(small))[:, mixed.parents(coarse, 2)]
    shown = form.planes(form.put(form.shaped(pixels, None), mixed), full)
    assert torch.equal(shown[:, :, 0], functional.interpolate(small[:, :, 0], (8, 8)))


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_t2_with_the_runs_own_noise_has_it_exactly(levels) -> None:
    """Single elements and blocks of four: the data repeated, and each copy's own noise."""
    old, new = (levels.weights(sigma) for sigma in (levels.sigmas[-2], levels.sigmas[1]))
    parents = torch.cat((torch.arange(100), 100 + torch.arange(400) // 4))
    data, before, after = noise(200, 1), noise(200, 2), noise(500, 3)
    noisy = old[0] * data + old[1] * before
    state = renoised(data_in(noisy, before, old)[:, parents], after, new)
    assert torch.allclose(state, new[0] * data[:, parents] + new[1] * after, atol=1e-5)


def test_correlated_noise_of_a_quarter_has_no_block_mean() -> None:
    parents = torch.arange(4000) // 4
    found = correlated(noise(4000, 0), parents, 1, 0.25)
    assert float(found.reshape(-1, 4).mean(1).abs().max()) < 1e-6
    with pytest.raises(AccelError, match="at least 2 times"):
        correlated(noise(4000, 0), parents, 1, 0.3)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_clean_inverts_the_prediction(levels) -> None:
    data, eps = noise(50, 3), noise(50, 4)
    for sigma in levels.sigmas[1:-1]:
        a, s = levels.weights(sigma)
        if levels.prediction == "velocity":
            output = eps - data
        elif levels.prediction == "v_prediction":
            output = a * eps - s * data
        else:
            output = eps
        assert torch.allclose(levels.clean(a * data + s * eps, output, sigma), data, atol=1e-4)


def test_v_prediction_of_a_scaled_scheduler() -> None:
    """VE latents, v-prediction: the formula that EulerDiscreteScheduler uses."""
    levels = NoiseLevels("ve", "v_prediction", (14.6, 2.0, 0.0), 1000, (0.03, 14.6))
    sample, output = noise(50, 5), noise(50, 6)
    wanted = output * (-2.0 / math.sqrt(5)) + sample / 5
    assert torch.allclose(levels.clean(sample, output, 2.0), wanted, atol=1e-5)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_t1_with_the_predicted_noise_and_one_size_is_the_solvers_step(levels) -> None:
    """x̂0 at the level that the step would reach, with ε̂: DDIM's and flow matching's Euler step."""
    data, eps = noise(50, 3), noise(50, 4)
    here, there = levels.weights(levels.sigmas[1]), levels.weights(levels.sigmas[2])
    sample = here[0] * data + here[1] * eps
    outputs = {"velocity": eps - data, "v_prediction": here[0] * eps - here[1] * data}
    output = outputs.get(levels.prediction, eps)
    clean = levels.clean(sample, output, levels.sigmas[1])
    planes = clean.reshape(1, 1, 1, 5, 10)
    assert resize(planes, 5, 10) is planes
    wanted = there[0] * data + there[1] * eps
    predicted = (sample - here[0] * clean) / here[1]
    assert torch.allclose(renoised(clean, predicted, there), wanted, atol=1e-4)
    if levels.kind == "flow":
        step = sample + (levels.sigmas[2] - levels.sigmas[1]) * output
        assert torch.allclose(wanted, step, atol=1e-5)


def test_noise_follows_each_rows_generator() -> None:
    like = torch.zeros(2, 3, 4)
    both = draw_noise(like, (2, 3, 4), [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    one = draw_noise(like, (1, 3, 4), torch.Generator().manual_seed(1))
    assert torch.equal(both[1:], one)


@pytest.mark.parametrize("live", [(1, 4, 6), (1, 6, 9), (1, 8, 12)])
def test_taking_after_repeating_changes_nothing(live) -> None:
    layout = Layout.resized((1, 8, 12), live)
    assert torch.equal(layout.spread[layout.pick], torch.arange(len(layout.pick)))
    assert layout.whole == (live == (1, 8, 12))
    chosen = torch.rand(len(layout.pick), generator=torch.Generator().manual_seed(0)) > 0.6
    mixed = Layout.mixed(layout, chosen)
    assert torch.equal(mixed.spread[mixed.pick], torch.arange(len(mixed.pick)))


def test_coordinates_of_coarse_and_mixed_places() -> None:
    ids = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    native = Layout.resized((1, 4, 4), (1, 2, 2))
    assert native.coordinates(ids).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    middle = Layout.resized((1, 4, 4), (1, 2, 2), "spread")
    assert middle.coordinates(ids).tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    mixed = Layout.mixed(native, torch.tensor([False, True, False, False]))
    assert mixed.coordinates(ids).tolist() == [
        *([0, 0], [1, 0], [1, 1]),
        *([0, 1], [0, 1.5], [0.5, 1], [0.5, 1.5]),
    ]
