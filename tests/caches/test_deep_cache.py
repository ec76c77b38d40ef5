"""DeepCache against its definition: the feature that enters the up path is the old one."""

import pytest
import torch
from tiny_pipelines import TINY, built, run

import accel
from accel.pipelines.unet import layers, spans


def replayed(tiny, interval: int, branch: int) -> torch.Tensor:
    """A run in full whose feature at skip connection `branch` is overwritten on reuse steps."""
    unet = tiny.pipe.unet
    resnet = [part for block in unet.up_blocks for part in block.resnets][-1 - branch]
    skip = unet.conv_in if branch == 0 else unet.down_blocks[0].resnets[branch - 1]
    width = resnet.in_channels - skip.out_channels
    held: list[torch.Tensor] = []
    calls: list[int] = []

    def enter(_, args):
        joined, *rest = args
        if len(calls) % interval == 0:
            held[:] = [joined[:, :width]]
        calls.append(1)
        return (torch.cat((held[0], joined[:, width:]), 1), *rest)

    hook = resnet.register_forward_pre_hook(enter)
    try:
        return run(tiny)
    finally:
        hook.remove()


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_reuse_equals_its_definition(family, interval, branch) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, accel.DeepCache(interval, branch)):
        result = run(tiny)
    expected = replayed(tiny, interval, branch)
    assert float((result - expected).abs().max() / expected.abs().max()) < 2e-5


def test_deeper_connections_leave_more_layers_in() -> None:
    unet = TINY["sd15"]().pipe.unet
    found = spans(unet)
    lengths = [stop - start for start, stop in found]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] > 0
    assert len(found) == sum(len(block.resnets) for block in unet.up_blocks)


def test_unknown_blocks_make_no_chain() -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    )
    assert layers(unet) == []


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"branch": -1}])
def test_wrong_settings_are_named(wrong) -> None:
    with pytest.raises(accel.AccelError, match=next(iter(wrong))):
        accel.DeepCache(**wrong)


def test_a_connection_that_is_not_there_is_named() -> None:
    tiny, _ = built("sd15")
    with pytest.raises(accel.AccelError, match="branch must be below"):
        accel.patch(tiny.pipe, accel.DeepCache(branch=99))


def test_probe_across_a_change_of_shape_is_named() -> None:
    tiny, _ = built("sd15")
    with (
        accel.patched(tiny.pipe, accel.FirstBlockCache(probe_blocks=4)),
        pytest.raises(accel.AccelError, match="change the shape"),
    ):
        run(tiny)
