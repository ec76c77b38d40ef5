"""The stages of a run as data: noise levels and a size each, and the rules that plan them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accel.method import AccelError, check, is_number, is_series
from accel.noise_levels import NoiseLevels, Sigmas


@dataclass(frozen=True)
class Stage:
    """`sigmas`: one level more than the stage has steps. `scale`: of rows and columns."""

    sigmas: Sigmas
    scale: float = 1.0


def check_plan(owner: Any, scales: tuple[float, ...], shares: tuple[float, ...]) -> None:
    """Raise `AccelError` unless these are stages: as many shares as scales, ending at full size."""
    check(
        is_series(scales, lambda each: is_number(each) and 0 < each <= 1),
        owner,
        "scales" if hasattr(owner, "scales") else "scale",
        "numbers above 0, at most 1",
    )
    check(
        is_series(shares, lambda each: is_number(each) and each > 0)
        and len(shares) == len(scales)
        and abs(sum(shares) - 1) < 1e-6,
        owner,
        "shares",
        f"{len(scales)} positive numbers that add up to 1",
    )
    check(scales[-1] == 1, owner, "scales", "1 at the end")
    check_words(owner)


def check_words(owner: Any) -> None:
    """Raise `AccelError` unless `positions` and `noise`, where a method has them, are known."""
    for name, accepted in (("positions", ("native", "spread")), ("noise", ("initial", "fresh"))):
        value = getattr(owner, name, accepted[0])
        check(value in accepted, owner, name, " or ".join(f'"{word}"' for word in accepted))


def plan(
    levels: NoiseLevels,
    scales: tuple[float, ...],
    shares: tuple[float, ...],
    factors: list[float],
    gain: float = 1.0,
) -> list[Stage]:
    """Stages that end where their steps would end in the untouched run.

    `factors[k]` multiplies the noise-to-signal ratio between the end of stage k and the start of
    the next, where the size changes; neighbours of one size are one stage.
    """
    found: list[Stage] = []
    ends = [round(levels.steps * sum(shares[: number + 1])) for number in range(len(shares))]
    begin, start = 0, levels.sigmas[0]
    for number, (scale, end) in enumerate(zip(scales, ends, strict=True)):
        last = number + 1 == len(scales)
        if not last and scales[number + 1] == scale:
            continue
        if end <= begin:
            raise AccelError(
                f"a run of {levels.steps} steps is too short for stages of the shares {shares}: "
                f"stage {number + 1} would have none"
            )
        shift = scale * gain ** len(found)
        stop = levels.sigmas[end]
        if stop >= start:
            raise AccelError(f"stage {number + 1} would end noisier than it starts; add noise")
        found.append(Stage(levels.spaced(start, stop, end - begin, shift), scale))
        if not last:
            begin = end
            start = levels.noisier(stop, factors[number], f"the start of stage {number + 2}")
    return found
