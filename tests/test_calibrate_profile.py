"""Profiles: recording changes nothing, sketches keep distances, files resume and are checked."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import TINY, built, run

import accel
from accel.calibrate_profile import Profile
from accel.calibrate_record import SKETCH, Sketcher
from accel.fingerprint import described, fingerprint
from accel.model_calls import latent_like

STEPS = 8
SHIFTED = {"shift": 7.0, "flow_shift": 7.0}
"""Of a scheduler with another schedule, whatever it calls the setting."""


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


def test_what_lies_there_must_be_of_this_call_and_scheduler(tmp_path) -> None:
    tiny, _ = built("wan21")
    profiled(tiny, folder=tmp_path)
    other = {"call": call_of(tiny) | {"num_inference_steps": 4}, "folder": tmp_path}
    with pytest.raises(accel.AccelError, match="another call or scheduler"):
        accel.profile(tiny.pipe, ["a cat"], **other)
    before = tiny.pipe.scheduler
    try:
        tiny.pipe.scheduler = type(before).from_config(before.config, **SHIFTED)
        with pytest.raises(accel.AccelError, match="another call or scheduler"):
            profiled(tiny, folder=tmp_path)
    finally:
        tiny.pipe.scheduler = before
    wide = accel.profile(
        tiny.pipe, ["a dog"], call=call_of(tiny) | {"width": 64}, folder=tmp_path / "wide"
    )
    with pytest.raises(accel.AccelError, match="another latents cannot be merged"):
        Profile((*Profile.load(tmp_path).prompts, *wide.prompts))


def test_the_whole_residual_is_what_methods_hold() -> None:
    """PixArt predicts twice the latent's channels: the missing ones count as zero."""
    tiny, _ = built("pixart")
    denoiser, held = tiny.pipe.transformer, []

    def keep(_: object, args: tuple, kwargs: dict, output: tuple) -> None:
        latent = latent_like(args[0] if args else kwargs["hidden_states"], output[0].shape)
        held.append((output[0] - latent).chunk(2)[1].flatten().double())

    hook = denoiser.register_forward_hook(keep, with_kwargs=True)
    made = profiled(tiny).prompts[0]
    hook.remove()
    wanted = torch.stack(held) @ torch.stack(held).T
    assert abs(made.gram("whole") - wanted.numpy()).max() < 0.2 * float(wanted.diagonal().max())
    products = made.products()[1, :, 1, :]
    assert abs(products.diagonal() / wanted.diagonal().numpy() - 1).max() < 0.25


def test_a_part_of_the_schedule_is_recorded_as_it_was_run() -> None:
    tiny, _ = built("sdxl")
    part = {"num_inference_steps": 10, "denoising_end": 0.6}
    made = accel.profile(tiny.pipe, ["a cat"], call=call_of(tiny) | part).prompts[0]
    schedule = [float(each) for each in tiny.pipe.scheduler.timesteps]
    assert list(made.timesteps) == schedule[: made.steps]
    assert made.steps < made.schedule == len(schedule)


def test_prompts_may_be_one_text_and_a_patch_comes_back() -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=2)) as handle:
        made = accel.profile(tiny.pipe, "a cat", call=call_of(tiny), seeds=np.arange(1))
        assert [each.prompt for each in made.prompts] == ["a cat"]
        assert vars(tiny.pipe)["_accel_patch"] is handle
        run(tiny)
        assert accel.stats(tiny.pipe).hit_rate == 0.5
    with pytest.raises(accel.AccelError, match="generator: set by accel itself"):
        accel.profile(tiny.pipe, ["a cat"], call={"generator": None})


def test_values_of_a_call_are_known_by_content() -> None:
    picture = Image.new("RGB", (4, 4), "red")
    same = {"image": picture, "at": torch.ones(3), "to": np.ones(3), "on": print, "n": [1, None]}
    again = {**same, "image": picture.copy(), "at": torch.ones(3), "to": np.ones(3)}
    assert described(same) == described(again) == json.loads(json.dumps(described(same)))
    for other in (
        {"image": Image.new("RGB", (4, 4), "blue")},
        {"at": torch.zeros(3)},
        {"on": len},
        {"n": [1]},
    ):
        assert described(same | other) != described(same)


def test_a_lora_counts_by_how_much_of_it_acts() -> None:
    pipe = TINY["sd15"]().pipe
    plain = fingerprint(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="one")
    marks = {plain, fingerprint(pipe)}
    pipe.unet.set_adapters(["one"], [0.5])
    marks.add(fingerprint(pipe))
    pipe.unet.disable_adapters()
    marks.add(fingerprint(pipe))
    assert len(marks) == 4


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
