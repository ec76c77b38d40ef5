"""StreamDiffusion: a stream of frames redrawn by any U-Net text-to-image pipeline.

Kodaira et al., "StreamDiffusion", ICCV 2025. Frames enter one by one; several denoising levels of
successive frames share one network call, similar frames are left out, and reading, drawing and
writing run beside each other with bounded queues between them.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from accel.method import AccelError
from accel.similarity_filter import SimilarityFilter
from accel.stream_batch import Guidance, Levels, StreamBatch
from accel.stream_session import Drawn

if TYPE_CHECKING:
    from numpy.typing import NDArray

TABLE = 50
"""Steps of the table that `indices` look into, as latent consistency models were trained with."""


class StreamPipeline:
    """Redraws frames with `pipe`, a Stable Diffusion 1, 2 or XL pipeline made for few steps.

    Load and fuse a consistency LoRA before. `indices`: levels as places in a table of 50 steps,
    falling noise with rising index; the first sets how much of the frame is redrawn. `guidance` and
    `delta`: see `StreamBatch`; `guidance_scale` ≤ 1 switches it off. `similarity`: a filter that
    leaves out frames like the last. `height`, `width`: of frames, in pixels. Raises `AccelError`
    for pipelines without a U-Net, schedulers without ᾱ and prompts over the token limit.
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str,
        negative_prompt: str = "",
        *,
        height: int,
        width: int,
        indices: Sequence[int] = (32, 45),
        guidance: Guidance = "self",
        guidance_scale: float = 1.2,
        delta: float = 1.0,
        similarity: SimilarityFilter | None = None,
        seed: int = 2,
        together: bool = True,
    ) -> None:
        if getattr(pipe, "unet", None) is None or getattr(pipe, "vae", None) is None:
            raise AccelError(
                f"StreamPipeline needs a text-to-image pipeline with a U-Net, such as "
                f"StableDiffusionPipeline; {type(pipe).__name__} has none"
            )
        factor = pipe.vae_scale_factor
        if min(height, width) < 1 or height % factor or width % factor:
            raise AccelError(
                f"frames of {height}×{width}: both must be positive and divisible by {factor}"
            )
        kind = pipe.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise AccelError(f"prediction_type={kind!r}: epsilon and v_prediction are accepted")
        self.pipe, self.height, self.width = pipe, height, width
        self.similarity = None if similarity is None else dataclasses.replace(similarity)
        self._vae = pipe.vae
        if self._vae.dtype == torch.float16 and self._vae.config.get("force_upcast"):
            self._vae = copy.deepcopy(self._vae).float()  # as the pipeline does for each picture
        self._lock = threading.Lock()
        self._set_prompt(prompt, negative_prompt)
        unet = pipe.unet
        levels = Levels.of(pipe.scheduler, timesteps_at(pipe.scheduler, indices))
        self.batch = StreamBatch(
            self._predict,
            levels.to(unet.device, unet.dtype),
            guidance,
            guidance_scale,
            delta,
            velocity=kind == "v_prediction",
            together=together,
        )
        shape = (1, unet.config.in_channels, height // factor, width // factor)
        self.batch.fix_noise(torch.empty(shape, device=unet.device, dtype=unet.dtype), seed)
        self._entered = 0
        self._frames: deque[tuple[int, bool]] = deque()
        """Numbers of the frames that have not left, the oldest first, and which were left out."""
        self._pictures: deque[NDArray[np.uint8]] = deque()
        """Of frames that are drawn but have not left."""
        self._last: NDArray[np.uint8] | None = None

    # --- frame by frame ------------------------------------------------------------------------

    def step(self, frame: Any) -> Drawn | None:
        """A frame enters: a PIL picture, (height, width, 3) bytes, or (3, height, width) in [0, 1].

        Returns the picture that leaves, of the frame that entered one less than the number of
        levels before, or None while the levels fill. A frame that is left out takes its place in
        the row, with the picture of the frame before it; meanwhile those in flight move on.
        """
        pixels = self._pixels(frame)
        with self._lock:
            left_out = self.similarity is not None and self.similarity.skip(pixels)
            self._frames.append((self._entered, left_out))
            self._entered += 1
            return self._leaving(
                self.batch.advance() if left_out else self.batch.push(self._encode(pixels))
            )

    def drain(self) -> Iterator[Drawn]:
        """The pictures still in flight, without new frames."""
        while self._frames:
            with self._lock:
                drawn = self._leaving(self.batch.advance())
            if drawn is not None:
                yield drawn

    def prompt(self, prompt: str, negative_prompt: str | None = None) -> None:
        """Change the prompt while the stream runs, and the negative one where it is given.

        The next call of the network uses them.
        """
        with self._lock:
            self._set_prompt(prompt, self._negative if negative_prompt is None else negative_prompt)

    def _leaving(self, latent: Tensor | None) -> Drawn | None:
        """The oldest frame, if its picture is there now that `latent` is done."""
        if latent is not None:
            self._pictures.append(self._decode(latent))
        number, repeated = self._frames[0]
        if not repeated:
            if not self._pictures:
                return None
            self._last = self._pictures.popleft()
        self._frames.popleft()
        assert self._last is not None  # the first frame is never left out
        return Drawn(number, self._last, repeated)

    # --- the network ---------------------------------------------------------------------------

    def _set_prompt(self, prompt: str, negative_prompt: str) -> None:
        for text in (prompt, negative_prompt):
            check_length(self.pipe.tokenizer, text)
        with torch.no_grad():
            encoded = self.pipe.encode_prompt(
                prompt=prompt,
                negative_prompt=negative_prompt,
                device=self.pipe.unet.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
        self._negative = negative_prompt
        self._states = torch.cat(encoded[:2])
        self._pooled = torch.cat(encoded[2:]) if len(encoded) == 4 else None

    def _predict(self, latents: Tensor, timesteps: Tensor, negative: Sequence[bool]) -> Tensor:
        rows = torch.tensor([int(each) for each in negative], device=latents.device)
        extra: dict[str, Any] = {}
        if self._pooled is not None:
            size = (self.height, self.width)
            ids = torch.tensor([[*size, 0, 0, *size]], device=latents.device, dtype=latents.dtype)
            pooled = self._pooled[rows]
            extra["added_cond_kwargs"] = {
                "text_embeds": pooled,
                "time_ids": ids.expand(len(rows), -1),
            }
        predicted: Tensor = self.pipe.unet(
            latents,
            timesteps,
            encoder_hidden_states=self._states[rows],
            return_dict=False,
            **extra,
        )[0]
        return predicted

    def _pixels(self, frame: Any) -> Tensor:
        """(3, height, width) in [0, 1]."""
        if isinstance(frame, Tensor):
            pixels = frame.float()
        else:
            array = np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame)
            if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
                raise AccelError(
                    f"a frame of shape {array.shape} and {array.dtype}: accepted are uint8 of "
                    "(height, width, 3), or a tensor (3, height, width) with values in [0, 1]"
                )
            pixels = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
        if tuple(pixels.shape) != (3, self.height, self.width):
            raise AccelError(
                f"a frame of shape {tuple(pixels.shape)}: this stream takes "
                f"(3, {self.height}, {self.width})"
            )
        return pixels

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        vae = self._vae
        image = (pixels[None] * 2 - 1).to(vae.device, vae.dtype)
        latent: Tensor = vae.encode(image).latent_dist.mode() * vae.config.scaling_factor
        return latent.to(self.pipe.unet.dtype)

    @torch.no_grad()
    def _decode(self, latent: Tensor) -> NDArray[np.uint8]:
        vae = self._vae
        image = vae.decode(latent.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        if not image.isfinite().all():
            raise AccelError("the stream made values that are not finite")
        pixels = (image[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
        array: NDArray[np.uint8] = pixels.round().to(torch.uint8).cpu().numpy()
        return array


def timesteps_at(scheduler: Any, indices: Sequence[int]) -> list[int]:
    """Timesteps of places in a table of 50 falling steps, as consistency models were trained."""
    count = scheduler.config.num_train_timesteps
    table = [count // TABLE * (place + 1) - 1 for place in reversed(range(TABLE))]
    if not indices or not all(isinstance(i, int) and 0 <= i < TABLE for i in indices):
        raise AccelError(f"indices={tuple(indices)}: whole numbers from 0 to {TABLE - 1}")
    return [table[index] for index in indices]


def check_length(tokenizer: Any, text: str) -> None:
    """Raise `AccelError` when a prompt has more tokens than the text encoder reads."""
    count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
    if count > tokenizer.model_max_length:
        raise AccelError(
            f"the prompt {text[:40]!r}… has {count} tokens; the text encoder reads "
            f"{tokenizer.model_max_length}"
        )
