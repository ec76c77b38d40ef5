"""Classifier-free guidance seen by a policy: which branch runs, and what stands in for the other.

A pipeline computes û + w·(c − û) itself; a policy only says whether û is really computed. Where
both branches ride in one batch (negative half first), a step without the unconditional branch runs
the other half alone; where they are two calls (conditional first), the second is not made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from accel.family import ENCODER, Arguments
from accel.geometry import predicted
from accel.method import AccelError, Handle
from accel.model_calls import dressed, predictions, stacked
from accel.report import StepRow
from accel.site import Branch

if TYPE_CHECKING:
    from torch import Tensor

    from accel.denoiser import Denoiser

_UNBATCHED = ("rotary", "img_ids", "txt_ids")
_LAYERS_FIRST = "llama3"
"""HiDream's text of every encoder layer: (layers, batch, tokens, channels)."""


@dataclass(frozen=True)
class GuidanceContext:
    """A step as a guidance policy sees it; `log_snr` is log(signal/noise) of the latent.

    `planes(x)` turns a prediction into (…, rows, columns) maps, `tokens(x)` back. `latent` is the
    denoiser's input, of both halves where they are one batch.
    """

    step: int
    total: int
    timestep: float
    log_snr: float
    planes: Callable[[Tensor], Tensor]
    tokens: Callable[[Tensor], Tensor]
    latent: Tensor


class GuidancePolicy(Protocol):
    """Decides for one denoiser during one run; made anew for each run."""

    def begin(self, context: GuidanceContext) -> str:
        """What to do: "full" (both branches), "cond" (one) or "zero" (none, a zero prediction)."""
        ...

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        """Both were computed; returns what the pipeline takes for the unconditional one."""
        ...

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        """What stands in for the unconditional prediction."""
        ...


def guide(denoiser: Denoiser, policy: Callable[[], GuidancePolicy], method: str) -> Handle:
    """Let `policy` decide about the guidance branches of a denoiser."""
    if denoiser.family.predictions > 1:
        raise AccelError(
            f"{method} guides one prediction; {type(denoiser.module).__name__} makes "
            f"{denoiser.family.predictions} in a call"
        )
    branches = _Branches(denoiser, policy, method)
    denoiser.forgetting.append(branches.restart)
    forgotten = Handle(lambda: denoiser.forgetting.remove(branches.restart))
    try:
        return Handle.together([forgotten, denoiser.between(branches.call, method)])
    except BaseException:
        forgotten.remove()
        raise


def _bare(prediction: Tensor) -> Any:
    return prediction


class _Branches:
    """Runs the branches of every step that the policy wants."""

    def __init__(
        self, denoiser: Denoiser, policy: Callable[[], GuidancePolicy], method: str
    ) -> None:
        self.denoiser, self.make, self.method = denoiser, policy, method
        self.run, self.seen, self.step = -1, -1, -1
        self._policy: GuidancePolicy | None = None
        self.choice = "full"
        self.cond: Tensor | None = None
        self.dress: Callable[[Tensor], Any] = _bare
        """What makes of a prediction the output that the pipeline takes."""
        self.calls = 0
        self.doubled, self.rows = False, 0

    def restart(self) -> None:
        """What the policy remembers is of another run, or of another size."""
        self.run = -1
        if self.denoiser.clock.step is None:  # the run is over: its tensors are let go
            self._policy, self.cond, self.dress = None, None, _bare

    @property
    def policy(self) -> GuidancePolicy:
        """The policy of the run in progress."""
        assert self._policy is not None  # made at its first call
        return self._policy

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline calls the denoiser; `run(branch, args, kwargs)` really does."""
        denoiser, clock = self.denoiser, self.denoiser.clock
        assert clock.step is not None  # asked during a run only
        arguments = Arguments(denoiser.names, args, kwargs)
        if clock.run != self.seen:  # what restart() lets be: guidance may have ended by then
            self.seen = clock.run
            self.doubled, self.rows = is_doubled(denoiser, arguments), self._count(arguments)
        if clock.run != self.run:
            self.run, self._policy, self.step = clock.run, self.make(), -1
        if clock.step != self.step:
            self._check_last_step()
            self.step, self.calls = clock.step, 0
            context = self._context(arguments)
            self.choice = self.policy.begin(context)
        self.calls += 1
        if denoiser.family.guidance == "batched":
            return self._batched(run, arguments) if self.calls == 1 else run(None, args, kwargs)
        return self._sequential(run, arguments)

    def _check_last_step(self) -> None:
        """The first step of two-call guidance must have had its second call.

        A later one without it is where a callback, or the model's pipeline, ended guidance.
        """
        if self.step == 0 and self.calls == 1 and self.denoiser.family.guidance == "sequential":
            raise AccelError(self._off())

    def _count(self, arguments: Arguments) -> int:
        """Rows of the batch."""
        return len(arguments.get(self.denoiser.family.latent))

    def _off(self) -> str:
        return (
            f"{self.method} saves the unconditional branch, but this run has none: guidance is off "
            "(a guidance scale above 1 and, where the pipeline asks for it, a negative prompt "
            "switch it on)"
        )

    def _sequential(self, run: Callable[..., Any], arguments: Arguments) -> Any:
        args, kwargs = arguments.args, arguments.kwargs
        if self.choice == "zero" and self.calls <= 2:
            self._note(("cond", "uncond")[self.calls - 1])
            return _zeros(arguments, self.denoiser)
        if self.calls == 1:
            output = run(None, args, kwargs)
            self.cond, self.dress = predictions(output)[0], dressed(output)
            return output
        if self.calls > 2 or self.cond is None:
            return run(None, args, kwargs)
        context = self._context(arguments)
        if self.choice == "full":
            output = run(None, args, kwargs)
            return dressed(output)(self.policy.full(context, self.cond, predictions(output)[0]))
        self._note("uncond")
        return self.dress(self.policy.substitute(context, self.cond))

    def _batched(self, run: Callable[..., Any], arguments: Arguments) -> Any:
        if not self.doubled:
            raise AccelError(self._off())
        if self._count(arguments) != self.rows:  # guidance ended during the run
            return run(None, arguments.args, arguments.kwargs)
        if self.choice == "zero":
            self._note("cond")
            self._note("uncond")
            return _zeros(arguments, self.denoiser)
        context = self._context(arguments)
        args, kwargs = arguments.args, arguments.kwargs
        order = (0, 1) if self.denoiser.family.cond_first else (1, 0)
        if self.choice == "full" and not self.denoiser.sites:
            output = run(Branch("batched", 0), args, kwargs)
            halves = predictions(output)[0].chunk(2)
            cond, uncond = halves[order[0]], halves[order[1]]
        else:
            output = run(Branch("cond", 0), *half(arguments, order[0]))
            cond, uncond = predictions(output)[0], None
            if self.choice == "full":
                other = run(Branch("uncond", 1), *half(arguments, order[1]))
                uncond = predictions(other)[0]
            else:
                self._note("uncond")
        if uncond is None:
            uncond = self.policy.substitute(context, cond)
        else:
            uncond = self.policy.full(context, cond, uncond)
        pair = (cond, uncond) if order[0] == 0 else (uncond, cond)
        return dressed(output)(torch.cat(pair))

    def _note(self, branch: str) -> None:
        """A branch was left out."""
        rows, name = self.denoiser.rows, self.denoiser.name
        count = rows[-1].blocks if rows else max(len(self.denoiser.chain.blocks), 1)
        rows.append(StepRow(name, branch, self.step, "left out", 0.0, 0, count, False))

    def _context(self, arguments: Arguments) -> GuidanceContext:
        clock, denoiser = self.denoiser.clock, self.denoiser
        assert clock.step is not None  # asked during a run only

        def planes(x: Tensor) -> Tensor:
            return _planes(x, denoiser, arguments)

        def tokens(x: Tensor) -> Tensor:
            return _tokens(x, denoiser, arguments)

        return GuidanceContext(
            step=clock.step,
            total=clock.total,
            timestep=clock.timesteps[clock.place],
            log_snr=clock.log_snr[clock.place],
            planes=planes,
            tokens=tokens,
            latent=stacked(arguments.get(denoiser.family.latent)),
        )


def is_doubled(denoiser: Denoiser, arguments: Arguments) -> bool:
    """Whether the latent holds the same batch twice, as batched guidance makes it."""
    if denoiser.family.guidance != "batched" or denoiser.clock.guided is False:
        return False
    latent = stacked(arguments.get(denoiser.family.latent))
    if latent is None or len(latent) % 2:
        return False
    first, second = latent.chunk(2)
    return bool(torch.equal(first, second))


def half(arguments: Arguments, which: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for one half of the batch."""
    values = (*arguments.args, *arguments.kwargs.values())
    first = next(value for value in values if _rows(value))
    batch = len(first)

    def cut(value: Any) -> Any:
        if isinstance(first, list) and isinstance(value, list) and len(value) == batch:
            return value[which * batch // 2 : (which + 1) * batch // 2]
        if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == batch:
            return value.chunk(2)[which]
        if isinstance(value, list | tuple):
            return type(value)(cut(each) for each in value)
        if isinstance(value, dict):
            return {key: cut(each) for key, each in value.items()}
        return value

    def of(name: str, value: Any) -> Any:
        if any(part in name for part in _UNBATCHED):
            return value
        if _LAYERS_FIRST in name:
            return value.chunk(2, dim=1)[which]
        if name == ENCODER and isinstance(value, torch.Tensor) and len(value) % batch == 0:
            return value.chunk(2)[which]  # AnimateDiff repeats it for each frame
        return cut(value)

    args = tuple(cut(value) for value in arguments.args)
    return args, {name: of(name, value) for name, value in arguments.kwargs.items()}


def _rows(value: Any) -> bool:
    """Whether a value tells the batch: a tensor with rows, or a list of one for each (Z-Image)."""
    if isinstance(value, list):
        return len(value) > 0 and all(isinstance(each, torch.Tensor) for each in value)
    return isinstance(value, torch.Tensor) and value.dim() > 1


def _zeros(arguments: Arguments, denoiser: Denoiser) -> Any:
    """A prediction of zeros in the form that the pipeline expects."""
    latent = arguments.get(denoiser.family.latent)
    zeros: Any
    if isinstance(latent, list):
        zeros = list(map(torch.zeros_like, latent))
    else:
        axis, count = predicted(denoiser.module, denoiser.family, latent)
        zeros = torch.zeros_like(latent).narrow(axis, 0, count)
    if arguments.get("return_dict") is False:
        return (zeros,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=zeros)


def _planes(x: Tensor, denoiser: Denoiser, arguments: Arguments) -> Tensor:
    """A prediction as (…, rows, columns); packed tokens are unpacked.

    Tokens that form no grid (a mixed set) are one row.
    """
    if x.dim() != 3:
        return x
    live = denoiser.grid(arguments)
    if live is None or math.prod(live) != x.shape[1]:
        return x.transpose(1, 2)[:, :, None]
    patch = denoiser.family.packed
    grid = x.reshape(len(x), *live, -1, patch, patch)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(4, 5)


def _tokens(x: Tensor, denoiser: Denoiser, arguments: Arguments) -> Tensor:
    """The inverse of `_planes`."""
    if stacked(arguments.get(denoiser.family.latent)).dim() != 3:
        return x
    if x.dim() == 4:
        return x[:, :, 0].transpose(1, 2)
    patch = denoiser.family.packed
    apart = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    packed: Tensor = apart.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
    return packed
