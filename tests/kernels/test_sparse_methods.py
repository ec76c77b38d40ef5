"""SpargeAttn, Radial and Sparse VideoGen: their masks, and dense attention where all is kept."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_kontext import kontext
from tiny_others import OTHERS
from tiny_pipelines import TINY, built, run

import accel
from accel import RadialAttention, SpargeAttention, SparseVideoGen
from accel.attention_calls import AttentionCall, intercept, self_attention
from accel.geometry import picture_start
from accel.kernels import sparge_attention, sparse_blocks, sparse_video_gen
from accel.kernels.radial_attention import radial_blocks

SMALL = {"tile": (1, 4, 4), "least": 16, "warmup": 0.0}
CPU = torch.device("cpu")
DENSE = [SpargeAttention(topk=1.0, **SMALL), SpargeAttention(mass=1.0, **SMALL)]
DENSE += [RadialAttention(decay=1e6, **SMALL), SparseVideoGen(keep=1.0, **SMALL)]
SPARSE = [SpargeAttention(topk=0.3, **SMALL), RadialAttention(decay=0.01, sink=False, **SMALL)]
SPARSE += [SparseVideoGen(keep=0.34, **SMALL)]


def called(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(query=query, key=key, value=value, scale=None)


@pytest.mark.parametrize("tiny", ["flux", "wan21", "cogvideox", "ltx", "pixart"], indirect=True)
@pytest.mark.parametrize("method", DENSE, ids=repr)
def test_everything_kept_is_dense_attention(method, tiny, baseline) -> None:
    name = next(key for key in TINY if built(key)[0] is tiny)
    right = baseline(name)
    with accel.patched(tiny.pipe, method):
        assert float((run(tiny) - right).abs().max() / right.abs().max()) < 5e-5
    assert torch.equal(run(tiny), right)


@pytest.mark.parametrize("method", SPARSE, ids=repr)
def test_less_is_kept_and_rows_do_not_mix(method, monkeypatch) -> None:
    tiny, _ = built("ltx")
    seen, inner = [], sparse_blocks.block_sparse_attention

    def look(query, key, value, mask, **options):
        seen.append(mask)
        return inner(query, key, value, mask, **options)

    monkeypatch.setattr(sparse_blocks, "block_sparse_attention", look)
    with accel.patched(tiny.pipe, method):
        result = run(tiny, num_inference_steps=2)
    assert torch.isfinite(result).all() and seen
    assert any(not mask.all() for mask in seen)
    assert all(bool(mask.any(-1).all()) for mask in seen)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=2), method):
        assert torch.isfinite(run(tiny, num_inference_steps=4)).all()


JOINT = ["flux", "qwen_image", "cogvideox", "sd3", "mochi", "hunyuan_video"]


@pytest.mark.parametrize("name", [*JOINT, "kontext", "cogview4", "aura_flow"])
def test_the_grid_lies_on_the_tokens_that_the_noise_decides(name) -> None:
    """In the first layer of the first step; text and reference pictures are the same there."""
    tiny = built(name)[0] if name in TINY else kontext() if name == "kontext" else OTHERS[name]()
    seen = list[tuple[torch.Tensor, int, int]]()
    with accel.patched(tiny.pipe, accel.PlainCycle(1)) as handle:
        denoiser = handle._denoisers[0]

        def look(call: AttentionCall) -> torch.Tensor:
            if denoiser.forward is None:  # the call from which the chain is learned
                return call.plain()
            arguments = denoiser.forward.arguments
            grid, tokens = denoiser.grid(arguments), call.query.shape[2]
            start = picture_start(denoiser.family, arguments, tokens, grid)
            seen.append((call.query.clone(), start, math.prod(grid)))
            return call.plain()

        with intercept(denoiser, self_attention(denoiser, "a test")[:1], look):
            run(tiny, num_inference_steps=2)
            middle = len(seen)
            run(tiny, num_inference_steps=2, generator=torch.Generator().manual_seed(1))
    (one, start, count), (two, *_) = seen[0], seen[middle]
    changed = (one != two).flatten(0, 1).any(0).any(-1).nonzero().flatten()
    assert changed.tolist() == list(range(start, start + count))
    assert count < one.shape[2]


def test_layers_whose_text_is_not_known_stay_dense(monkeypatch, caplog) -> None:
    tiny, latents = built("sd3")
    with accel.patched(tiny.pipe, SpargeAttention(topk=0.3, **SMALL)) as handle:
        denoiser = handle._denoisers[0]
        monkeypatch.setattr(denoiser, "family", replace(denoiser.family, text=None))
        assert torch.equal(run(tiny), latents)
    assert "stays dense: which of its tokens are text is not known" in caplog.text


def test_sparge_keeps_the_best_blocks_and_all_of_unlike_ones() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 96, 8) + 4 * torch.randn(2, 1, 2, 96, 8).mean(-2, True)
    query[:, 0, :16] = torch.randn(16, 8) * torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    method = SpargeAttention(topk=0.5, similarity=0.3, **SMALL)
    mask = method._choose(called(query, key, key), (6, 4, 4), 0)
    scores = (
        torch.stack([b.mean(-2) for b in query.split(16, 2)], 2)
        @ torch.stack([b.mean(-2) for b in key.split(16, 2)], 2).mT
    )
    alike = [sparge_attention.likeness(each, 16) for each in (query, key)]
    assert alike[0][0, 0, 0] < 0.3
    for head, row in itertools.product(range(2), range(6)):
        if alike[0][0, head, row] < 0.3:
            assert bool(mask[0, head, row].all())
            continue
        free = alike[1][0, head] >= 0.3
        assert bool(mask[0, head, row][~free].all())
        best = scores[0, head, row].masked_fill(~free, -math.inf).topk(3).indices
        assert bool(mask[0, head, row][best].all())
    pairs = torch.nn.functional.normalize(key[0, 0, :16], dim=-1)
    assert float(alike[1][0, 0, 0]) == pytest.approx(float((pairs @ pairs.T).mean()), abs=1e-5)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("decay", [0.1, 0.3, 1.0])
def test_radial_windows_halve_as_frames_get_farther(decay, sink) -> None:
    """Against a loop over pairs of blocks, written from the paper's rule."""
    grid = (9, 8, 8)
    method = RadialAttention(decay=decay, sink=sink, **SMALL)
    found = radial_blocks(method, grid, 36, CPU)
    for one, other in itertools.product(range(36), repeat=2):
        frames, inside = zip(*(divmod(each, 4) for each in (one, other)), strict=True)
        apart, away = abs(frames[0] - frames[1]), 16 * abs(inside[0] - inside[1])
        window = decay * 2 ** (64).bit_length() / 2 ** max(apart, 1).bit_length()
        if apart <= 1 or (sink and frames[1] == 0):
            wanted = True
        elif window >= 16:
            wanted = away <= window
        else:
            wanted = apart % math.ceil(16 / window) == 0 and away < 16
        assert bool(found[one, other]) == wanted, (one, other)


def test_the_two_masks_are_frames_and_places() -> None:
    grid, tile = (6, 8, 8), (1, 4, 4)
    spatial, temporal = sparse_video_gen.two_masks(grid, tile, 24, 0.25, CPU)
    assert spatial.sum(-1).unique().tolist() == temporal.sum(-1).unique().tolist() == [6]
    frame, place = torch.arange(24) // 4, torch.arange(24) % 4
    same_frame, same_place = frame[:, None] == frame[None], place[:, None] == place[None]
    assert bool(spatial[same_frame].all())
    assert torch.equal(temporal, same_place)


def test_each_head_takes_the_mask_that_fits_it() -> None:
    torch.manual_seed(0)
    grid, tile = (6, 8, 8), (1, 4, 4)
    order = sparse_blocks.tile_places(grid, tile, CPU)
    frames = torch.nn.functional.one_hot(order[:, 0], 6).float()
    cells = torch.nn.functional.one_hot(order[:, 1] // 4 * 2 + order[:, 2] // 4, 6).float()
    query = 20 * torch.stack((frames, cells))[None]
    method = SparseVideoGen(keep=0.25, **SMALL)
    mask = method._choose(called(query, query, torch.randn(1, 2, 384, 6)), grid, 0)
    spatial, temporal = sparse_video_gen.two_masks(grid, tile, 24, 0.25, CPU)
    assert torch.equal(mask[0, 0], spatial)
    assert torch.equal(mask[0, 1], temporal)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SpargeAttention, {"topk": 0}, "topk must be"),
        (SpargeAttention, {"mass": 2}, "mass must be"),
        (SpargeAttention, {"similarity": 3}, "similarity must be"),
        (RadialAttention, {"decay": 0}, "decay must be"),
        (RadialAttention, {"tile": (2, 4, 4)}, "tile must be one frame deep"),
        (RadialAttention, {"sink": 1}, "sink must be"),
        (SparseVideoGen, {"keep": 0}, "keep must be"),
        (SparseVideoGen, {"rows": 0}, "rows must be"),
        (SparseVideoGen, {"tile": (1, 5, 5)}, "tile must be"),
    ],
)
def test_wrong_settings_are_refused(kind, settings, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        kind(**settings)
