"""Profiles: recording changes nothing, sketches keep distances, files resume and are checked."""

import pytest
import torch
from tiny_pipelines import built, run

import accel
from accel.calibrate_profile import Profile, fingerprint
from accel.calibrate_record import SKETCH, Sketcher

STEPS = 8


def call_of(tiny):
    drop = ("prompt", "output_type", "generator")
    return {key: value for key, value in tiny.call.items() if key not in drop}


def profiled(tiny, **options):
    return accel.profile(tiny.pipe, ["a cat"], call=call_of(tiny), **options)


def test_sketches_keep_norms_and_are_linear() -> None:
    torch.manual_seed(0)
    sketch, x, y = Sketcher(), torch.randn(40, 64), torch.randn(40, 64) * 0.1
    assert sketch(x).shape == (SKETCH,)
    torch.testing.assert_close(sketch(x) + sketch(y), sketch(x + y), rtol=1e-4, atol=1e-3)
    for value in (x, y, x - y):
        assert sketch(value).norm().item() == pytest.approx(value.norm().item(), rel=0.2)


@pytest.mark.parametrize("tiny", ["wan21", "sd15", "flux_cfg"], indirect=True)
def test_recording_changes_nothing(tiny) -> None:
    before = run(tiny)
    made = profiled(tiny).prompts[0]
    assert torch.equal(run(tiny), before)
    assert "_accel_patch" not in vars(tiny.pipe)
    assert made.steps == STEPS and made.guided
    for site in ("prediction", "latent", "stack", "entry"):
        for branch in ("cond", "uncond"):
            assert made.values[f"{site}/{branch}"].shape == (STEPS, SKETCH)
    assert any(name.startswith("layer.") for name in made.values)
    assert made.seconds["stack"] <= made.seconds["call"] <= made.seconds["run"]
    assert (abs(made.agreement()) <= 1.0001).all()
    assert (made.lagged_error("stack", 2) >= 0).all()


def test_a_run_without_guidance_has_one_branch() -> None:
    tiny, _ = built("flux")
    made = profiled(tiny).prompts[0]
    assert not made.guided and "prediction/cond" in made.values


def test_prompts_that_lie_there_are_not_run_again(tmp_path) -> None:
    tiny, _ = built("wan21")
    runs = []

    def make(call, seed):
        runs.append(call["prompt"])
        tiny.pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(seed))

    options = {"call": call_of(tiny), "folder": tmp_path, "run": make}
    first = accel.profile(tiny.pipe, ["a cat", "a dog"], **options)
    (tmp_path / "rest.profile.safetensors.part").write_bytes(b"torn")
    next(iter(tmp_path.glob("*.safetensors"))).unlink()
    second = accel.profile(tiny.pipe, ["a cat", "a dog"], **options)
    assert len(runs) == 3
    for old, new in zip(first.prompts, second.prompts, strict=True):
        torch.testing.assert_close(old.values["stack/cond"], new.values["stack/cond"])


def test_folders_merge(tmp_path) -> None:
    tiny, _ = built("wan21")
    for name, seed in (("one", 0), ("two", 1)):
        options = {"call": call_of(tiny), "seeds": [seed], "folder": tmp_path / name}
        accel.profile(tiny.pipe, ["a cat"], **options)
    assert len(Profile.load(tmp_path / "one", tmp_path / "two").prompts) == 2
    assert len(Profile.load(tmp_path / "one", tmp_path / "one").prompts) == 1


def test_another_model_is_refused(tmp_path) -> None:
    tiny, _ = built("wan21")
    made = profiled(tiny, folder=tmp_path)
    weight = next(tiny.pipe.transformer.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1
        known = fingerprint(tiny.pipe)
        with pytest.raises(accel.AccelError, match="another model"):
            made.check(tiny.pipe)
        with pytest.raises(accel.AccelError, match="another model"):
            profiled(tiny, folder=tmp_path)
        weight.copy_(before)
    assert known != made.fingerprint


def test_bad_arguments_and_files(tmp_path) -> None:
    tiny, _ = built("wan21")
    for prompts in ([], [" "]):
        with pytest.raises(accel.AccelError, match="at least one prompt"):
            accel.profile(tiny.pipe, prompts)
    with pytest.raises(accel.AccelError, match="2 seeds for 1"):
        accel.profile(tiny.pipe, ["a"], seeds=[1, 2])
    with pytest.raises(accel.AccelError, match="no profile"):
        Profile.load(tmp_path)
    (tmp_path / "x.profile.safetensors").write_bytes(b"nonsense")
    with pytest.raises(accel.AccelError, match="cannot be read"):
        Profile.load(tmp_path)
