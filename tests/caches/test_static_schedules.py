"""Which steps the static rules compute, against the published lists."""

import pytest
import torch
from contract_cases import context_at
from tiny_pipelines import TINY, run

import accel
from accel.caches.schedules import Table
from accel.caches.step_mask import preset


def computed_steps(policy, total: int) -> list[int]:
    skipped, found = 0, []
    for step in range(total):
        context = context_at(step, total, skipped=skipped)
        if policy.skip(context, None):
            skipped += 1
        else:
            found.append(step)
            policy.computed(context, None, None)
            skipped = 0
    return found


@pytest.mark.parametrize(
    ("growth", "later"),
    [
        (0.25, [6, 8, 10, 12, 15, 18, 21, 24, 28, 32, 36, 40, 45]),
        (0.5, [6, 8, 11, 14, 18, 22, 27, 32, 38, 44]),
        (0.75, [6, 8, 11, 15, 20, 25, 31, 38, 46]),
        (1, [6, 9, 13, 18, 24, 31, 39, 48]),
        (2, [6, 10, 16, 24, 34, 46]),
        (3, [6, 11, 19, 30, 44]),
    ],
)
def test_spectrum_computes_the_published_steps(growth, later) -> None:
    from accel.caches.spectrum import _Windows

    assert computed_steps(_Windows(accel.Spectrum(growth=growth)), 50) == [0, 1, 2, 3, 4, *later]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("slow", "CCCCCCCCsCCCssCCCssCCssCsssC"),
        ("medium", "CCCCCCsCCsssCCsssCCsssCCsssC"),
        ("fast", "CCCCCCsCsssCssssCsssssCssssC"),
        ("ultra", "CCCCssCsssssCssssssCsssssssC"),
    ],
)
def test_step_mask_presets_are_the_published_masks(name, steps) -> None:
    entries = preset(name)
    assert "".join("sC"[entry] for entry in entries) == steps
    assert computed_steps(Table(entries), 28) == [i for i, c in enumerate(steps) if c == "C"]


def test_step_mask_stretches_over_a_longer_run() -> None:
    assert computed_steps(Table((1, 0, 1)), 6) == [0, 1, 4, 5]


def test_spectrum_extrapolates_in_a_real_run() -> None:
    tiny = TINY["wan21"]()
    with accel.patched(tiny.pipe, accel.Spectrum(warmup=3)):
        result = run(tiny)
        report = accel.stats(tiny.pipe)
    assert torch.isfinite(result).all()
    assert {row.verdict for row in report.rows} == {"computed", "extrapolated"}


@pytest.mark.parametrize("mask", ["slowest", (), (0, 1), (1, 2)])
def test_wrong_masks_are_named(mask) -> None:
    with pytest.raises(accel.AccelError, match="mask must be"):
        accel.StepMask(mask)


@pytest.mark.parametrize(
    "wrong", [{"growth": -1}, {"window": 0.5}, {"warmup": 0}, {"growth": float("nan")}]
)
def test_wrong_spectrum_settings_are_named(wrong) -> None:
    with pytest.raises(accel.AccelError, match=next(iter(wrong))):
        accel.Spectrum(**wrong)
