"""The training loop that all zoo models share: schedule, EMA, checkpoints, loss curve.

A run is deterministic by seed on one kind of device, and resumable: the checkpoint holds weights,
averaged weights, optimiser and random state. A resumed run may be given new minutes; the learning
rate then warms up again and decays over the new span.
"""

from __future__ import annotations

import csv
import math
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import CLIPTokenizer

from demos.zoo import text

CHECKPOINTS = Path.home() / ".cache" / "accel-zoo" / "checkpoints"


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix update is made orthogonal (Jordan et al. 2024), in `dtype`.

    torch's own Muon iterates in bfloat16, which is hundreds of times slower on CPUs without it.
    Matrices of one shape are iterated together; convolution kernels count as matrices
    (output channels × everything else). `lr` is in AdamW's scale.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    mean = state.setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(mean, group["momentum"]))
                stacked = torch.stack(updates).flatten(2)
                directions = orthogonal(stacked.to(self.dtype)).to(stacked)
                scale = 0.2 * math.sqrt(max(directions.shape[1:]))
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(direction.view(shape), alpha=group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrices by five Newton–Schulz steps: (n, rows, columns)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def optimizers(
    model: nn.Module, lr: float, muon: Iterable[str], bf16: bool = False
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels under the named submodules, AdamW for everything else."""
    prefixes = tuple(muon)
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and parameter[0].numel() > 1
            chosen = matrix and bool(prefixes) and name.startswith(prefixes)
            (matrices if chosen else rest).append(parameter)
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    dtype = torch.bfloat16 if bf16 else torch.float32
    return [*found, Muon(matrices, lr, dtype=dtype)] if matrices else found


def noise_levels(count: int, shift: float, generator: Generator) -> Tensor:
    """Levels σ in (0, 1) to train flow matching at, (count,).

    Every other one is of the shifted logit-normal distribution (Esser et al. 2024), which dwells
    where most is decided but, at shift 3, is below 0.25 only once in 73; runs of fifty steps take
    their last five there. So the rest are squares of uniform numbers: half are below 0.25.
    """
    u = torch.sigmoid(torch.randn(count, generator=generator))
    low = torch.rand(count, generator=generator).square()
    shifted = shift * u / (1 + (shift - 1) * u)
    return torch.where(torch.arange(count) % 2 == 0, shifted, low)


def start_from(model: nn.Module, folder: Path, name: str, autoencoder: str) -> None:
    """Go on with an exported zoo model: its weights, loss curve and autoencoder.

    Embeddings of a smaller vocabulary are taken over piece by piece; other weights of another
    shape stay as they are. The autoencoder goes into the checkpoints under its
    name unless one of that name was trained.
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for part, mine in model.named_children():
        own, known = mine.state_dict(), getattr(pipe, part).state_dict()
        for key, each in known.items():
            if each.shape == own[key].shape:
                own[key] = each
            elif part.startswith("text_encoder"):
                own[key] = _by_piece(own[key], each, getattr(pipe, f"tokenizer{part[12:]}"))
        mine.load_state_dict(own)
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    file, curve = CHECKPOINTS / f"{autoencoder}.pt", CHECKPOINTS / f"{name}.csv"
    if not file.exists():
        torch.save({"averaged": pipe.vae.state_dict()}, file)
    if not curve.exists():
        shutil.copy(folder / "loss.csv", curve)
        curve.write_text("".join(curve.read_text().splitlines(keepends=True)[1:]))


def _by_piece(own: Tensor, known: Tensor, old: Any) -> Tensor:
    """New token embeddings (n, width) with the rows of the pieces that the old tokenizer has."""
    tokenizer = text.clip_tokenizer if isinstance(old, CLIPTokenizer) else text.t5_tokenizer
    before, rows = old.get_vocab(), own.clone()
    for piece, row in tokenizer(old.model_max_length).get_vocab().items():
        if piece in before:
            rows[row] = known[before[piece]]
    return rows


def fit(  # noqa: C901 (one loop, read from top to bottom)
    name: str,
    model: nn.Module,
    loss: Callable[[Generator], Tensor],
    *,
    minutes: float,
    lr: float,
    muon: Iterable[str] = (),
    ema: float = 0.999,
    seed: int = 0,
    clip: float = 1.0,
    progress: Callable[[nn.Module, int], None] | None = None,
    progress_minutes: float = 10.0,
    checkpoints: Path = CHECKPOINTS,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Train `model` for `minutes` and return its averaged weights.

    `loss(generator)` draws a batch and returns the scalar loss. `progress(model, step)` is called
    every `progress_minutes` with the averaged weights loaded. The curve goes to `<name>.csv`.
    `bf16`: Muon iterates in bfloat16.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    file, curve = checkpoints / f"{name}.pt", checkpoints / f"{name}.csv"
    generator = Generator().manual_seed(seed)
    optimisers = optimizers(model, lr, muon, bf16)
    averaged = {key: value.detach().clone() for key, value in model.state_dict().items()}
    step = _steps(curve)
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        averaged = saved["averaged"]
        step = saved["step"]
        generator.set_state(saved["generator"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
    first, began, shown, total = step, time.monotonic(), 0.0, 0.0
    while (spent := (time.monotonic() - began) / 60) < minutes:
        rate = lr * min(1.0, (step - first + 1) / 200) * _decay(spent / minutes)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        value = loss(generator)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        keep = min(ema, (1 + step) / (10 + step))
        for key, weight in model.state_dict().items():
            if weight.is_floating_point():
                averaged[key].lerp_(weight, 1 - keep)
        total += float(value.detach())
        if step % 50 == 0:
            with curve.open("a", newline="") as out:
                csv.writer(out).writerow([step, f"{spent:.2f}", f"{total / 50:.5f}"])
            print(f"{name} step {step} {spent:.1f} min loss {total / 50:.4f}", flush=True)
            total = 0.0
        if spent - shown > progress_minutes:
            shown = spent
            _save(file, model, averaged, optimisers, generator, step)
            if progress is not None:
                own = {key: weight.clone() for key, weight in model.state_dict().items()}
                model.load_state_dict(averaged)
                model.eval()
                with torch.no_grad():
                    progress(model, step)
                model.train().load_state_dict(own)
    _save(file, model, averaged, optimisers, generator, step)
    return averaged


def _steps(curve: Path) -> int:
    """How many steps a loss curve has already."""
    return int(curve.read_text().splitlines()[-1].split(",")[0]) if curve.exists() else 0


def _decay(done: float) -> float:
    """Flat for the first half of a run, then a cosine down to a twentieth."""
    if done < 0.5:
        return 1.0
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))


def _save(
    file: Path,
    model: nn.Module,
    averaged: dict[str, Tensor],
    optimisers: list[torch.optim.Optimizer],
    generator: Generator,
    step: int,
) -> None:
    part = file.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "averaged": averaged,
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "generator": generator.get_state(),
            "step": step,
        },
        part,
    )
    part.replace(file)
