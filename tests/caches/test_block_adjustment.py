"""Scale and shift of reused block residuals: fitted exactly, kept in a file, and better."""

from __future__ import annotations

import pytest
import torch
from contract_cases import context_at
from safetensors.torch import load_file
from tiny_pipelines import STEPS, built, run

import accel
from accel.caches.block_adjustment import Adjustment

CHANGES = ((0.0, *(0.2,) * (STEPS - 1)),)


@pytest.mark.parametrize("shape", [(2, 50, 6), (3, 6, 8, 9)])
def test_a_scaled_and_shifted_residual_is_recovered(tmp_path, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    reused = torch.randn(shape, generator=generator)
    broadcast = (6,) if len(shape) == 3 else (6, 1, 1)
    scale = torch.rand(6, generator=generator).view(broadcast) + 0.5
    shift = torch.randn(6, generator=generator).view(broadcast)
    wanted = reused * scale + shift
    adjustment = Adjustment(tmp_path / "a.safetensors", "Model", "unet")
    key = adjustment.key(0, context_at(3, STEPS))
    assert torch.equal(adjustment.adjusted(key, reused), reused)
    adjustment.fit(key, reused, wanted)
    error = (adjustment.adjusted(key, reused) - wanted).square().mean()
    assert error < 0.001 * (reused - wanted).square().mean()


@pytest.mark.parametrize("family", ["wan21", "flux", "sd15"])
def test_the_second_run_fits_and_the_third_uses(family, tmp_path) -> None:
    tiny, baseline = built(family)
    file = tmp_path / "fitted.safetensors"
    plain = accel.BlockCaching(threshold=0.5, changes=CHANGES)
    with accel.patched(tiny.pipe, plain):
        unadjusted = run(tiny)
    method = accel.BlockCaching(threshold=0.5, changes=CHANGES, adjustment=str(file))
    with accel.patched(tiny.pipe, method) as handle:
        fitting = run(tiny)
        assert handle.report().share_computed == 1.0
        assert file.is_file()
        used = run(tiny)
        assert handle.report().share_computed < 1
        assert torch.allclose(used, fitting, atol=1e-4)
    with accel.patched(tiny.pipe, method):
        again = run(tiny)
        assert torch.allclose(again, used, atol=2e-2)
    assert (again - baseline).norm() < (unadjusted - baseline).norm()
    assert torch.equal(run(tiny), baseline)


def test_both_experts_are_fitted_and_kept(tmp_path) -> None:
    tiny, _ = built("wan22")
    file, steps = tmp_path / "fitted.safetensors", 16
    changes = ((0.0, *(0.2,) * (steps - 1)),)
    method = accel.BlockCaching(threshold=0.5, changes=changes, adjustment=str(file))
    with accel.patched(tiny.pipe, method) as handle:
        fitting = run(tiny, num_inference_steps=steps)
        names = {row.denoiser for row in handle.report().rows}
    assert {key.split(".")[0] for key in load_file(file)} == names
    assert len(names) == 2
    with accel.patched(tiny.pipe, method) as handle:
        used = run(tiny, num_inference_steps=steps)
        shares = {name: 0.0 for name in names}
        for row in handle.report().rows:
            shares[row.denoiser] += row.blocks - row.blocks_run
    assert min(shares.values()) > 0, "nothing is fitted anew"
    assert torch.allclose(used, fitting, atol=2e-2)


def test_an_interrupted_run_writes_nothing(tmp_path) -> None:
    tiny, _ = built("wan21")
    file = tmp_path / "fitted.safetensors"
    method = accel.BlockCaching(threshold=0.5, changes=CHANGES, adjustment=str(file))

    def stop(pipe, step, timestep, tensors):
        if step == STEPS - 2:
            raise KeyboardInterrupt
        return {}

    with accel.patched(tiny.pipe, method):
        with pytest.raises(KeyboardInterrupt):
            run(tiny, callback_on_step_end=stop)
        assert not list(tmp_path.iterdir())
        run(tiny)
        assert file.is_file()


def test_a_wrong_file_is_named(tmp_path) -> None:
    tiny, baseline = built("wan21")
    file = tmp_path / "fitted.safetensors"
    method = accel.BlockCaching(threshold=0.5, changes=CHANGES, adjustment=str(file))
    with accel.patched(tiny.pipe, method):
        run(tiny)
    with (
        accel.patched(tiny.pipe, method),
        pytest.raises(accel.AccelError, match=f"fitted for {STEPS} steps"),
    ):
        run(tiny, num_inference_steps=STEPS + 2)
    other, _ = built("flux")
    with pytest.raises(accel.AccelError, match="not of FluxTransformer2DModel"):
        accel.patch(other.pipe, method)
    file.write_bytes(b"nonsense")
    with pytest.raises(accel.AccelError, match="cannot be read"):
        accel.patch(tiny.pipe, method)
    assert torch.equal(run(tiny), baseline)
