"""The smallest random-weight pipeline of each family that makes pictures."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as t
from tiny_parts import Tiny, clip, clip_tokenizer, finish, seeded, t5, t5_tokenizer, vae


def _flux(**call: Any) -> Tiny:
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.0, scaling_factor=1.0),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )
    return finish(pipe, height=16, width=16, max_sequence_length=16, **call)


@seeded
def flux() -> Tiny:
    return _flux()


@seeded
def flux_cfg() -> Tiny:
    return _flux(negative_prompt="dog", true_cfg_scale=3.0)


@seeded
def sd3() -> Tiny:
    transformer = d.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    pipe = d.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.0, scaling_factor=1.0),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )
    return finish(pipe, height=16, width=16, max_sequence_length=16, negative_prompt="dog")


@seeded
def pixart() -> Tiny:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        use_additional_conditions=False,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    pipe = d.PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=d.DPMSolverMultistepScheduler(),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    call = {"height": 16, "width": 16, "max_sequence_length": 16, "negative_prompt": "dog"}
    return finish(pipe, use_resolution_binning=False, clean_caption=False, **call)


@seeded
def qwen_image() -> Tiny:
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    config = t.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
            "vocab_size": 300,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        hidden_size=16,
        vocab_size=300,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {symbol: index for index, symbol in enumerate(bytes_to_unicode().values())}
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocabulary[special] = len(vocabulary)
    pipe = d.QwenImagePipeline(
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=d.AutoencoderKLQwenImage(
            base_dim=24,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=t.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=t.Qwen2Tokenizer(vocab=vocabulary, merges=[]),
    )
    size = {"height": 32, "width": 32, "max_sequence_length": 400}
    return finish(pipe, negative_prompt="dog", true_cfg_scale=3.0, **size)


@seeded
def dit() -> Tiny:
    transformer = d.DiTTransformer2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = d.DiTPipeline(transformer=transformer, vae=vae(), scheduler=d.DDIMScheduler())
    tiny = finish(pipe, class_labels=[5])
    # DiTPipeline always decodes: "np" is the rawest output that it offers
    call = {key: value for key, value in tiny.call.items() if key != "prompt"}
    return Tiny(pipe, call | {"output_type": "np"})


def _unet(**settings: Any) -> Any:
    return d.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **settings,
    )


@seeded
def sd15() -> Tiny:
    pipe = d.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=_unet(cross_attention_dim=32, attention_head_dim=2),
        scheduler=d.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return finish(pipe, height=16, width=16, negative_prompt="dog")


@seeded
def sdxl() -> Tiny:
    unet = _unet(
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )
    pipe = d.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=d.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return finish(pipe, height=16, width=16, negative_prompt="dog")
