"""What the tiny pipelines are made of: their type, how they run, small encoders and tokenizers."""

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


def finish(pipe: Any, **call: Any) -> Tiny:
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


def seeded(build: Callable[[], Tiny]) -> Callable[[], Tiny]:
    @functools.wraps(build)
    def seeded() -> Tiny:
        torch.manual_seed(0)
        return build()

    return seeded


def clip(hidden: int = 32, projection: bool = False) -> Any:
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


def clip_tokenizer() -> Any:
    alphabet = [chr(33 + index) for index in range(256)]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    return t.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5(umt5: bool = False) -> Any:
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


def t5_tokenizer(length: int = 16) -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS.strip()]
    return t.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def vae(channels: int = 4, **settings: Any) -> Any:
    return d.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **settings,
    )
