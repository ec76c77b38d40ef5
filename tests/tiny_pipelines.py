"""The smallest random-weight pipeline of each family, built in memory, run from a prompt.

Random weights prove correctness, never quality.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as d
import torch
import transformers as t
from torch import nn

LETTERS = "abcdefghijklmnopqrstuvwxyz "
STEPS = 8


@dataclass(frozen=True)
class Tiny:
    """A pipeline and the arguments of a call that makes latents."""

    pipe: Any
    call: dict[str, Any]


def run(tiny: Tiny, seed: int = 0, **changes: Any) -> torch.Tensor:
    """The latents of one call."""
    generator = torch.Generator().manual_seed(seed)
    out = tiny.pipe(**{**tiny.call, "generator": generator, **changes})
    result = out.frames if hasattr(out, "frames") else out.images
    return torch.as_tensor(result)


def _finish(pipe: Any, **call: Any) -> Tiny:
    """Evaluation mode everywhere, no progress bar, zero-initialised outputs made lively."""
    torch.manual_seed(1)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
            for parameter in component.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    pipe.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": STEPS, "output_type": "latent"}
    return Tiny(pipe, {"prompt": "a cat", **common, **call})


def _seeded(build: Callable[[], Tiny]) -> Callable[[], Tiny]:
    @functools.wraps(build)
    def seeded() -> Tiny:
        torch.manual_seed(0)
        return build()

    return seeded


def _clip(hidden: int = 32, projection: bool = False) -> Any:
    config = t.CLIPTextConfig(
        vocab_size=520,
        hidden_size=hidden,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        projection_dim=hidden,
    )
    return (t.CLIPTextModelWithProjection if projection else t.CLIPTextModel)(config)


def _clip_tokenizer() -> Any:
    alphabet = [chr(33 + index) for index in range(256)]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    return t.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _t5(umt5: bool = False) -> Any:
    settings = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    if umt5:
        return t.UMT5EncoderModel(t.UMT5Config(**settings))
    return t.T5EncoderModel(t.T5Config(**settings))


def _t5_tokenizer(length: int = 16) -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS.strip()]
    return t.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def _vae(channels: int = 4, **settings: Any) -> Any:
    return d.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **settings,
    )


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
        vae=_vae(shift_factor=0.0, scaling_factor=1.0),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )
    return _finish(pipe, height=16, width=16, max_sequence_length=16, **call)


@_seeded
def flux() -> Tiny:
    return _flux()


@_seeded
def flux_cfg() -> Tiny:
    return _flux(negative_prompt="dog", true_cfg_scale=3.0)


@_seeded
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
        vae=_vae(shift_factor=0.0, scaling_factor=1.0),
        text_encoder=_clip(projection=True),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(projection=True),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
    )
    return _finish(pipe, height=16, width=16, max_sequence_length=16, negative_prompt="dog")


@_seeded
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
        vae=_vae(),
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
    )
    call = {"height": 16, "width": 16, "max_sequence_length": 16, "negative_prompt": "dog"}
    return _finish(pipe, use_resolution_binning=False, clean_caption=False, **call)


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
        text_encoder=_t5(umt5=True),
        tokenizer=_t5_tokenizer(),
        **components,
    )
    size = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    return _finish(pipe, negative_prompt="dog", **size)


@_seeded
def wan21() -> Tiny:
    return _wan()


@_seeded
def wan22() -> Tiny:
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


@_seeded
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
        text_encoder_2=_clip(),
        tokenizer_2=_clip_tokenizer(),
    )
    return _finish(
        pipe,
        height=32,
        width=32,
        num_frames=5,
        max_sequence_length=16,
        prompt_template={"template": "{}", "crop_start": 0},
    )


@_seeded
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
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
    )
    size = {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}
    return _finish(pipe, negative_prompt="dog", **size)


@_seeded
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
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
    )
    size = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
    return _finish(pipe, negative_prompt="dog", **size)


@_seeded
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
    return _finish(pipe, negative_prompt="dog", true_cfg_scale=3.0, **size)


@_seeded
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
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
    )
    size = {"height": 16, "width": 16, "num_frames": 7, "max_sequence_length": 16}
    return _finish(pipe, negative_prompt="dog", **size)


@_seeded
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
        vae=_vae(),
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
    )
    call = {"height": 16, "width": 16, "video_length": 4, "negative_prompt": "dog"}
    return _finish(pipe, clean_caption=False, **call)


@_seeded
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
    pipe = d.DiTPipeline(transformer=transformer, vae=_vae(), scheduler=d.DDIMScheduler())
    tiny = _finish(pipe, class_labels=[5])
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


@_seeded
def sd15() -> Tiny:
    pipe = d.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        unet=_unet(cross_attention_dim=32, attention_head_dim=2),
        scheduler=d.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _finish(pipe, height=16, width=16, negative_prompt="dog")


@_seeded
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
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(projection=True),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=d.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return _finish(pipe, height=16, width=16, negative_prompt="dog")


TINY: dict[str, Callable[[], Tiny]] = {
    build.__name__: build
    for build in (
        flux,
        flux_cfg,
        sd3,
        pixart,
        wan21,
        wan22,
        hunyuan_video,
        cogvideox,
        ltx,
        qwen_image,
        mochi,
        latte,
        dit,
        sd15,
        sdxl,
    )
}

MATRIX: dict[tuple[str, str], str] = {}
"""(method, family) → what the contract tests saw; printed at the end of the run."""


SHARED: dict[str, Any] = {}


@functools.cache
def built(name: str) -> tuple[Tiny, torch.Tensor]:
    """One pipeline of a family for the whole session, and its untouched latents of seed 0."""
    tiny = TINY[name]()
    SHARED[name] = tiny.pipe
    return tiny, run(tiny)


def left_behind() -> list[str]:
    """Hooks and replaced steps that a test left on the shared pipelines."""
    found = [name for name, pipe in SHARED.items() if "step" in vars(pipe.scheduler)]
    for name, pipe in SHARED.items():
        for part in ("transformer", "transformer_2", "unet"):
            denoiser = getattr(pipe, part, None)
            for place, module in denoiser.named_modules() if denoiser is not None else ():
                if module._forward_pre_hooks or module._forward_hooks:
                    found.append(f"{name}: {place}")
    return found
