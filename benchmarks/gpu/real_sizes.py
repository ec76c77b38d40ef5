"""Large models at the size of their published configurations, with random weights and embeddings.

Nothing is downloaded: the denoiser is built where it runs, text encoders and VAE are left out.
A smoke run keeps classes and calls, and makes everything narrow and shallow.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RealSize:
    """A pipeline, the settings of its denoiser and of a call."""

    pipeline: str
    denoiser: str
    settings: dict[str, Any]
    """What the published configuration changes in the defaults of the class."""
    embeddings: Shapes
    """Arguments of the call that are random tensors."""
    call: dict[str, Any]
    small: dict[str, Any]
    """Settings of a smoke run."""
    small_embeddings: Shapes
    small_call: dict[str, Any]
    masks: dict[str, str] = field(default_factory=dict)
    """Arguments of the call that are all ones, one for each token of the embedding named."""
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    branches: bool = True
    """Whether guidance runs the denoiser on two branches."""

    def build_denoiser(self, settings: dict[str, Any], device: str) -> nn.Module:
        """Random weights, made on the device: float32 on a CPU, otherwise bfloat16."""
        usual = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
        try:
            with torch.device(device):
                denoiser: nn.Module = getattr(diffusers, self.denoiser)(**settings)
        finally:
            torch.set_default_dtype(usual)
        return denoiser.eval().requires_grad_(False)

    def build(self, device: str) -> tuple[Any, dict[str, Any]]:
        """The pipeline and the arguments of a call; small where the device is a CPU."""
        smoke = device == "cpu"
        denoiser = self.build_denoiser(self.small if smoke else self.settings, device)
        shapes = self.small_embeddings if smoke else self.embeddings
        like = {"device": device, "dtype": torch.float32 if smoke else torch.bfloat16}
        call: dict[str, Any] = {name: torch.randn(shape, **like) for name, shape in shapes.items()}
        call |= {name: torch.ones(shapes[of][:2], **like) for name, of in self.masks.items()}
        pipeline = getattr(diffusers, self.pipeline)
        wanted = inspect.signature(pipeline).parameters.values()
        parts = {each.name: None for each in wanted if each.default is each.empty}
        parts["unet" if "unet" in parts else "transformer"] = denoiser
        parts["scheduler"] = getattr(diffusers, self.scheduler)()
        pipe = pipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe, call | (self.small_call if smoke else self.call)


def both(shapes: Shapes) -> Shapes:
    """The same for the negative prompt."""
    return shapes | {f"negative_{name}": shape for name, shape in shapes.items()}


WAN_SMALL: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 4,
}


def wan(settings: dict[str, Any]) -> RealSize:
    """Wan 2.1 at 480p, 81 frames: 32,760 tokens."""
    return RealSize(
        "WanPipeline",
        "WanTransformer3DModel",
        settings,
        both({"prompt_embeds": (1, 512, 4096)}),
        {"height": 480, "width": 832, "num_frames": 81},
        WAN_SMALL,
        both({"prompt_embeds": (1, 16, 32)}),
        {"height": 32, "width": 32, "num_frames": 5},
    )


MODELS = {
    "FLUX.1-dev, 1024x1024": RealSize(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {"prompt_embeds": (1, 512, 4096), "pooled_prompt_embeds": (1, 768)},
        {"height": 1024, "width": 1024},
        {
            "num_layers": 3,
            "num_single_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "guidance_embeds": True,
        },
        {"prompt_embeds": (1, 16, 32), "pooled_prompt_embeds": (1, 32)},
        {"height": 64, "width": 64},
        branches=False,
    ),
    "SD3.5-large, 1024x1024": RealSize(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        both({"prompt_embeds": (1, 333, 4096), "pooled_prompt_embeds": (1, 2048)}),
        {"height": 1024, "width": 1024},
        {
            "num_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 64,
        },
        both({"prompt_embeds": (1, 16, 32), "pooled_prompt_embeds": (1, 64)}),
        {"height": 64, "width": 64},
    ),
    "SDXL, 1024x1024": RealSize(
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        both({"prompt_embeds": (1, 77, 2048), "pooled_prompt_embeds": (1, 1280)}),
        {"height": 1024, "width": 1024},
        {
            "sample_size": 8,
            "block_out_channels": (8, 128),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 32,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        both({"prompt_embeds": (1, 16, 32), "pooled_prompt_embeds": (1, 32)}),
        {"height": 64, "width": 64},
        scheduler="EulerDiscreteScheduler",
    ),
    "Wan 2.1 1.3B, 480x832x81": wan(
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "LTX-Video, 512x704x161": RealSize(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {},
        both({"prompt_embeds": (1, 128, 4096)}),
        {"height": 512, "width": 704, "num_frames": 161},
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "cross_attention_dim": 128,
            "num_layers": 4,
            "caption_channels": 32,
        },
        both({"prompt_embeds": (1, 16, 32)}),
        {"height": 64, "width": 64, "num_frames": 9},
        masks={
            "prompt_attention_mask": "prompt_embeds",
            "negative_prompt_attention_mask": "negative_prompt_embeds",
        },
    ),
    "CogVideoX-5B, 480x720x49": RealSize(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
        both({"prompt_embeds": (1, 226, 4096)}),
        {"height": 480, "width": 720, "num_frames": 49},
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "time_embed_dim": 2,
            "text_embed_dim": 32,
            "num_layers": 4,
            "sample_width": 8,
            "sample_height": 8,
            "max_text_seq_length": 16,
            "use_rotary_positional_embeddings": True,
        },
        both({"prompt_embeds": (1, 16, 32)}),
        {"height": 64, "width": 64, "num_frames": 9},
        scheduler="CogVideoXDDIMScheduler",
    ),
    "Qwen-Image, 1328x1328": RealSize(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {},
        both({"prompt_embeds": (1, 128, 3584)}),
        {"height": 1328, "width": 1328, "true_cfg_scale": 4.0},
        {
            "num_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 12, 12),
        },
        both({"prompt_embeds": (1, 16, 16)}),
        {"height": 64, "width": 64, "true_cfg_scale": 4.0},
        masks={
            "prompt_embeds_mask": "prompt_embeds",
            "negative_prompt_embeds_mask": "negative_prompt_embeds",
        },
    ),
    "Wan 2.1 14B, 480x832x81": wan({}),
    "HunyuanVideo, 544x960x61": RealSize(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {},
        {"prompt_embeds": (1, 256, 4096), "pooled_prompt_embeds": (1, 768)},
        {"height": 544, "width": 960, "num_frames": 61},
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 3,
            "num_single_layers": 3,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (8, 12, 12),
        },
        {"prompt_embeds": (1, 16, 16), "pooled_prompt_embeds": (1, 32)},
        {"height": 64, "width": 64, "num_frames": 5},
        masks={"prompt_attention_mask": "prompt_embeds"},
        branches=False,
    ),
}
"""In the order of measuring: light ones first."""
