"""Principal attention: all directions are exact attention; fewer stay near it and mix nothing."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import TINY, built, run

import accel
from accel import PrincipalAttention
from accel.kernels import principal_attention as part

FITS = ["flux", "sd3", "wan21", "cogvideox", "ltx", "dit", "pixart", "sd15"]


def low_rank(rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of two heads that lie in `rank` directions, (1, 2, 40, 32)."""
    generator = torch.Generator().manual_seed(seed)
    space = torch.randn(1, 2, rank, 32, generator=generator)
    query, key = (torch.randn(1, 2, 40, rank, generator=generator) for _ in range(2))
    return query @ space, key @ space


@pytest.mark.parametrize("tiny", FITS, indirect=True)
def test_every_direction_is_the_untouched_run(tiny, baseline) -> None:
    name = next(key for key in TINY if built(key)[0] is tiny)
    with accel.patched(tiny.pipe, PrincipalAttention(variance=1.0)):
        assert torch.equal(run(tiny), baseline(name))
    assert torch.equal(run(tiny), baseline(name))


def test_scores_of_low_rank_heads_are_kept_exactly() -> None:
    query, key = low_rank(8)
    basis = part.directions(part.second_moments(query, key), 0.999999)
    assert basis.shape == (1, 2, 32, 8)
    torch.testing.assert_close(
        (query @ basis) @ (key @ basis).mT, query @ key.mT, rtol=1e-4, atol=1e-3
    )


def test_the_directions_are_the_fewest_with_their_variance() -> None:
    query, key = low_rank(20, seed=1)
    moments = part.second_moments(query, key)
    basis = part.directions(moments, 0.9)
    total = moments.diagonal(dim1=-2, dim2=-1).sum(-1)
    for head in range(2):
        columns = basis[0, head][:, basis[0, head].norm(dim=0) > 0]
        held = [float((c @ moments[0, head] @ c) / total[0, head]) for c in columns.T]
        assert sum(held) >= 0.9 > sum(held[:-1])
    assert basis.shape[-1] % part.MULTIPLE == 0


def test_grouped_keys_count_for_each_of_their_queries() -> None:
    query, key = low_rank(8)
    wide = part.second_moments(query, key[:, :1].expand(-1, 2, -1, -1))
    torch.testing.assert_close(part.second_moments(query, key[:, :1]), wide)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    (q1, k1), (q2, k2) = low_rank(8), low_rank(20, seed=2)
    alone = part.directions(part.second_moments(q1, k1), 0.9)
    both = part.directions(part.second_moments(torch.cat((q1, q2)), torch.cat((k1, k2))), 0.9)
    width = alone.shape[-1]
    torch.testing.assert_close(both[:1, ..., :width].abs(), alone.abs(), rtol=1e-3, atol=1e-4)
    assert not both[:1, ..., width:].any()


def test_a_sample_that_needs_every_direction_changes_no_other() -> None:
    low, full = low_rank(8)[0], torch.eye(40, 32).expand(1, 2, -1, -1)
    alone = part.directions(part.second_moments(low, low), 0.99)
    both = part.directions(part.second_moments(*[torch.cat((low, full))] * 2), 0.99)
    assert part.directions(part.second_moments(full, full), 0.99) is None
    assert alone is not None
    assert both is not None
    width = alone.shape[-1]
    assert width < both.shape[-1] == 32
    torch.testing.assert_close(both[:1, ..., :width].abs(), alone.abs(), rtol=1e-3, atol=1e-4)
    assert not both[:1, ..., width:].any()
    scores = (full @ both[1:]) @ (full @ both[1:]).mT
    torch.testing.assert_close(scores, full @ full.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "wan21"])
def test_runs_start_fresh_and_leave_nothing(name: str) -> None:
    tiny, _ = built(name)
    before = run(tiny)
    with accel.patched(tiny.pipe, PrincipalAttention(variance=0.5)):
        first, second = run(tiny), run(tiny)
    assert torch.equal(first, second)
    assert not torch.equal(first, before)
    assert torch.isfinite(first).all()
    assert torch.equal(run(tiny), before)


@pytest.mark.parametrize("settings", [{"variance": 0.0}, {"variance": 1.5}, {"warmup": 0}])
def test_settings_are_checked(settings) -> None:
    with pytest.raises(accel.AccelError, match="PrincipalAttention"):
        PrincipalAttention(**settings)
