"""The adaptive methods' rules on scripted signals, against verdicts found by hand."""

from dataclasses import dataclass

import pytest
import torch
from contract_cases import context_at

import accel
from accel.caches import easy_cache, first_block_cache, tea_cache
from accel.site import Branch, Computed, mean_change

COND, UNCOND = Branch("cond", 0), Branch("uncond", 1)


@dataclass
class Scripted:
    """Signals made of plain numbers."""

    hidden: torch.Tensor
    entry: torch.Tensor
    observed: torch.Tensor

    def mean_change(self, new, old, scale=None) -> float:
        return mean_change(new, old, scale)

    def relative_change(self, new, old) -> float:
        return mean_change(new, old, old)


def signals(hidden: float = 0.0, observed: float = 0.0) -> Scripted:
    return Scripted(torch.tensor([hidden]), torch.tensor([0.0]), torch.tensor([observed]))


def drive(policy, script: list[Scripted], outputs: list[float] | None = None) -> str:
    """Verdicts of one branch, driven as the engine drives it: C computed, R reused."""
    verdicts, skipped = "", 0
    for step, given in enumerate(script):
        context = context_at(step, len(script), COND, skipped)
        if policy.skip(context, given) and verdicts:
            verdicts, skipped = verdicts + "R", skipped + 1
        else:
            value = (torch.tensor([outputs[step] if outputs else 0.0]),)
            policy.computed(context, given, Computed(value, value, value))
            verdicts, skipped = verdicts + "C", 0
    return verdicts


def probe(**settings):
    return first_block_cache._Probe(accel.FirstBlockCache(**settings))


def test_first_block_cache_compares_with_the_last_computed_step() -> None:
    script = [signals(value) for value in (1.0, 1.06, 1.12, 1.18, 1.24)]
    assert drive(probe(threshold=0.1), script) == "CRCRC"


def test_first_block_cache_guards() -> None:
    same = [signals(1.0)] * 8
    assert drive(probe(threshold=0.1), same) == "CRRRRRRR"
    assert drive(probe(threshold=0.1, warmup=3), same) == "CCCRRRRR"
    assert drive(probe(threshold=0.1, max_skips=2), same) == "CRRCRRCR"


def tea(**settings):
    return tea_cache._Accumulate(accel.TeaCache(polynomial=(1.0, 0.0), **settings))


def test_tea_cache_accumulates_over_consecutive_steps() -> None:
    script = [signals(observed=1.1**step) for step in range(8)]
    assert drive(tea(threshold=0.25), script) == "CRRCRRCC"


def test_tea_cache_updates_its_reference_on_skipped_steps() -> None:
    script = [signals(observed=value) for value in (1.0, 1.2, 1.2, 1.2, 1.2, 1.2)]
    assert drive(tea(threshold=0.25), script) == "CRRRRC"


def test_tea_cache_does_not_run_backwards() -> None:
    falling = accel.TeaCache(threshold=0.1, polynomial=(-5.0, 0.06), domain=(0.0, 0.001))
    script = [signals(observed=2.0**step) for step in range(6)]
    assert drive(tea_cache._Accumulate(falling), script) == "CRCRCC"


def easy(**settings):
    return easy_cache._Accumulate(accel.EasyCache(**settings))


def test_easy_cache_takes_its_rate_from_consecutive_computed_steps() -> None:
    script = [signals(float(step)) for step in range(8)]
    outputs = [10.0 + step for step in range(8)]
    # the rate is 1; each step adds 1/|v| of the last computed output, 0.09 or less
    assert drive(easy(threshold=0.2, warmup=2), script, outputs) == "CCRRCRRC"


def test_easy_cache_lets_the_first_branch_decide() -> None:
    leader = easy(threshold=1e9, warmup=1)
    follower = easy_cache._Follow([leader])
    script = [signals(float(step)) for step in range(5)]
    for step, given in enumerate(script):
        context = context_at(step, 5, COND)
        if not leader.skip(context, given):
            value = (torch.tensor([1.0 + step]),)
            leader.computed(context, given, Computed(value, value, value))
        assert follower.skip(context_at(step, 5, UNCOND), given) == leader.skipped
    assert leader.skipped is False, "the last step is computed"


@pytest.mark.parametrize("policy", [probe(threshold=0.5), tea(threshold=0.5), easy(threshold=0.5)])
def test_values_that_are_not_numbers_force_a_compute(policy) -> None:
    bad = float("nan")
    assert "R" not in drive(policy, [signals(bad, bad)] * 4, [bad] * 4)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (accel.FirstBlockCache, {"threshold": -0.1}),
        (accel.FirstBlockCache, {"probe_blocks": 0}),
        (accel.FirstBlockCache, {"max_skips": 0}),
        (accel.EasyCache, {"threshold": "a"}),
        (accel.EasyCache, {"warmup": 0}),
        (accel.TeaCache, {"polynomial": ()}),
        (accel.TeaCache, {"domain": (1.0, 0.0)}),
        (accel.PlainCycle, {"interval": 0}),
        (accel.PlainCycle, {"warmup": -1}),
    ],
)
def test_wrong_settings_are_named(kind, wrong) -> None:
    with pytest.raises(accel.AccelError, match=f"{kind.__name__}.*{next(iter(wrong))}"):
        kind(**wrong)
