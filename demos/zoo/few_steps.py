"""What both few-step students of `emoji-unet` learn from: encoded pictures and a guided teacher."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Generator, Tensor

from accel import model_zoo
from demos.zoo import data, emoji_unet, images, train

PICTURES = 4096
GUIDANCE = 4.0


class Teacher:
    """The frozen model: pictures as latents with their captions, and one guided DDIM step.

    `states` holds the text states of the captions learned from, (PICTURES + 1, length, 128); the
    last row is the empty prompt.
    """

    def __init__(self) -> None:
        self.pipe, _, _ = model_zoo.load("emoji-unet")
        self.unet = self.pipe.unet.requires_grad_(False).eval()
        self.kept = self.pipe.scheduler.alphas_cumprod
        self.latents, captions = self._encoded()
        ids = self.pipe.tokenizer(
            [*captions, ""], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            self.states = torch.cat([self.pipe.text_encoder(part)[0] for part in ids.split(64)])

    @torch.no_grad()
    def _encoded(self) -> tuple[Tensor, list[str]]:
        """Latents (PICTURES, 12, 16, 16) of pictures of training captions; cached."""
        file = train.CHECKPOINTS / "emoji-unet-few-steps-latents.pt"
        if file.exists():
            saved = torch.load(file, weights_only=True)
            return saved["latents"], saved["captions"]
        generator, pictures = Generator().manual_seed(21), data.sprites()
        latents: list[Tensor] = []
        captions: list[str] = []
        for _ in range(PICTURES // 64):
            drawn, called = images.drawn(pictures, 64, emoji_unet.SIZE, generator)
            latents.append(self.pipe.vae.encode(drawn).latent_dist.mode())
            captions += called
        found = torch.cat(latents) * self.pipe.vae.config.scaling_factor
        train.CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": found, "captions": captions}, file)
        return found, captions

    def batch(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Clean latents and their captions as rows of `states`."""
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        return self.latents[rows], rows

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at timesteps (n,), as (n, 1, 1, 1); the timestep -1 has no noise left."""
        kept = torch.where(timesteps < 0, 1.0, self.kept[timesteps.clamp(min=0)])[
            :, None, None, None
        ]
        return kept.sqrt(), (1 - kept).sqrt()

    def noised(self, clean: Tensor, timesteps: Tensor, generator: Generator) -> Tensor:
        """Clean latents with fresh noise of their timesteps."""
        alpha, sigma = self.levels(timesteps)
        return alpha * clean + sigma * torch.randn(clean.shape, generator=generator)

    @torch.no_grad()
    def guided(self, noisy: Tensor, timesteps: Tensor, prompt: Tensor, negative: Tensor) -> Tensor:
        """The guided noise estimate."""
        both = self.unet(
            torch.cat((noisy, noisy)), timesteps.repeat(2), torch.cat((negative, prompt))
        ).sample
        uncond, cond = both.chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    def solved(
        self, noisy: Tensor, path: list[int], prompt: Tensor, negative: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Guided DDIM from path[0] to path[-1]: the latents at every place, the noise estimates."""
        latents, estimates = [noisy], []
        for place, following in itertools.pairwise(path):
            here, there = (torch.full((len(noisy),), each) for each in (place, following))
            estimates.append(self.guided(latents[-1], here, prompt, negative))
            latents.append(self.moved(latents[-1], estimates[-1], here, there))
        return latents, estimates

    def moved(self, noisy: Tensor, noise: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
        """One DDIM step from `timesteps` to `earlier`."""
        alpha, sigma = self.levels(earlier)
        return alpha * self.clean(noisy, noise, timesteps) + sigma * noise

    def clean(self, noisy: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The clean estimate that belongs to a noise estimate."""
        alpha, sigma = self.levels(timesteps)
        return (noisy - sigma * noise) / alpha


def judged(pipes: dict[str, Any], part: str, seeds: int) -> dict[str, dict[str, float]]:
    """Colour, caption and KID scores of calls `{label: (pipe, arguments)}` on one prompt file."""
    from demos.zoo import evaluate

    lines = model_zoo.prompts("emoji-unet", part).read_text().splitlines() * seeds  # type: ignore[arg-type]
    judge = evaluate.CaptionClassifier(emoji_unet.SIZE, frames=1, names=data.NAMES)
    real = evaluate.reference_features(emoji_unet.SIZE, frames=1, names=data.NAMES)
    found = {}
    for label, (pipe, arguments) in pipes.items():
        clips = evaluate.generated_clips(pipe, arguments, lines)
        found[label] = evaluate.scores(clips, lines, judge, real)
        print(label, found[label], flush=True)
    return found
