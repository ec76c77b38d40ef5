"""Kernels and stages in a calibration: probed in the recorded run, predicted beside caches."""

from dataclasses import replace

import pytest
import torch
from test_calibrate_profile import call_of, profiled
from tiny_pipelines import built, run

import accel
from accel import calibrate_fit, calibrate_probe
from accel.calibrate_fit import candidates, predicted, replays, split
from accel.calibrate_probe import key, size_key
from accel.calibrate_profile import Profile
from accel.calibrate_replay import Replay
from accel.calibrate_variants import variants
from accel.kernels import nabla

LOW = tuple(accel.Linear(format=name, least=1) for name in ("int8", "int4"))
ADAPTIVE = accel.Attention(kernel="adaptive", least=1, similarity=0.5, error=1.0, reference=True)


@pytest.fixture(scope="module")
def wan():
    tiny, _ = built("wan21")
    return profiled(tiny)


def with_probes(profile: Profile, **probes) -> Profile:
    named = {"linear": key(accel.Linear()), "half": size_key(0.5)}
    known = {named[name]: each for name, each in probes.items()}
    return Profile(tuple(replace(each, probes=known) for each in profile.prompts))


@pytest.mark.parametrize("tiny", ["wan21", "sd15", "flux_cfg"], indirect=True)
def test_probing_changes_nothing_and_compares(tiny) -> None:
    before = run(tiny)
    pictures = []

    def make(call, seed):
        generator = torch.Generator().manual_seed(seed)
        pictures.append(tiny.pipe(**call, output_type="latent", generator=generator)[0])

    plain = profiled(tiny, run=make)
    made = profiled(tiny, variants=[accel.Attention(), *LOW], run=make)
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(run(tiny), before)
    assert not plain.probes
    errors = {name: error for name, (_, error) in made.probes.items()}
    assert errors[key(accel.Attention())] == 0
    assert 0 < errors[key(LOW[0])] < errors[key(LOW[1])] < 1
    assert all(seconds > 0 for seconds, _ in made.probes.values())
    for one, two in zip(plain.prompts, made.prompts, strict=True):
        assert one.calls == two.calls
        for name, value in one.values.items():
            assert torch.equal(value, two.values[name]), name


def test_smaller_sizes_are_timed() -> None:
    tiny, _ = built("flux_cfg")
    seconds, error = profiled(tiny, variants=[]).probes[size_key(0.5)]
    assert seconds > 0 and 0 < error < 2


def test_what_measures_itself_does_so_in_the_second_run(tmp_path) -> None:
    tiny, _ = built("wan21")
    options = {"call": call_of(tiny), "variants": [ADAPTIVE], "folder": tmp_path}
    accel.profile(tiny.pipe, ["a cat", "a dog"], **options)
    (text,) = Profile.load(tmp_path).measured
    assert "sage_int8" in text
    assert "_accel_patch" not in vars(tiny.pipe)


def test_a_kernel_costs_its_share_of_the_calls(wan) -> None:
    profile = with_probes(wan, linear=(0.5, 0.02))
    spent = profile.prompts[0].seconds
    alone = predicted(profile, f"[{key(accel.Linear())}]").prediction
    assert alone.seconds == pytest.approx(spent["run"] - spent["call"] / 2)
    assert alone.error == pytest.approx(0.02)
    assert alone.speedup == pytest.approx(spent["run"] / alone.seconds)
    cycle = f"[{key(accel.PlainCycle(interval=2))}, {key(accel.Linear())}]"
    both = predicted(profile, cycle).prediction
    cache = Replay(profile.prompts[0]).predict(accel.PlainCycle(interval=2))
    assert both.error == pytest.approx((cache.error**2 + 0.02**2) ** 0.5)
    assert both.seconds < min(alone.seconds, cache.seconds)


def test_what_saves_nothing_is_no_candidate(wan) -> None:
    profile = with_probes(wan, linear=(1.7, 0.02), half=(1.1, 0.9))
    assert variants(profile, replays(profile)) == []


def test_candidates_have_kernels_and_stages_beside_caches(wan, monkeypatch) -> None:
    monkeypatch.setattr(calibrate_fit, "_SHARES", (0.5,))
    monkeypatch.setattr(calibrate_fit, "_FINE", ())
    monkeypatch.setattr(calibrate_fit, "_GUIDANCE", ())
    monkeypatch.setattr(calibrate_fit, "_INTERVALS", (2,))
    found = candidates(with_probes(wan, linear=(0.5, 0.02), half=(0.3, 0.9)))
    kinds = {tuple(type(method).__name__ for method in each.methods) for each in found}
    assert {("Linear",), ("Progressive",), ("Linear", "BottleneckSampling")} <= kinds
    assert {("FitCache", "Linear"), ("PlainCycle", "Linear", "Progressive")} <= kinds
    assert ("FitCache", "Progressive") not in kinds  # weights of a whole run's steps
    for each in found:
        replayed, varied = split(each.methods)
        assert (*replayed, *varied) == each.methods


@pytest.mark.parametrize("family", ["wan21", "sd15", "flux_cfg"])
def test_less_is_undecided_towards_the_end(family) -> None:
    tiny, _ = built(family)
    record = profiled(tiny).prompts[0]
    replay = Replay(record)
    left = [replay.undecided(step) for step in range(1, record.steps + 1)]
    assert left[-1] == 0 and left[0] == max(left)


SPARSE = accel.NABLA(tile=(1, 4, 4), least=16, warmup=0.0)


def test_block_maps_are_recorded_and_fit_the_mass(tmp_path) -> None:
    """The share that is asked for is the share of blocks that a run with the fitted mass keeps."""
    tiny, _ = built("wan21")
    options = {"call": call_of(tiny), "variants": [SPARSE], "folder": tmp_path}
    accel.profile(tiny.pipe, ["a cat"], **options)
    profile = Profile.load(tmp_path)
    layers = [name for name in profile.prompts[0].values if name.startswith("map/")]
    assert len(layers) == len(tiny.pipe.transformer.blocks)
    maps = profile.block_maps
    assert len(maps) == len(calibrate_probe.PLACES) * len(layers)
    for each in maps:
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:-1]))
    first = [profile.prompts[0].values[name][0] for name in layers]
    masses = [SPARSE.fitted(first, share).mass for share in calibrate_probe.SHARES]
    assert masses[0] > masses[1]
    assert {key(replace(SPARSE, mass=mass)) for mass in masses} <= set(profile.probes)
    for share in (0.4, 0.7):
        (method,) = calibrate_fit.fit(profile, "NABLA", share, **vars(replace(SPARSE))).methods
        kept = [float(nabla.smallest_sets(each, method.mass).float().mean()) for each in maps]
        assert sum(kept) / len(kept) == pytest.approx(share, abs=0.12)
        more = [
            float(nabla.smallest_sets(each, method.mass + 0.01).float().mean()) for each in maps
        ]
        assert sum(kept) <= share * len(kept) < sum(more)


def test_without_maps_no_mass_is_fitted(wan) -> None:
    with pytest.raises(accel.AccelError, match="no block maps"):
        calibrate_fit.fit(wan, "NABLA", 0.5)


def test_a_model_of_few_tokens_has_no_maps() -> None:
    tiny, _ = built("wan21")
    made = profiled(tiny, variants=[accel.NABLA()])
    assert made.block_maps == []
    assert key(accel.NABLA()) in made.probes
