"""What one untouched run tells about a model: every site's output at every step, as sketches.

A sketch is a random projection to `SKETCH` numbers. It is linear and keeps inner products, so the
error of any linear forecast from any steps can be told afterwards from sketches alone, to about
√(2 / SKETCH) = 6 % of itself, whatever the size of the tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.calibrate_probe import BRANCH, PLACES, Probe, block_maps, fitted, now, probe
from accel.family import Arguments
from accel.guidance import is_doubled
from accel.hooks import onload, override
from accel.method import AccelError, Handle, Method
from accel.model_calls import latent_like, predictions, stacked
from accel.sublayer import Sublayer, sublayers

if TYPE_CHECKING:
    from torch import Tensor

    from accel.denoiser import Denoiser

SKETCH = 509
"""Prime, so that values a row of channels apart do not share a sum."""
LARGEST = 2**22
"""Values of a tensor that a sketch looks at; larger tensors are taken at an odd stride."""


class Sketcher:
    """Random projections; equal sizes share their signs, so their sketches may be added."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.signs: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """(`SKETCH`,) in fp32, on the tensor's device."""
        flat = x.detach().flatten()
        if len(flat) > LARGEST:
            flat = flat[:: -(-len(flat) // LARGEST) | 1]
        key = (len(flat), flat.device)
        if key not in self.signs:
            generator = torch.Generator().manual_seed(self.seed + len(flat))
            size = -(-len(flat) // SKETCH) * SKETCH
            signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
            self.signs[key] = signs.to(flat.device)
        signs = self.signs[key]
        padded = torch.nn.functional.pad(flat.float(), (0, len(signs) - len(flat)))
        return (padded * signs).view(-1, SKETCH).sum(0)


@dataclass
class Record:
    """One recorded run. `values` maps "site/branch" to one tensor a step.

    Sites: "latent", "prediction", "entry" (the chain's input), "stack", "block.I" (residuals),
    "layer.I.KIND.NAME" (outputs of attention and MLP layers), all sketches; "ratio" (mean norm
    ratio of the stack's residual to the step before, over tokens) and "observed" (relative change
    of the family's observer), both from step 1 on; "map/LAYER", at the probed steps alone: rows of
    its block-wise attention. `seconds`: totals for "call", "stack", "run".
    """

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)
    log_snr: list[float] = field(default_factory=list)
    start: int = 0
    """Where in the schedule the run began; `timesteps` and `log_snr` are the whole schedule's."""
    calls: int = 0
    latents: int = 0
    """Latent values of one sample."""
    prediction: str = ""
    batched: bool = False
    """Whether both guidance branches rode in one call."""
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    """What calls cost and gave that were made in other ways (see `accel.calibrate_probe`)."""

    def put(self, site: str, branch: str, value: Tensor) -> None:
        """The value of the next step."""
        self.values.setdefault(f"{site}/{branch}", []).append(value)


@dataclass(frozen=True)
class Recorder:
    """Attaches like a method, skips nothing, and fills `record`; `variants` are probed."""

    slot: ClassVar[str] = "record"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ()

    record: Record
    variants: tuple[Method, ...] | None = None

    def attach(self, denoiser: Denoiser) -> Handle:
        """See every call of the denoiser, its blocks and their layers."""
        return _Watch(denoiser, self.record, self.variants).attach()


class _Watch:
    def __init__(
        self, denoiser: Denoiser, record: Record, variants: tuple[Method, ...] | None
    ) -> None:
        self.denoiser, self.record, self.sketch = denoiser, record, Sketcher()
        self.variants, self.probing = variants, False
        self.seen: set[str] = set()
        """The layers that this call of the denoiser has called."""
        self.tried: tuple[Method, ...] = ()
        self.step, self.calls = -1, 0
        self.branches: tuple[str, ...] = ()
        self.past: dict[str, Tensor] = {}
        self.own = 0.0
        """Seconds that recording itself took."""
        self.entry: Tensor | None = None

    def attach(self) -> Handle:
        denoiser = self.denoiser
        handles = [denoiser.between(self.call, "accel.profile")]
        blocks = denoiser.chain.blocks
        try:
            for index, block in enumerate(blocks):
                undo = override(block, {"__call__": partial(self.block, index)})
                handles.append(Handle(undo))
            for layer in self._layers():
                watch = {"__call__": partial(self.layer, layer)}
                handles.append(Handle(override(layer.modules[-1], watch)))
        except BaseException:
            Handle.together(handles).remove()
            raise
        return Handle.together(handles)

    def _layers(self) -> list[Sublayer]:
        try:
            return sublayers(self.denoiser.chain, "accel.profile")
        except AccelError:  # feed-forward chunking; the profile does without layers
            return []

    # --- the watched calls ---------------------------------------------------------------------

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        clock, record = self.denoiser.clock, self.record
        arguments = Arguments(self.denoiser.names, args, kwargs)
        latent = stacked(arguments.get(self.denoiser.family.latent))
        if clock.step == 0 and self.step != 0:
            record.timesteps, record.log_snr = list(clock.timesteps), list(clock.log_snr)
            record.start = clock.start
            record.latents, record.prediction = latent[0].numel(), clock.prediction
            one = self.denoiser.family.predictions == 1  # else no guidance policy is for it
            record.batched = one and is_doubled(self.denoiser, arguments)
        if clock.step != self.step:
            assert clock.step is not None  # called during a run only
            self.step, self.calls = clock.step, 0
        self.branches = self._branches()
        self.calls += 1
        self.seen.clear()
        self._learn(run, args, kwargs)
        record.calls += 1
        began, own = now(latent), self.own
        output = run(None, args, kwargs)
        self._spent("call", now(latent) - began - (self.own - own))
        predicted = predictions(output)[0]
        self._put("latent", latent_like(latent, predicted.shape))  # as methods subtract it
        self._put("prediction", predicted)
        places = {int(place * clock.total) for place in PLACES}
        if self.variants is not None and self.calls == 1 and self.step in places:
            self._probe(run, args, kwargs, self.variants)
        return output

    def _learn(self, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Let the chain of an undescribed model find its streams before the first step."""
        chain = self.denoiser.chain
        if self.record.calls == 0 and not all(map(chain.known, range(len(chain.blocks)))):
            self.probing = True
            try:
                run(BRANCH, args, kwargs)
            finally:
                self.probing = False

    def _probe(
        self, run: Callable[..., Any], args: Any, kwargs: Any, variants: tuple[Method, ...]
    ) -> None:
        began = time.perf_counter()
        self.probing = True
        try:
            maps = block_maps(self.denoiser, partial(run, BRANCH, args, kwargs), variants)
            for name, each in maps.items():
                self.record.put("map", name, each)
            if not self.tried:  # the same at every place
                self.tried = fitted(variants, list(maps.values()))
            found = probe(self.denoiser, run, args, kwargs, self.tried)
        finally:
            self.probing = False
        for name, seen in found.items():
            self.record.probes.setdefault(name, []).append(seen)
        self._took(began)

    def block(self, index: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        chain = self.denoiser.chain
        arguments = chain.arguments(index, args, kwargs)
        if self.probing:
            return chain.learn(index, arguments, run(*args, **kwargs))
        before = chain.inputs(arguments)[0]
        began, own = now(before), self.own
        if index == 0 and before is not None:
            self._enter(arguments, before)
            self.began, self.own_then = now(before), self.own
        output = chain.learn(index, arguments, run(*args, **kwargs))
        ended = now(before)
        last = index == len(chain.blocks) - 1
        if last:
            self._spent("stack", ended - self.began - (self.own - self.own_then))
        self._spent(f"block.{index}", ended - began - (self.own - own))
        after = chain.outputs(index, output)[0] if chain.known(index) else None
        if after is not None and before is not None and after.shape == before.shape:
            self._put(f"block.{index}", after - before)
        if last and after is not None:
            self._leave(after)
        return output

    def layer(self, layer: Sublayer, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        site = f"layer.{layer.block}.{layer.kind}.{layer.name}"
        if self.probing or site in self.seen:
            return output
        self.seen.add(site)
        self._put(site, output[0] if isinstance(output, tuple) else output)
        return output

    # --- what is kept of them ------------------------------------------------------------------

    def _enter(self, arguments: Arguments, hidden: Tensor) -> None:
        self.entry = hidden
        self._put("entry", hidden)
        observer = self.denoiser.family.observer
        if observer is not None:
            block = self.denoiser.chain.blocks[0]
            onload(block)
            seen = observer(block, arguments)
            self._change("observed", seen, _relative_change)

    def _leave(self, hidden: Tensor) -> None:
        """The chain's last block is done."""
        chain = self.denoiser.chain
        streams = (self.entry, *[None] * (len(chain.streams) - 1))
        entry = chain.relayout(streams, hidden)[0]
        if entry is None or entry.shape != hidden.shape:
            return
        residual = hidden - entry
        self._put("stack", residual)
        self._change("ratio", residual.float().norm(dim=-1), lambda new, old: (new / old).mean())

    def _change(self, site: str, new: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Compare with the same branch's value one step before."""
        began = time.perf_counter()
        for branch, value in self._split(new):
            key = f"{site}/{branch}"
            if key in self.past:
                self.record.put(site, branch, compare(value.float(), self.past[key]))
            self.past[key] = value.float()
        self._took(began)

    def _put(self, site: str, value: Tensor) -> None:
        began = time.perf_counter()
        for branch, half in self._split(value):
            self.record.put(site, branch, self.sketch(half))
        self._took(began)

    def _took(self, began: float) -> None:
        """Recording itself took the time since `began`."""
        self.own += time.perf_counter() - began
        self.record.seconds["recording"] = self.own

    def _split(self, value: Tensor) -> list[tuple[str, Tensor]]:
        """The value of each branch in this call."""
        if len(self.branches) == 1:
            return [(self.branches[0], value)]
        return list(zip(self.branches, value.chunk(2), strict=True))

    def _branches(self) -> tuple[str, ...]:
        if self.record.batched:
            cond_first = self.denoiser.family.cond_first
            return ("cond", "uncond") if cond_first else ("uncond", "cond")
        names = ("cond", "uncond")
        return (names[self.calls] if self.calls < 2 else f"call{self.calls}",)

    def _spent(self, what: str, seconds: float) -> None:
        self.record.seconds[what] = self.record.seconds.get(what, 0.0) + seconds


def _relative_change(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).abs().mean() / old.abs().mean()
