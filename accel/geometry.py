"""The grid that a denoiser's tokens lie on, and how noisy each step of a schedule is."""

from __future__ import annotations

import math
from typing import Any

import torch

from accel.family import Arguments, Family

Grid = tuple[int, int, int]
_MARGIN = 1e-4


def token_grid(module: Any, family: Family, arguments: Arguments) -> Grid:
    """(frames, rows, columns) of the hidden states' tokens, frames outermost in memory.

    From the family's own rule, or the latent's shape and the patch size; packed latents whose
    pipeline passes `num_frames`, `height` and `width` say it themselves.
    """
    if family.grid is not None:
        return family.grid(arguments)
    if isinstance(arguments.get("height"), int):
        frames = arguments.get("num_frames") or 1
        return (frames, arguments.get("height"), arguments.get("width"))
    latent = arguments.get(family.latent)
    shape = torch.Size((len(latent), *latent[0].shape))  # Z-Image has a list of them
    config = module.config
    sizes = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", (1,))[0]
    if isinstance(sizes, int):
        sizes = (getattr(config, "patch_size_t", None) or 1, sizes, sizes)
    frames = 1 if len(shape) == 4 else shape[1 if family.frames_first else 2]
    return (frames // sizes[0], shape[-2] // sizes[1], shape[-1] // sizes[2])


def picture_start(family: Family, arguments: Arguments, tokens: int, grid: Grid) -> int | None:
    """The first of the picture's tokens in a joint attention of `tokens`; None if it is not known.

    Before or behind them lies the text; behind them, in packed latents, reference pictures.
    """
    others = tokens - math.prod(grid)
    if others == 0 or family.text == "last":
        return 0
    if family.text is None:
        return None
    latent = arguments.get(family.latent)
    behind = latent.shape[1] - math.prod(grid) if latent.dim() == 3 else 0
    return others - behind


def predicted(module: Any, family: Family, latent: Any) -> tuple[int, int]:
    """The axis of a latent's channels, and how many of them the denoiser predicts.

    Those beyond are conditions, without noise (image-to-video, fill).
    """
    packed = latent.dim() == 3
    axis = 2 if packed or family.frames_first else 1
    count = getattr(module.config, "out_channels", None) or latent.shape[axis]
    if packed:  # Qwen-Image counts the channels of a latent pixel, of which a token holds several
        count *= (getattr(module.config, "patch_size", None) or 1) ** 2
    return axis, min(count, latent.shape[axis])


def prediction_kind(scheduler: Any) -> str:
    """What the denoiser predicts: "flow", or the scheduler's own word ("epsilon", …)."""
    config = scheduler.config
    flow = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False)
    kind: str = config.get("prediction_type", "epsilon")
    return "flow" if flow or kind == "flow_prediction" else kind


def noisiest_first(scheduler: Any) -> list[float]:
    """The schedule's timesteps, large for noisy also where the scheduler inverts its sigmas."""
    timesteps: list[float] = [float(t) for t in scheduler.timesteps.tolist()]
    if scheduler.config.get("invert_sigmas"):
        return [scheduler.config.num_train_timesteps - t for t in timesteps]
    return timesteps


def log_signal_to_noise(scheduler: Any) -> list[float]:
    """λ = log(a/b) for each timestep of the schedule, where the latent is a·data + b·noise.

    Flow matching: a = 1 − t, b = t, with t the timestep over the training steps. Otherwise from
    `alphas_cumprod`, or where a scheduler has only `sigmas` (b/a), from those.
    """
    config, timesteps = scheduler.config, noisiest_first(scheduler)
    train = config.get("num_train_timesteps", 1000)
    if prediction_kind(scheduler) == "flow":
        noise = [min(max(t / train, _MARGIN), 1 - _MARGIN) for t in timesteps]
        return [math.log((1 - b) / b) for b in noise]
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is not None:
        places = [min(max(round(t), 0), len(alphas) - 1) for t in timesteps]
        signal = [min(max(float(alphas[place]), _MARGIN**2), 1 - _MARGIN) for place in places]
        return [0.5 * math.log(a / (1 - a)) for a in signal]
    sigmas = scheduler.sigmas.tolist()[: len(timesteps)]
    return [-math.log(max(sigma, _MARGIN)) for sigma in sigmas]


def first_place(scheduler: Any, total: int, timestep: Any) -> int:
    """Where in its schedule a run of `total` steps begins, known at its first denoiser call.

    The scheduler says it, or where it keeps no count (DDIM) the schedule's timestep nearest to the
    denoiser's.
    """
    timesteps: list[float] = scheduler.timesteps.tolist()
    last = len(timesteps) - total
    if last == 0:
        return 0
    for name in ("begin_index", "step_index"):
        known = getattr(scheduler, name, None)
        if known is not None:
            return int(known)
    t = float(torch.as_tensor(timestep).flatten()[0])
    places: tuple[int, ...] = (last, 0, *range(last))
    return min(places, key=lambda place: abs(timesteps[place] - t))
