"""NABLA: everything kept is dense attention; text, and what does not fit, stays dense."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY, built, run

import accel
from accel import NABLA
from accel.kernels import nabla, sparse_blocks

SMALL = {"tile": (1, 4, 4), "least": 16, "warmup": 0.0}
FITS = ["flux", "sd3", "wan21", "cogvideox", "ltx", "dit", "pixart"]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture
def masks(monkeypatch) -> list[torch.Tensor]:
    """The block masks that attention was asked for."""
    seen: list[torch.Tensor] = []
    inner = sparse_blocks.block_sparse_attention

    def look(query: Any, key: Any, value: Any, mask: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(mask)
        return inner(query, key, value, mask, **options)

    monkeypatch.setattr(sparse_blocks, "block_sparse_attention", look)
    return seen


@pytest.mark.parametrize("tiny", FITS, indirect=True)
def test_everything_kept_is_dense_attention(tiny, baseline, masks) -> None:
    name = next(key for key in TINY if built(key)[0] is tiny)
    with accel.patched(tiny.pipe, NABLA(mass=1.0, **SMALL)):
        assert distance(run(tiny), baseline(name)) < 5e-5
    assert masks
    assert all(bool(mask.all()) for mask in masks)
    assert torch.equal(run(tiny), baseline(name))


@pytest.mark.parametrize("tiny", ["flux", "sd3"], indirect=True)
def test_text_always_attends_and_is_attended(tiny, masks) -> None:
    with accel.patched(tiny.pipe, NABLA(mass=0.3, **SMALL)):
        run(tiny, num_inference_steps=2)
    assert masks
    for mask in masks:
        assert bool(mask[..., -1].all())
        assert bool(mask[:, :, -1].all())
    assert not all(bool(mask.all()) for mask in masks)


def test_the_kept_set_is_the_smallest_with_its_mass() -> None:
    """Against a loop over every row; the last block is short."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 37, 8) * 3
    size, mass = 16, 0.7
    found = nabla.kept_blocks(query, key, mass, size)
    means = [torch.stack([p.mean(2) for p in x.split(size, 2)], 2) for x in (query, key)]
    shares = (means[0] @ means[1].mT / 8**0.5).softmax(-1)
    assert found.shape == shares.shape == (2, 3, 3, 3)
    for row, kept in zip(shares.flatten(0, 2), found.flatten(0, 2), strict=True):
        chosen = row[kept].sort().values
        assert float(chosen.sum()) >= mass - 1e-6
        assert float(chosen[1:].sum()) < mass
        assert not kept.all() or float(row.max()) < mass
        assert len(row[~kept]) == 0 or float(row[~kept].max()) <= float(chosen[0]) + 1e-6
    assert bool(nabla.kept_blocks(query, key, 1.0, size).all())
    grouped = nabla.kept_blocks(query.repeat(1, 2, 1, 1), key, mass, size)
    assert grouped.shape[1] == 6


def test_tiles_around_are_kept_too(masks) -> None:
    tiny, _ = built("wan21")  # three frames of one tile
    near = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    with accel.patched(tiny.pipe, NABLA(mass=0.01, window=(1, 0, 0), **SMALL)):
        run(tiny, num_inference_steps=1)
    assert all(bool(mask[..., near].all()) for mask in masks)
    assert not all(bool(mask.all()) for mask in masks)


def test_less_mass_keeps_fewer_blocks(masks, baseline) -> None:
    tiny, _ = built("ltx")
    shares = []
    for mass in (0.99, 0.7, 0.2):
        masks.clear()
        with accel.patched(tiny.pipe, NABLA(mass=mass, **SMALL)):
            result = run(tiny, num_inference_steps=2)
        assert torch.isfinite(result).all()
        shares.append(float(torch.stack([mask.float().mean() for mask in masks]).mean()))
        assert all(bool(mask.any(-1).all()) for mask in masks)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_warm_up_is_dense(masks, baseline) -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, NABLA(mass=0.3, **{**SMALL, "warmup": 1.0})):
        assert torch.equal(run(tiny), baseline("wan21"))
    assert not masks
    with accel.patched(tiny.pipe, NABLA(mass=0.3, **{**SMALL, "warmup": 0.5})):
        run(tiny)
    layers_and_branches = 4 * 2
    assert len(masks) == 4 * layers_and_branches


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("hunyuan_video", SMALL, "it has a mask"),
        ("wan21", {**SMALL, "least": 2048}, "fewer than 2048"),
    ],
)
def test_what_does_not_fit_stays_dense(name, settings, reason, baseline, caplog) -> None:
    tiny, _ = built(name)
    with caplog.at_level(logging.WARNING, "accel"), accel.patched(tiny.pipe, NABLA(**settings)):
        assert torch.equal(run(tiny), baseline(name))
    assert sum(reason in record.message for record in caplog.records) == 1


def test_says_how_much_was_kept(caplog) -> None:
    tiny, _ = built("wan21")
    with caplog.at_level(logging.INFO, "accel"), accel.patched(tiny.pipe, NABLA(**SMALL)):
        run(tiny)
    assert sum("key blocks were kept" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mass": 0}, "mass must be"),
        ({"mass": 1.5}, "mass must be"),
        ({"window": (1, 2)}, "window must be"),
        ({"tile": (1, 5, 5)}, "tile must be"),
        ({"tile": (64,)}, "tile must be"),
        ({"warmup": 2}, "warmup must be"),
        ({"least": 0}, "least must be"),
    ],
)
def test_wrong_settings_are_refused(settings, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        NABLA(**settings)


def test_shares_a_slot_with_other_attention_kernels() -> None:
    tiny, _ = built("wan21")
    with pytest.raises(accel.AccelError, match="'attention' slot"):
        accel.patch(tiny.pipe, NABLA(), accel.Attention())


def test_composes_with_a_cache(masks) -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=2)):
        alone = run(tiny)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=2), NABLA(mass=1.0, **SMALL)):
        assert distance(run(tiny), alone) < 5e-5
    assert masks
