"""Train guidance adapters: the frozen model's own guided runs are all the data that is needed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from accel import adapter_files, batch_items
from accel.adapter_files import VARIANTS
from accel.adapter_hosts import attention_hosts, weight_hosts
from accel.adapters import AdapterConfig, Adapters
from accel.chain import parameters
from accel.family import ENCODER
from accel.guided_model import GuidedModel
from accel.guided_runs import Pool
from accel.low_rank import LowRank, LowRankConfig
from accel.method import AccelError, check, is_count, is_number

STEPS = (6, 14)
"""Steps of a guided run are drawn from this range, so that timesteps vary.

Few: states of one run are alike, and what is learnt follows the number of runs.
"""


@dataclass(frozen=True)
class Training:
    """How adapters are trained: the settings of `accel adapters train`.

    `variant`: "low_rank", offsets of all weights whose rank is `width` (see `accel.low_rank`), or
    the paper's "cross" and "offset", networks of that width beside attention layers.
    `trajectories` guided runs of prompts from the list, `batch` at a time: half of them, and half
    of an update's rows, at the scale that the model is called with, the others spread over
    `scales`. Their states and both branches' predictions are kept beside the state of the training,
    so that a run that was stopped goes on. `minutes` are of training. On a GPU the frozen
    model is in bfloat16 and its blocks are computed again in the backward pass; `device` "auto"
    takes one if there is one. `start`: a folder of trained adapters that are learnt on from, with a
    fresh optimiser; low-rank ones may be narrower than `width`. Half of the runs then go where they
    lead, so that what their own errors bring about is seen too (Ross et al. 2011). Guided runs
    follow the `seed`. `keep_length`: compare what is added with what guidance adds by length and
    angle (see `mismatch`), else by least squares.
    """

    variant: str = "low_rank"
    width: int = 16
    minutes: float = 10.0
    trajectories: int = 128
    scales: tuple[float, float] = (1.0, 8.0)
    lr: float = 2e-3
    batch: int = 16
    seed: int = 0
    device: str = "auto"
    start: str | None = None
    keep_length: bool = True

    def __post_init__(self) -> None:
        check(self.variant in VARIANTS, self, "variant", " or ".join(VARIANTS))
        check(is_number(self.minutes) and self.minutes > 0, self, "minutes", "a number > 0")
        for name in ("width", "batch"):
            check(is_count(getattr(self, name), 2), self, name, "a whole number ≥ 2")
        least = 2 * self.batch
        check(is_count(self.trajectories, least), self, "trajectories", "at least two batches")
        low, high = self.scales
        check(1 <= low < high, self, "scales", "two numbers, 1 ≤ lowest < highest")
        check(is_number(self.lr) and 0 < self.lr < math.inf, self, "lr", "a number > 0")


class Trainer:
    """Adapters of one pipeline's denoiser in training."""

    def __init__(self, model: str, prompts: list[str], plan: Training, work: Path) -> None:
        self.plan, self.prompts, self.work = plan, prompts, work
        self.model = GuidedModel(model, plan.device)
        self.module, self.device = self.model.module, self.model.device
        self.generator = Generator().manual_seed(plan.seed)
        low, high = plan.scales
        self.own_scale = min(max(self.model.own_scale, low), high)
        self.about = {"model": model, "prompts": batch_items.digest_of(prompts), **asdict(plan)}
        self.about["scales"] = [*plan.scales]
        del self.about["minutes"], self.about["device"]

    def pool(self, say: Callable[[str], None]) -> Pool:
        """The states of all guided runs; kept on disk for the next time."""
        file = self.work / "pool.pt"
        if file.exists():
            return Pool(**self._kept(file, ("variant", "width", "lr", "keep_length")))
        calls, parts = self.plan.trajectories // self.plan.batch, []
        start = self.plan.start
        known = None if start is None else adapter_files.load(Path(start)).to(self.device)
        for index in range(calls):
            parts.append(self._states(index, calls, known if index % 4 < 2 else None))
            say(f"guided runs {(index + 1) * self.plan.batch} of {calls * self.plan.batch}")
        pool = Pool(
            {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs},
            cond=torch.cat([part.cond for part in parts]),
            uncond=torch.cat([part.uncond for part in parts]),
            weight=torch.cat([part.weight for part in parts]),
            fixed=parts[0].fixed,
        )
        self.work.mkdir(parents=True, exist_ok=True)
        self._keep(vars(pool), file)
        return pool

    def _kept(self, file: Path, free: Sequence[str] = ()) -> dict[str, Any]:
        """What an earlier run of this training left; raises `AccelError` where it was another.

        `free`: settings that may differ.
        """
        content: dict[str, Any] = torch.load(file, weights_only=True)
        before = content.pop("about", {})
        for name, now in self.about.items():
            if name not in free and before.get(name) != now:
                raise AccelError(
                    f"{file} is of a training with another {name} ({before.get(name)!r}, here "
                    f"{now!r}); give another --output or --work"
                )
        return content

    def _keep(self, content: dict[str, Any], file: Path) -> None:
        """Write a file that is whole or not there: a run may be stopped at any time."""
        part = file.with_suffix(".part")
        torch.save(content | {"about": self.about}, part)
        part.replace(file)

    def _states(self, index: int, calls: int, leader: Adapters | LowRank | None) -> Pool:
        """The states of one call of the pipeline, at its own scale or one far from the last."""
        low, high = self.plan.scales
        uniform = float(torch.rand((), generator=self.generator))
        scale = low + (high - low) * ((0.618 * (index // 2) + uniform / calls) % 1)
        scale = self.own_scale if index % 2 else scale
        picks = torch.randint(len(self.prompts), (self.plan.batch,), generator=self.generator)
        prompts = [self.prompts[int(pick)] for pick in picks]
        steps = int(torch.randint(*STEPS, (), generator=self.generator))
        return self.model.states(prompts, scale, steps, self.generator, leader)

    def first_adapters(self, pool: Pool) -> Adapters | LowRank:
        """Those that the plan starts from, else untrained ones, which change nothing yet."""
        adapters, start = self._untrained(pool), self.plan.start
        if start is None:
            return adapters
        known = adapter_files.load(Path(start))
        if isinstance(known, LowRank) and isinstance(adapters, LowRank):
            fits = adapters.take_over(known)
        elif fits := known.config == adapters.config:
            adapters.load_state_dict(known.state_dict())
        if not fits:
            raise AccelError(
                f"--start {start}: these adapters are for another model, have another variant or "
                "other scales, or are wider than asked for"
            )
        return adapters

    def _untrained(self, pool: Pool) -> Adapters | LowRank:
        torch.manual_seed(self.plan.seed)
        base, plan = type(self.module).__name__, self.plan
        if plan.variant == "low_rank":
            known = weight_hosts(self.module)
            return LowRank(LowRankConfig(base, known, rank=plan.width, scales=plan.scales))
        return Adapters(
            AdapterConfig(
                variant=plan.variant,  # type: ignore[arg-type]
                base=base,
                hosts=attention_hosts(self.module, self.model.family),
                text_width=pool.inputs[ENCODER].shape[-1],
                width=plan.width,
                scales=plan.scales,
                time_unit=1.0 if float(pool.inputs["timestep"].max()) <= 1 else 1000.0,
            )
        )

    def errors(
        self, adapters: Adapters | LowRank, pool: Pool, rows: Tensor, scale: Tensor
    ) -> Tensor:
        """How far what the adapters add is from what guidance adds, weighted, (rows,)."""
        adapters.guidance = scale
        inputs = {name: value[rows] for name, value in pool.inputs.items()}
        found = self.model.predict(pool.fixed | inputs).float().cpu()
        cond, uncond = pool.cond[rows].float(), pool.uncond[rows].float()
        wide = scale.reshape(-1, *[1] * (cond.dim() - 1))
        added, wanted = found - cond, (wide - 1) * (cond - uncond)
        if self.plan.keep_length:
            errors = mismatch(added, wanted)
        else:
            errors = (added - wanted).square().flatten(1).mean(1)
        weighted: Tensor = errors * pool.weight[rows]
        return weighted

    def train(self, say: Callable[[str], None]) -> tuple[Adapters | LowRank, dict[str, float]]:
        """Train, or go on; returns the adapters and what is known about the training."""
        pool = self.pool(say)
        changed = pool.change
        adapters = self.first_adapters(pool).to(self.device)
        optimiser = _optimiser(adapters)
        state = {"step": 0.0, "seconds": 0.0}
        file = self.work / f"{self.plan.variant}.pt"
        if file.exists():
            saved = self._kept(file)
            adapters.load_state_dict(saved["adapters"])
            optimiser.load_state_dict(saved["optimiser"])
            self.generator.set_state(saved["generator"])
            state = saved["state"]
        handle = adapters.attach(self.module, parameters(self.module))
        try:
            while state["seconds"] < 60 * self.plan.minutes:
                began = time.monotonic()
                self._step(adapters, optimiser, pool, changed, state)
                state["step"] += 1
                state["seconds"] += time.monotonic() - began
                if state["step"] % 50 == 0:
                    self._save(file, adapters, optimiser, state)
                    state["held_error"] = self._held(adapters, pool, changed)
                    say(" ".join(f"{name} {value:.4g}" for name, value in state.items()))
            self._save(file, adapters, optimiser, state)
            state["held_error"] = self._held(adapters, pool, changed)
        finally:
            handle.remove()
        return adapters, state

    def _step(
        self,
        adapters: Adapters | LowRank,
        optimiser: torch.optim.Optimizer,
        pool: Pool,
        changed: Tensor,
        state: dict[str, float],
    ) -> None:
        """One update on rows of the pool; a row's scale is drawn anew each time.

        What guidance changes in a state, c, is far larger in the first noisy steps than later,
        where what is missed stays to be seen. So a squared error counts by 1/√c: rows are drawn in
        proportion to c^¼ and weighted by c^-¾. It counts as a share of what its scale changes.
        The first states are held out.
        """
        plan, done = self.plan, state["seconds"] / (60 * self.plan.minutes)
        warm = min(1.0, (state["step"] + 1) / 50)
        rate = plan.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimiser.param_groups:
            group["lr"] = rate * group["times"]
        chance = changed.pow(0.25)
        chance[: self._held_rows(pool)] = 0
        rows = torch.multinomial(chance, plan.batch, replacement=True, generator=self.generator)
        low, high = plan.scales
        scale = low + (high - low) * torch.rand(plan.batch, generator=self.generator)
        scale[::2] = self.own_scale
        size = chance[rows].pow(3) * (1 + (scale - 1).square())
        errors = self.errors(adapters, pool, rows, scale) / size
        loss = errors.mean() / chance[rows].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        share = 0.98 if state["step"] else 0.0
        state["error"] = share * state.get("error", 0.0) + (1 - share) * float(loss.detach())

    def _held_rows(self, pool: Pool) -> int:
        return max(len(pool.cond) // 16, 1)

    @torch.no_grad()
    def _held(self, adapters: Adapters | LowRank, pool: Pool, changed: Tensor) -> float:
        """The error on 64 states that are not trained on; 1 is that of no adapters."""
        last = self._held_rows(pool) - 1
        rows = torch.linspace(0, last, min(last + 1, 64)).long()
        low, high = self.plan.scales
        scale = low + (high - low) * (torch.arange(1, len(rows) + 1) * 0.618 % 1)
        root = changed[rows].clamp(min=1e-12).sqrt()
        errors = self.errors(adapters, pool, rows, scale) / (root * (scale - 1).square())
        return float(errors.sum() / root.sum())

    def _save(
        self,
        file: Path,
        adapters: Adapters | LowRank,
        optimiser: torch.optim.Optimizer,
        state: dict[str, float],
    ) -> None:
        content = {
            "adapters": adapters.state_dict(),
            "optimiser": optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "state": state,
        }
        self._keep(content, file)


def mismatch(made: Tensor, wanted: Tensor) -> Tensor:
    """How far rows of a are from b, both (n, …): ((|a| − |b|)² + 2|b|²(1 − cos(a, b))) / 3, (n,).

    |·| is the root mean square. Least squares has |a||b| where this has |b|²: there what cannot be
    predicted makes a short, which is weak guidance. Here a keeps b's length. |b|² for a = 0.
    """
    made, wanted = made.flatten(1), wanted.flatten(1)
    square, full = made.square().mean(1), wanted.square().mean(1)
    length = (square + 0.1 * full + 1e-12).sqrt()  # no pole at a = 0, where training begins
    angle = full - full.sqrt() * (made * wanted).mean(1) / length
    return (((square + 1e-12).sqrt() - full.sqrt()).square() + 2 * angle) / 3


def _optimiser(adapters: Adapters | LowRank) -> torch.optim.Optimizer:
    """AdamW; the half of low-rank offsets that starts at zero learns faster (LoRA+, Hayou 2024)."""
    named = list(adapters.named_parameters())
    fast = [value for name, value in named if name.endswith(".up")]
    slow = [value for name, value in named if not name.endswith(".up")]
    groups = [{"params": slow, "times": 1.0}, {"params": fast, "times": 4.0}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def read_scales(text: str) -> tuple[float, float]:
    """Two guidance scales from "lowest,highest"."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise AccelError(f"--scales {text!r}: write lowest,highest, such as 1,8") from error
    return low, high


def train(
    model: str,
    prompts: Path,
    output: Path,
    plan: Training,
    say: Callable[[str], None],
    work: Path | None = None,
) -> dict[str, Any]:
    """Train adapters for `model` on a prompt file and write them to `output`."""
    lines = batch_items.prompt_lines(prompts)
    trainer = Trainer(model, lines, plan, work or output / "work")
    adapters, state = trainer.train(say)
    notes = {"model": model, **asdict(plan), "prompts": prompts.name, **state}
    adapter_files.save(adapters, output, notes)
    parameters_count = sum(value.numel() for value in adapters.parameters())
    return {"output": str(output), "parameters": parameters_count, **state}
