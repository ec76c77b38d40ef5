"""Low-rank offsets: in the weights or beside the layers they are the same; they leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import built, run
from torch import nn

import accel
from accel.adapter_files import save
from accel.adapter_hosts import weight_hosts
from accel.low_rank import LowRank, LowRankConfig, Offset


def offsets_for(module: Any, strength: float = 0.1) -> LowRank:
    torch.manual_seed(0)
    found = LowRank(LowRankConfig(type(module).__name__, weight_hosts(module), rank=2))
    for offset in found.offsets.values():
        nn.init.normal_(offset.up, std=strength)
        nn.init.normal_(offset.bend, std=0.5)
    return found.requires_grad_(False)


@pytest.fixture
def wan(tmp_path) -> tuple[Any, torch.Tensor, str]:
    """A tiny pipeline, its latents and a folder of offsets for it."""
    tiny, baseline = built("wan21")
    save(offsets_for(tiny.pipe.transformer), tmp_path, {})
    return tiny, baseline, str(tmp_path)


def weights(module: Any) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(6, 4), torch.randn(3, 5, 6)),
        (nn.Linear(6, 4), torch.randn(3, 6)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(3, 3, 8, 8)),
        (nn.Conv2d(3, 4, 3, dilation=2), torch.randn(3, 3, 8, 8)),
    ],
)
@torch.no_grad()
def test_beside_the_layer_is_in_the_weight(layer, inputs) -> None:
    offset = Offset(list(layer.weight.shape), rank=2)
    nn.init.normal_(offset.up)
    nn.init.normal_(offset.bend)
    shares = torch.tensor([0.2, 0.5, 1.0])
    found = layer(inputs) + offset.beside(layer, inputs, shares)
    plain = layer.weight.clone()
    for row, share in enumerate(shares):
        layer.weight.copy_(plain + offset.change(share))
        assert torch.allclose(found[row], layer(inputs)[row], atol=1e-5)
        assert torch.allclose(found[row], _one(layer, plain, offset, inputs, share)[row], atol=1e-5)
    layer.weight.copy_(plain)


def _one(
    layer: Any, plain: torch.Tensor, offset: Offset, inputs: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """The layer with its own weight and one u for all rows beside it."""
    layer.weight.copy_(plain)
    return layer(inputs) + offset.beside(layer, inputs, share)


def test_rows_folded_with_frames_keep_their_scale() -> None:
    layer, offset = nn.Linear(6, 4), Offset([4, 6], rank=2)
    nn.init.normal_(offset.up)
    inputs, shares = torch.randn(6, 5, 6), torch.tensor([0.2, 1.0])
    # a product of six rows and one of three round differently on some processors
    found = offset.beside(layer, inputs, shares)
    torch.testing.assert_close(found[:3], offset.beside(layer, inputs[:3], shares[0]))
    torch.testing.assert_close(found[3:], offset.beside(layer, inputs[3:], shares[1]))


@pytest.mark.parametrize("name", ["wan21", "sd15", "flux_cfg"])
def test_a_run_by_weights_is_a_run_by_hooks(name, tmp_path) -> None:
    tiny, baseline = built(name)
    module = getattr(tiny.pipe, "unet", None) or tiny.pipe.transformer
    offsets = offsets_for(module)
    save(offsets, tmp_path, {})
    scale = "true_cfg_scale" if name == "flux_cfg" else "guidance_scale"
    offsets.guidance = 3.0
    with offsets.attach(module):
        beside = run(tiny, **{scale: 1.0})
    with accel.patched(tiny.pipe, accel.AGD(str(tmp_path))):
        inside = run(tiny, **{scale: 3.0})
    assert torch.allclose(inside, beside, atol=2e-3 * float(beside.abs().max()))
    assert (inside - baseline).norm() > 10 * (inside - beside).norm()
    assert torch.equal(run(tiny), baseline)


def test_between_runs_the_weights_are_the_models_own(wan) -> None:
    tiny, baseline, folder = wan
    before, during = weights(tiny.pipe.transformer), []

    def see(pipe: Any, *_: Any) -> dict[str, Any]:
        during.append(same(weights(pipe.transformer), before))
        return {}

    with accel.patched(tiny.pipe, accel.AGD(folder)):
        first = run(tiny, callback_on_step_end=see)
        assert same(weights(tiny.pipe.transformer), before)
        assert torch.equal(run(tiny), first)
    assert during and not any(during)
    assert same(weights(tiny.pipe.transformer), before)
    assert torch.equal(run(tiny), baseline)


def test_an_exception_in_a_run_leaves_nothing(wan) -> None:
    tiny, _, folder = wan
    before = weights(tiny.pipe.transformer)

    def fail(*_: Any) -> None:
        raise KeyError("stop")

    with accel.patched(tiny.pipe, accel.AGD(folder)):
        with pytest.raises(KeyError):
            run(tiny, callback_on_step_end=fail)
        assert same(weights(tiny.pipe.transformer), before)


def test_a_change_of_adapters_in_a_run_keeps_the_guidance(wan) -> None:
    """What a run has gathered is dropped then; the offsets come back with the next call."""
    tiny, _, folder = wan

    def forget(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.transformer.enable_lora()
        return {}

    tiny.pipe.transformer.add_adapter(_lora())
    try:
        with accel.patched(tiny.pipe, accel.AGD(folder)):
            assert torch.equal(run(tiny, callback_on_step_end=forget), run(tiny))
    finally:
        tiny.pipe.transformer.unload_lora()


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["to_q"])


def test_quantised_weights_get_them_beside(wan) -> None:
    tiny, _, folder = wan
    with accel.patched(tiny.pipe, accel.AGD(folder)):
        exact = run(tiny)
    small = accel.Linear("int8", least=8, backend="own")
    with accel.patched(tiny.pipe, small, accel.AGD(folder)):
        rounded = run(tiny)
    plain = run(tiny, guidance_scale=1.0)
    assert (rounded - exact).norm() < 0.2 * (plain - exact).norm()


def test_a_denoiser_compiled_whole_is_served(wan) -> None:
    tiny, _, folder = wan
    with accel.patched(tiny.pipe, accel.AGD(folder)):
        eager = run(tiny)
    tiny.pipe.transformer.compile(backend="eager")
    try:
        with accel.patched(tiny.pipe, accel.AGD(folder)):
            assert torch.allclose(run(tiny), eager, atol=1e-5)
            assert not torch.allclose(run(tiny, guidance_scale=2.0), eager, atol=1e-5)
    finally:
        tiny.pipe.transformer._compiled_call_impl = None
        torch._dynamo.reset()


def test_a_host_of_another_shape_is_refused(wan, tmp_path) -> None:
    tiny, baseline, _ = wan
    other = nn.Module()
    other.add_module("proj_out", nn.Linear(3, 3))
    config = LowRankConfig("WanTransformer3DModel", weight_hosts(other), rank=2)
    save(LowRank(config), Path(tmp_path), {})
    with pytest.raises(accel.AccelError, match=r"'proj_out' has \[3, 3\] as its weight's shape"):
        accel.patch(tiny.pipe, accel.AGD(str(tmp_path)))
    assert torch.equal(run(tiny), baseline)


def test_inference_mode_is_no_obstacle(wan) -> None:
    tiny, baseline, folder = wan
    with accel.patched(tiny.pipe, accel.AGD(folder)):
        expected = run(tiny)
        with torch.inference_mode():
            assert torch.equal(run(tiny), expected)
        assert torch.equal(run(tiny), expected)
    assert torch.equal(run(tiny), baseline)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    """Training on a GPU computes blocks again in the backward pass."""
    module = built("wan21")[0].pipe.transformer
    offsets = offsets_for(module).requires_grad_(True)
    offsets.guidance = torch.tensor([2.0, 5.0])
    torch.manual_seed(1)
    config = module.config
    inputs = {
        "hidden_states": torch.randn(2, config.in_channels, 2, 4, 4),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, config.text_dim),
    }
    found = []
    with offsets.attach(module):
        for recompute in (
            module.disable_gradient_checkpointing,
            module.enable_gradient_checkpointing,
        ):
            recompute()
            module(**inputs).sample.square().sum().backward()
            found.append([p.grad.clone() for p in offsets.parameters() if p.grad is not None])
            offsets.zero_grad()
    module.disable_gradient_checkpointing()
    assert found[0]
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(*found, strict=True))


def test_weights_that_come_and_go_are_not_edited(wan) -> None:
    tiny, _, folder = wan
    with accel.patched(tiny.pipe, accel.AGD(folder)):
        expected = run(tiny)
    module = tiny.pipe.transformer
    device = torch.device("cpu")
    module.enable_group_offload(device, device, offload_type="leaf_level")
    before = weights(module)
    kept: list[bool] = []

    def see(pipe: Any, *_: Any) -> dict[str, Any]:
        kept.append(same(weights(pipe.transformer), before))
        return {}

    with accel.patched(tiny.pipe, accel.AGD(folder)):
        beside = run(tiny, callback_on_step_end=see)
    assert kept and all(kept)
    assert torch.allclose(beside, expected, atol=2e-3 * float(expected.abs().max()))
