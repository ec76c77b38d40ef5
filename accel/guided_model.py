"""A frozen denoiser in its pipeline, called with guidance: what adapters are to imitate."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from accel import registry
from accel.adapters import Adapters
from accel.chain import parameters
from accel.family import Family
from accel.guided_runs import Pool, Recorder, gathered, nested, placed, velocity_weight
from accel.loading import Loading, load
from accel.low_rank import LowRank
from accel.method import AccelError


class GuidedModel:
    """A model folder or name, loaded; `device` "auto" takes a GPU if there is one.

    On a GPU the denoiser is in bfloat16 and its blocks are computed again in a backward pass.
    """

    def __init__(self, model: str, device: str) -> None:
        gpu = torch.cuda.is_available() if device == "auto" else device != "cpu"
        loading = Loading(device=device, dtype="bf16" if gpu else "fp32")
        self.pipe, self.call, _ = load(model, loading)
        name = "transformer" if getattr(self.pipe, "transformer", None) is not None else "unet"
        self.module = getattr(self.pipe, name).requires_grad_(False).eval()
        self.device = next(self.module.parameters()).device
        if gpu:
            self.module.enable_gradient_checkpointing()
        self.family: Family = registry.family(self.module)
        accepted = inspect.signature(self.pipe.__call__).parameters
        true_scale = self.family.guidance == "sequential" and "true_cfg_scale" in accepted
        self.scale_name = "true_cfg_scale" if true_scale else "guidance_scale"
        known = accepted.get(self.scale_name)
        self.own_scale = float(self.call.get(self.scale_name) or (known.default if known else 1.0))

    def predict(self, inputs: dict[str, Any]) -> Tensor:
        """One forward pass on recorded inputs by argument name (see `guided_runs.flat`)."""
        given = {name: placed(value, self.device) for name, value in inputs.items()}
        predicted: Tensor = self.module(**nested(given | {"return_dict": False}))[0]
        return predicted

    @torch.no_grad()
    def states(
        self,
        prompts: list[str],
        scale: float,
        steps: int,
        generator: Generator,
        leader: Adapters | LowRank | None = None,
    ) -> Pool:
        """The states of one call of the pipeline; with a leader it goes where those adapters lead.

        Raises AccelError if the call did not guide.
        """
        lead = None if leader is None else partial(self._led, leader, scale)
        recorder = Recorder(self.module, self.family, lead)
        hook = self.module.register_forward_hook(recorder, with_kwargs=True)
        try:
            settings = self._settings(max(scale, 1.01), steps, len(prompts))
            self.pipe(**settings, prompt=prompts, generator=generator)
        finally:
            hook.remove()
        if not recorder.states:
            raise AccelError(f"{type(self.pipe).__name__} did not guide: no branches were seen")
        pool = gathered(recorder.states, len(prompts))
        pool.weight = velocity_weight(self.pipe.scheduler, pool.inputs["timestep"])
        return pool

    def _led(self, leader: Adapters | LowRank, scale: float, inputs: dict[str, Any]) -> Tensor:
        """What trained adapters make of the conditional branch."""
        leader.guidance = scale
        handle = leader.attach(self.module, parameters(self.module))
        try:
            return self.predict(inputs)
        finally:
            handle.remove()

    def _settings(self, scale: float, steps: int, batch: int) -> dict[str, Any]:
        call = {**self.call, "num_inference_steps": steps, "output_type": "latent"}
        call[self.scale_name] = scale
        negative = call.pop("negative_prompt", None)
        if self.scale_name == "true_cfg_scale" or negative is not None:
            call["negative_prompt"] = [negative or ""] * batch
        return call
