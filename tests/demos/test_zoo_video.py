"""What the training of emoji-video adds: clips whose speed changes, and token routing."""

import pytest
import torch
from tiny_pipelines import TINY

from demos.zoo import data, emoji_video, emoji_video_vae
from demos.zoo.routing import Routing


def test_fast_pairs_show_the_same_motion_in_fewer_frames() -> None:
    still = torch.zeros(emoji_video.PAIRS, dtype=torch.bool)
    times = emoji_video.frame_times(still)
    torch.testing.assert_close(times[None], data.even_times(emoji_video_vae.FRAMES))
    quick = still.clone()
    quick[1] = True
    fewer = emoji_video.frame_times(quick)
    assert len(fewer) == len(times) - 2
    torch.testing.assert_close(fewer[:5], times[:5])
    torch.testing.assert_close(fewer[7:], times[9:])
    torch.testing.assert_close(fewer[5:7], times[5:9].unflatten(0, (2, 2)).mean(1))


def test_latents_of_clips_that_the_vae_cannot_take_whole() -> None:
    vae = emoji_video_vae.autoencoder().eval()
    clips = torch.randn(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = emoji_video_vae.encoded(vae, clips)
        part = emoji_video_vae.encoded(vae, clips[:, :, :7])
    assert whole.shape == (2, emoji_video_vae.LATENT, 5, 8, 8)
    assert torch.equal(part, whole[:, :, :4])


@pytest.mark.parametrize("changed", ["kept", "skipped"])
def test_routed_blocks_see_half_of_the_tokens_and_leave_the_others_alone(changed) -> None:
    model = TINY["wan21"]().pipe.transformer
    routing = Routing([*model.blocks[1:3]], torch.Generator().manual_seed(0))
    seen: list[torch.Size] = []
    for block in model.blocks:
        block.attn1.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    clip = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"timestep": torch.tensor([10, 500]), "encoder_hidden_states": torch.ones(2, 3, 32)}
    plain = model(clip, **call).sample
    assert [shape[1] for shape in seen] == [48] * 4
    routing.active = True
    after: list[torch.Tensor] = []
    model.blocks[3].register_forward_pre_hook(lambda _, args: after.append(args[0]))
    routed = model(clip, **call).sample
    assert [shape[1] for shape in seen[4:]] == [48, 24, 24, 48]
    assert not torch.allclose(routed, plain)
    rest = torch.ones(48, dtype=torch.bool)
    rest[routing.kept] = False
    tokens = rest if changed == "skipped" else ~rest
    same = torch.equal(routing.waiting[:, tokens], after[0][:, tokens])
    assert same == (changed == "skipped")
    routing.active = False
    assert torch.equal(model(clip, **call).sample, plain)
