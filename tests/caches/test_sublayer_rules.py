"""The rules of methods that skip layers inside blocks, against hand-made and published lists."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from contract_cases import context_at
from tiny_pipelines import built, run

import accel
from accel.caches import ada_cache, bac, deep_cache, erta_cache, smooth_cache, spe_ca
from accel.caches.faster_cache import _Window as FasterWindow
from accel.caches.pyramid_attention_broadcast import _Broadcast
from accel.caches.schedules import Cycle
from accel.site import Computed
from accel.sublayer import Sublayer


class Changes:
    """Signals whose every change is the next of a script."""

    def __init__(self, *changes: float) -> None:
        self.changes = list(changes)

    def mean_change(self, new, old, scale=None) -> float:
        return self.changes.pop(0)

    relative_change = mean_change


def skipped_steps(policy, total: int) -> list[int]:
    skipped, found = 0, []
    for step in range(total):
        context = context_at(step, total, skipped=skipped)
        if policy.skip(context, None):
            skipped += 1
            found.append(step)
        else:
            policy.computed(context, None, None)
            skipped = 0
    return found


def test_taylor_seer_computes_the_published_steps() -> None:
    skipped = skipped_steps(Cycle(6, 3), 50)
    assert sorted(set(range(50)) - set(skipped)) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]


def test_faster_cache_skips_the_published_steps() -> None:
    open_sora = FasterWindow(accel.FasterCache(interval=2, start=7 / 30))
    assert skipped_steps(open_sora, 30) == list(range(7, 30, 2))
    cog = FasterWindow(accel.FasterCache(interval=3, start=18 / 50))
    assert skipped_steps(cog, 50) == [s for s in range(18, 50) if (s - 18) % 3 != 2]


def test_faster_cache_counts_the_steps_that_image_to_image_makes() -> None:
    """As the weight of its extrapolation does: a share of the run, not of the schedule."""
    window = FasterWindow(accel.FasterCache(start=0.5))
    made = [replace(context_at(step, 8), place=8 + step) for step in range(8)]
    assert [window.skip(each, None) for each in made] == [False] * 4 + [True] * 4


def test_faster_cache_extrapolates_ever_more() -> None:
    history = accel.GrowingLine(0.0, 1.0).start(11)
    for step, value in ((0, 1.0), (2, 3.0)):
        history.update(step, (torch.tensor([value]),), None)
    assert history.predict(5, None)[0].item() == pytest.approx(3 + 0.5 * 2)
    assert history.predict(10, None)[0].item() == pytest.approx(3 + 1.0 * 2)


def test_broadcast_reuses_inside_its_window_only() -> None:
    assert skipped_steps(_Broadcast((100, 800), 2), 10) == [3, 5, 7]
    assert skipped_steps(_Broadcast((100, 800), 4), 10) == [3, 4, 5, 7, 8]


def test_smooth_cache_takes_the_longest_reuse_that_fits() -> None:
    one = [0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1]
    two = [0.2, 0.2, 0.2, 0.5, 0.2, 0.2, 0.2, 0.2]
    three = [0.3] * 8
    assert smooth_cache.schedule((one, two, three), 0.15) == (1, 0, 1, 0, 1, 0, 1, 1)
    assert smooth_cache.schedule((one, two, three), 0.25) == (1, 0, 0, 1, 1, 0, 0, 1)
    assert smooth_cache.schedule((one, two, three), 0.0) == (1,) * 8


@pytest.mark.parametrize("kind", [accel.SmoothCache, accel.BAC, accel.ERTACache])
@pytest.mark.parametrize("family", ["wan21", "sd15"])
def test_the_first_run_measures(kind, family) -> None:
    tiny, baseline = built(family)
    setting = {"share": 0.5} if kind is accel.BAC else {"threshold": 2.0}
    with accel.patched(tiny.pipe, kind(**setting)) as handle:
        assert handle.methods[0].unmeasured
        assert torch.equal(run(tiny), baseline)
        (settled,) = handle.methods
        assert not settled.unmeasured
        result = run(tiny)
        assert handle.report().hit_rate > 0.1
    with accel.patched(tiny.pipe, settled):
        assert torch.equal(run(tiny), result)


def test_bac_computes_what_the_measured_expert_did_not_run() -> None:
    tiny, _ = built("wan22")
    with accel.patched(tiny.pipe, accel.BAC(share=0.5)) as handle:
        run(tiny, num_inference_steps=16)
        rows = handle.report().rows
        (settled,) = handle.methods
    (first, second) = ({row.step for row in rows if row.denoiser == n} for n in experts(rows))
    assert first and second
    assert all(row[step] for row in settled.schedules for step in second)
    assert any(not row[step] for row in settled.schedules for step in first)


def experts(rows) -> list[str]:
    return list(dict.fromkeys(row.denoiser for row in rows))


def test_bac_keeps_a_sample_and_not_the_output() -> None:
    measured = bac._Measurement()
    output = (torch.randn(1, 64, bac.SAMPLES),)
    bac._Watch(measured, 0).computed(context_at(0, 4), None, Computed(output, output, output))
    (sample,) = measured.samples[0].values()
    assert sample.untyped_storage().nbytes() <= 2 * 4 * bac.SAMPLES


def test_smooth_cache_names_the_kinds_without_errors() -> None:
    tiny, _ = built("wan21")
    rows = ((0.1,) * 8,) * smooth_cache.LAGS
    with pytest.raises(accel.AccelError, match="nothing for the cross layers"):
        accel.patch(tiny.pipe, accel.SmoothCache(errors={"self": rows, "mlp": rows}))


def test_bac_schedules_equal_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        similarity = generator.random((8, 8))
        for refreshes in (1, 2, 3, 5):

            def kept(steps, similarity=similarity) -> float:
                ends = (*steps[1:], 8)
                spans = zip(steps, ends, strict=True)
                return sum(similarity[i, i + 1 : j].sum() for i, j in spans)

            every = ((0, *rest) for rest in itertools.combinations(range(1, 8), refreshes - 1))
            found = bac.best_refreshes(similarity, refreshes)
            assert kept(found) == pytest.approx(max(map(kept, every)))


def test_adjacent_bac_refreshes_where_neighbours_differ_most() -> None:
    similarity = np.eye(6)
    for step, value in enumerate([0.9, 0.2, 0.8, 0.1, 0.95], 1):
        similarity[step - 1, step] = value
    assert bac.best_refreshes(similarity, 3, adjacent=True) == [0, 2, 4]


def test_bubbling_joins_the_mlps_below() -> None:
    rows = [{0, 3}, {0, 5}, {0, 2}, {0, 4}]
    joined = bac.bubble(rows, [9.0, 1.0, 5.0, 1.0], [None, 0, None, 1], [0, 0, 1, 1], 2)
    assert joined == [{0, 3, 4, 5}, {0, 5}, {0, 2, 4}, {0, 4}]
    assert all(new >= old for new, old in zip(joined, rows, strict=True))


def run_ada(settings: accel.AdaCache, total: int, *changes: float) -> list[int]:
    rate, signals = ada_cache._Rate(settings), Changes(*changes)
    layers = [ada_cache._Layer(rate, False), ada_cache._Layer(rate, True)]
    computed = []
    for step in range(total):
        context = context_at(step, total)
        verdicts = [layer.skip(context, signals) for layer in (*layers, layers[0])]
        assert len(set(verdicts)) == 1, "one verdict a step"
        if not verdicts[0]:
            computed.append(step)
            output = (torch.zeros(1, 1, 1),)
            for layer in layers:
                layer.computed(context, signals, Computed(output, output, output))
    return computed


def test_ada_cache_follows_its_codebook() -> None:
    book = ((0.1, 4), (0.2, 2))
    assert run_ada(accel.AdaCache(codebook=book), 12, 0.05, 0.6, 9, 9, 9, 9, 9) == [
        *(0, 1, 5, 7),
        *(8, 9, 10, 11),
    ], "0.6 over four steps is 0.15: two steps"


def test_ada_cache_observes_the_attention_nearest_to_the_middle() -> None:
    double = [Sublayer(kind, n, None, (kind,)) for n in range(4) for kind in ("self", "mlp")]
    single = [Sublayer("fused", n, None, ("proj_out",)) for n in range(4, 12)]
    assert ada_cache.observer(double) == 2
    assert ada_cache.observer(double + single) == 6
    assert ada_cache.observer(single) == 0


def test_ada_cache_motion_needs_a_video() -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, accel.AdaCache(motion=True, codebook=((1e6, 2),))) as handle:
        assert torch.isfinite(run(tiny)).all()
        assert handle.report().hit_rate > 0
    still, _ = built("sd3")
    message = "video of at least two"
    with (
        accel.patched(still.pipe, accel.AdaCache(motion=True)),
        pytest.raises(accel.AccelError, match=message),
    ):
        run(still)


def test_spe_ca_verdict_comes_one_step_late() -> None:
    drafts = spe_ca._Drafts(accel.SpeCa(threshold=0.5, floor=0.5, least=2, most=4, warmup=2))
    errors, letters = [0.1, 0.9, 0.1], ""
    for step in range(12):
        draft = drafts.begin(context_at(step, 12))
        letters += "d" if draft else "C"
        if draft and drafts.made >= 2 and errors:
            drafts.judge(context_at(step, 12), errors.pop(0))
    assert letters == "CCdddCddddCd"


@pytest.mark.parametrize("family", ["wan21", "flux_cfg"])
def test_spe_ca_computes_the_last_block_on_verified_drafts(family) -> None:
    tiny, _ = built(family)
    method = accel.SpeCa(threshold=1e9, least=2, most=3, warmup=2)
    with accel.patched(tiny.pipe, method) as handle:
        run(tiny)
        rows = [row for row in handle.report().rows if row.branch == "cond"]
    assert [row.blocks_run for row in rows if row.verdict != "computed"] == [0, 1, 1, 0, 1]


def test_erta_cache_scales_what_it_reuses() -> None:
    errors = erta_cache._Errors(3).begin(1)
    for step, size in enumerate([1.0, 2.0, 3.0, 4.0]):
        kept = (torch.full((1, 2), size),)
        errors.computed(context_at(step, 4), None, Computed(kept, kept, kept))
    assert errors.scales(0.1) == pytest.approx([0.0, 2.0, 3.0, 0.0])
    assert errors.scales(0.0) == [0.0] * 4


def test_crowded_steps_lie_around_the_centre() -> None:
    steps = deep_cache.crowded(50, 10, 0.3, 1.4)
    assert steps[0] == 0
    assert len(steps) == len(set(steps)) == 10
    gaps = np.diff(steps)
    nearest = int(np.argmin(np.abs(np.array(steps[:-1]) - 15)))
    assert gaps[nearest] == min(gaps)
    assert gaps[-1] == max(gaps)
