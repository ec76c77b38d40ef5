"""Scale and shift of reused block residuals, fitted to what the blocks would have computed.

Wimbauer et al., "Cache Me if You Can", CVPR 2024, §3.3, train a linear layer of the timestep
embedding by self-distillation. With a fixed schedule there is one reuse for each block, branch and
step, and the best scale and shift of each channel are a linear regression: one run of a batch of
prompts gives them exactly, along the trajectory of the adjusted model itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from accel.method import AccelError

if TYPE_CHECKING:
    from torch import Tensor

    from accel.site import StepContext

_RIDGE = 0.05
"""How strongly a fit is drawn to scale 1, in units of the residual's own variance."""
_KIND = "accel block adjustment by denoiser"


class Adjustment:
    """Scale and shift (2, channels) by denoiser, branch, block and step, in a safetensors file.

    A file that is there is loaded and its model and step count are checked; where it has nothing of
    this denoiser, `fitting` is true until the first run that is completed, after which the file is
    written, with what it holds of a pipeline's other denoiser.
    """

    def __init__(self, file: Path, model: str, denoiser: str) -> None:
        self.file, self.model, self.denoiser = file, model, denoiser
        self.steps, self.run = 0, -1
        stored = self._stored()
        self.fits = {key: fit for key, fit in stored.items() if key.startswith(denoiser + ".")}
        self.fitting = not self.fits

    def begin(self, run: int) -> None:
        """A run begins; what an unfinished one fitted is dropped."""
        if self.fitting and run != self.run:
            self.fits, self.run = {}, run
            if not self.file.is_file():
                self.steps = 0

    def end(self, completed: int) -> None:
        """A run ended; when it was fitted to its last step, the file is written."""
        if self.fitting and self.fits and self.run == completed:
            self._save()
            self.fitting = False

    def key(self, row: int, context: StepContext) -> str:
        """The name of one fit; raises `AccelError` in a run of another length."""
        self.steps = self.steps or context.schedule
        if self.steps != context.schedule:
            raise AccelError(
                f"{self.file}: fitted for {self.steps} steps, and this run has {context.schedule}"
            )
        return f"{self.denoiser}.{context.branch.name}.{row}.{context.place}"

    def fit(self, key: str, reused: Tensor, wanted: Tensor) -> None:
        """Scale and shift of each channel with the least squared error, drawn to scale 1."""
        axes = [axis for axis in range(reused.dim()) if axis != _channels(reused)]
        x, y = reused.float(), wanted.float()
        mean_x, mean_y = x.mean(axes, keepdim=True), y.mean(axes, keepdim=True)
        variance = (x - mean_x).square().mean(axes)
        together = ((x - mean_x) * (y - mean_y)).mean(axes)
        scale = (together + _RIDGE * variance) / ((1 + _RIDGE) * variance + 1e-12)
        self.fits[key] = torch.stack((scale, mean_y.flatten() - scale * mean_x.flatten()))

    def adjusted(self, key: str, reused: Tensor) -> Tensor:
        """The residual that stands in; unchanged where nothing was fitted."""
        if key not in self.fits:
            return reused
        shape = [1] * reused.dim()
        shape[_channels(reused)] = -1
        self.fits[key] = fit = self.fits[key].to(reused.device)
        scale, shift = fit.to(reused.dtype).unbind()
        return reused * scale.view(shape) + shift.view(shape)

    def _stored(self) -> dict[str, Tensor]:
        """What the file holds, of every denoiser; nothing where there is none."""
        from safetensors import SafetensorError, safe_open

        if not self.file.is_file():
            return {}
        try:
            with safe_open(self.file, "pt") as opened:
                about = opened.metadata() or {}
                stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise AccelError(f"{self.file}: cannot be read ({error})") from error
        if about.get("kind") != _KIND or about.get("model") != self.model:
            raise AccelError(
                f"{self.file}: an adjustment of {about.get('model', 'something else')}, not of "
                f"{self.model}"
            )
        self.steps = int(about["steps"])
        return stored

    def _save(self) -> None:
        from safetensors.torch import save_file

        own = {name: fit.half().cpu() for name, fit in self.fits.items()}
        stored = self._stored() | own
        about = {"kind": _KIND, "model": self.model, "steps": str(self.steps)}
        part = self.file.with_name(self.file.name + ".part")
        save_file(stored, part, about)
        os.replace(part, self.file)


def _channels(residual: Tensor) -> int:
    """The channel axis: the last of tokens (batch, tokens, channels), the second of maps."""
    return -1 % residual.dim() if residual.dim() == 3 else 1
