"""Tiny pipelines of models that no family file describes, called with random prompt embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from tiny_parts import Tiny, clip, clip_tokenizer, finish, run, seeded, t5, t5_tokenizer, vae


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _flow() -> Any:
    return d.FlowMatchEulerDiscreteScheduler()


@seeded
def flux2() -> Tiny:
    """Two calls; the text is put before the picture's tokens for the single-stream blocks."""
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    coder = d.AutoencoderKLFlux2(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = d.Flux2KleinPipeline(_flow(), coder, None, None, transformer)
    embeds = {"prompt_embeds": _random(1, 6, 16), "negative_prompt_embeds": _random(1, 5, 16)}
    return finish(pipe, prompt=None, guidance_scale=3.0, height=16, width=16, **embeds)


@seeded
def chroma() -> Tiny:
    """Two calls; text first as in FLUX.2, and blocks that take slices of one modulation."""
    transformer = d.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    coder = vae(shift_factor=0.0, scaling_factor=1.0)
    pipe = d.ChromaPipeline(_flow(), coder, t5(), t5_tokenizer(), transformer)
    return finish(pipe, negative_prompt="dog", height=16, width=16, max_sequence_length=16)


@seeded
def z_image() -> Tiny:
    """One call with lists of latents and captions, the conditional half first."""
    transformer = d.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.ones_(token)  # made by torch.empty
    coder = vae(shift_factor=0.0, scaling_factor=1.0)
    pipe = d.ZImagePipeline(_flow(), coder, None, None, transformer)
    embeds = {"prompt_embeds": [_random(6, 16)], "negative_prompt_embeds": [_random(5, 16)]}
    return finish(pipe, prompt=None, guidance_scale=3.0, height=16, width=16, **embeds)


@seeded
def hunyuan_video15() -> Tiny:
    """One call for each branch of a guider."""
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    coder = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipe = d.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=coder,
        scheduler=_flow(),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=d.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    embeds: dict[str, Any] = {}
    for kind in ("", "negative_"):
        embeds[f"{kind}prompt_embeds"] = _random(1, 6 + len(kind), 16)
        embeds[f"{kind}prompt_embeds_mask"] = torch.ones(1, 6 + len(kind), dtype=torch.long)
        embeds[f"{kind}prompt_embeds_2"] = _random(1, 4, 32)
        embeds[f"{kind}prompt_embeds_mask_2"] = torch.ones(1, 4, dtype=torch.long)
    return finish(pipe, prompt=None, height=16, width=16, num_frames=5, **embeds)


@seeded
def cogview4() -> Tiny:
    """Two calls; each block calls one feed-forward layer for the picture and for the text."""
    transformer = d.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    pipe = d.CogView4Pipeline(None, None, vae(), transformer, _flow())
    embeds = {"prompt_embeds": _random(1, 8, 32), "negative_prompt_embeds": _random(1, 8, 32)}
    return finish(pipe, prompt=None, guidance_scale=3.0, height=16, width=16, **embeds)


@seeded
def aura_flow() -> Tiny:
    """Both branches in a call; joint blocks, then single ones of text and picture together."""
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    coder, scheduler = vae(scaling_factor=1.0), _flow()
    pipe = d.AuraFlowPipeline(t5_tokenizer(), t5(), coder, transformer, scheduler)
    mask = torch.ones(1, 6, dtype=torch.long)
    embeds = {f"{kind}prompt_embeds": _random(1, 6, 32) for kind in ("", "negative_")}
    masks = {f"{kind}prompt_attention_mask": mask for kind in ("", "negative_")}
    return finish(pipe, prompt=None, height=16, width=16, **embeds, **masks)


@seeded
def hidream() -> Tiny:
    """Both branches in a call; every block gets text of its own, joined after the picture."""
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1, 0, 1),
    )
    pipe = d.HiDreamImagePipeline(
        scheduler=_flow(),
        vae=vae(scaling_factor=1.0, shift_factor=0.0),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
        text_encoder_4=None,
        tokenizer_4=t5_tokenizer(),
        transformer=transformer,
    )
    pipe.default_sample_size = 8  # it makes pictures of this many pixels, whatever is asked for
    embeds: dict[str, Any] = {}
    for place, kind in enumerate(("", "negative_")):
        embeds[f"{kind}prompt_embeds_t5"] = _random(1, 6, 32) + place
        embeds[f"{kind}prompt_embeds_llama3"] = _random(2, 1, 6, 16) + place
        embeds[f"{kind}pooled_prompt_embeds"] = _random(1, 64) + place
    return finish(pipe, prompt=None, height=16, width=16, **embeds)


@seeded
def ltx2() -> Tiny:
    """Both branches in a call that makes two predictions, of the picture and of its sound."""
    transformer = d.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=3,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    coder = d.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    )
    sound = d.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    pipe = d.LTX2Pipeline(
        _flow(), coder, sound, None, None, connectors, transformer, vocoder, None, None
    )
    mask = torch.ones(1, 6, dtype=torch.long)
    text = _random(1, 6, 48)
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": -text}
    masks = {f"{kind}prompt_attention_mask": mask for kind in ("", "negative_")}
    size = {"height": 32, "width": 32, "num_frames": 5}
    other = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0}
    other |= {"audio_modality_scale": 1.0, "guidance_scale": 3.0, "use_cross_timestep": False}
    return finish(pipe, prompt=None, **size, **embeds, **masks, **other)


OTHERS: dict[str, Callable[[], Tiny]] = {
    build.__name__: build
    for build in (flux2, chroma, z_image, hunyuan_video15, cogview4, aura_flow, hidream, ltx2)
}


@functools.cache
def other(name: str) -> tuple[Tiny, torch.Tensor]:
    """One pipeline for the whole session, and its untouched latents of seed 0."""
    tiny = OTHERS[name]()
    return tiny, run(tiny)
