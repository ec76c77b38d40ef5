"""R-CFG: the known input stands for the unconditional branch, in every kind of output."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusionImg2ImgPipeline
from tiny_pipelines import Tiny, built, run

import accel
from accel.samplers.r_cfg import _Residual

KINDS = ["epsilon", "v_prediction", "flow"]


def image_to_image(name: str) -> Tiny:
    """The tiny pipeline's components in its image-to-image pipeline."""
    tiny, _ = built(name)
    kind = {"sd15": StableDiffusionImg2ImgPipeline, "flux_cfg": FluxImg2ImgPipeline}[name]
    components = dict(tiny.pipe.components)
    options = {"requires_safety_checker": False} if name == "sd15" else {}
    pipe = kind(**components, **options)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return Tiny(pipe, {**tiny.call, "image": image, "strength": 0.6})


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
@pytest.mark.parametrize(("negative", "share"), [("self", 0.5), ("once", 0.61)])
def test_no_or_one_negative_evaluation(name, negative, share) -> None:
    tiny = image_to_image(name)
    baseline = run(tiny)
    with accel.patched(tiny.pipe, accel.RCFG(negative=negative)) as handle:
        first = run(tiny)
        report = handle.report()
        assert torch.equal(run(tiny), first)
    assert report.share_computed == pytest.approx(share, abs=0.03)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, baseline)
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan21"])
def test_text_to_image_is_refused(name) -> None:
    tiny, baseline = built(name)
    with (
        accel.patched(tiny.pipe, accel.RCFG()),
        pytest.raises(accel.AccelError, match="image-to-image"),
    ):
        run(tiny)
    assert torch.equal(run(tiny), baseline)


def known(kind: str, log_snr: float) -> tuple[Any, Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy and context of a latent made of known clean data and noise, and its true output."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 6, 6, generator=generator)
    if kind == "flow":
        alpha, sigma = 1 / (1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
    else:
        alpha = (1 / (1 + math.exp(-2 * log_snr))) ** 0.5
        sigma = (1 / (1 + math.exp(2 * log_snr))) ** 0.5
    output = {
        "flow": noise - clean,
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
    }[kind]
    clock = SimpleNamespace(clean=clean, prediction=kind)
    policy = _Residual(accel.RCFG(), SimpleNamespace(clock=clock))  # type: ignore[arg-type]
    latent = alpha * clean + sigma * noise
    return policy, SimpleNamespace(latent=latent, log_snr=log_snr), clean, noise, output


@pytest.mark.parametrize("log_snr", [-2.0, 0.3, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_substitute_is_the_noise_that_explains_the_latent(kind, log_snr) -> None:
    policy, context, _, _, output = known(kind, log_snr)
    assert torch.allclose(policy.substitute(context, output), output, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_one_negative_evaluation_gives_its_clean_estimate(kind) -> None:
    policy, context, clean, _, output = known(kind, -1.0)
    policy.denoiser.clock.clean = torch.zeros_like(clean)
    policy.full(context, output, output)
    assert policy.negative is not None
    assert torch.allclose(policy.negative, clean, atol=1e-4)
    assert torch.allclose(policy.substitute(context, output), output, atol=1e-4)


@pytest.mark.parametrize("settings", [{"negative": "twice"}, {"delta": -1}])
def test_bad_settings_are_refused(settings) -> None:
    with pytest.raises(accel.AccelError, match=next(iter(settings))):
        accel.RCFG(**settings)
