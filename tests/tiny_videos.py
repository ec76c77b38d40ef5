"""The smallest random-weight pipeline of each family that makes videos."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as t
from tiny_parts import LETTERS, Tiny, clip, clip_tokenizer, finish, seeded, t5, t5_tokenizer, vae


def _wan_vae() -> Any:
    return d.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )


def _wan_transformer() -> Any:
    return d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def _wan(**components: Any) -> Tiny:
    pipe = d.WanPipeline(
        transformer=_wan_transformer(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_wan_vae(),
        text_encoder=t5(umt5=True),
        tokenizer=t5_tokenizer(),
        **components,
    )
    size = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    return finish(pipe, negative_prompt="dog", **size)


@seeded
def wan21() -> Tiny:
    return _wan()


@seeded
def wan22() -> Tiny:
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


@seeded
def hunyuan_video() -> Tiny:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
    )
    llama = t.LlamaModel(
        t.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=37,
            num_hidden_layers=4,
            num_attention_heads=4,
            pad_token_id=0,
        )
    )
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
    vocabulary |= {letter: 4 + index for index, letter in enumerate(LETTERS.strip())}
    tokenizer = t.LlamaTokenizer(vocab=vocabulary, merges=[])
    tokenizer.pad_token = "</s>"
    pipe = d.HunyuanVideoPipeline(
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=d.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        text_encoder=llama,
        tokenizer=tokenizer,
        text_encoder_2=clip(),
        tokenizer_2=clip_tokenizer(),
    )
    return finish(
        pipe,
        height=32,
        width=32,
        num_frames=5,
        max_sequence_length=16,
        prompt_template={"template": "{}", "crop_start": 0},
    )


@seeded
def cogvideox() -> Tiny:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=4,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
    )
    pipe = d.CogVideoXPipeline(
        transformer=transformer,
        scheduler=d.DDIMScheduler(),
        vae=d.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    size = {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}
    return finish(pipe, negative_prompt="dog", **size)


@seeded
def ltx() -> Tiny:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=32,
    )
    vae = d.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    pipe = d.LTXPipeline(
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    size = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
    return finish(pipe, negative_prompt="dog", **size)


@seeded
def mochi() -> Tiny:
    transformer = d.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    pipe = d.MochiPipeline(
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=d.AutoencoderKLMochi(
            latent_channels=12,
            out_channels=3,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    size = {"height": 16, "width": 16, "num_frames": 7, "max_sequence_length": 16}
    return finish(pipe, negative_prompt="dog", **size)


@seeded
def latte() -> Tiny:
    transformer = d.LatteTransformer3DModel(
        sample_size=8,
        num_layers=3,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    pipe = d.LattePipeline(
        transformer=transformer,
        scheduler=d.DDIMScheduler(),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    call = {"height": 16, "width": 16, "video_length": 4, "negative_prompt": "dog"}
    return finish(pipe, clean_caption=False, **call)
