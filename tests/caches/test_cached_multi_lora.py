"""Cached Multi-LoRA: turns, weights, refresh steps, and the mean of single passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_pipelines import TINY, Tiny, built, run

import accel
from accel.caches.cached_multi_lora import _Turns

peft = pytest.importorskip("peft")


def with_loras(*names: str) -> Tiny:
    tiny = TINY["sd15"]()
    for number, name in enumerate(names):
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"])
        tiny.pipe.unet.add_adapter(config, adapter_name=name)
        torch.manual_seed(number)
        for path, parameter in tiny.pipe.unet.named_parameters():
            if "lora_B" in path and name in path:
                parameter.data.normal_(std=0.5)
    tiny.pipe.unet.set_adapters(list(names))
    return tiny


def test_refresh_steps_are_the_published_ones() -> None:
    steps = accel.CachedMultiLoRA().refreshes(220)
    assert steps == [*range(0, 81, 2), *range(82, 191, 3), *range(192, 219, 2)]
    assert len(steps) == 92


def test_turns_rotate_and_late_ones_enter() -> None:
    turns = _Turns(accel.CachedMultiLoRA(interval=1, late=("sky",)), ("a", "b"))
    leaders = [turns.dominant(step, 20) for step in range(20)]
    assert leaders[:4] == ["a", "b", "a", "b"]
    assert set(leaders[:11]) == {"a", "b"}
    assert set(leaders[11:]) == {"b", "sky"}


def test_weights_sum_to_one_and_dominance_fades() -> None:
    turns = _Turns(accel.CachedMultiLoRA(interval=1), ("a", "b", "c"))
    shares = []
    for step in range(30):
        weights = turns.weights(step, 30)
        assert sum(weights) == pytest.approx(1)
        assert max(weights) == weights[("a", "b", "c").index(turns.dominant(step, 30))]
        shares.append(max(weights))
    assert shares[0] == pytest.approx(3 * 2.5 / 4.5 / 3)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(1 / 3)
    between = _Turns(accel.CachedMultiLoRA(interval=3), ("a", "b"))
    assert between.dominant(1, 9) is None
    assert between.weights(1, 9) == [0.5, 0.5]


def test_one_step_is_the_weighted_mean_of_single_passes() -> None:
    """One deterministic step is linear in the prediction, guidance included."""
    tiny = with_loras("ink", "sepia")
    singles = []
    for name in ("ink", "sepia"):
        tiny.pipe.unet.set_adapters([name])
        singles.append(run(tiny, num_inference_steps=1))
    tiny.pipe.unet.set_adapters(["ink", "sepia"])
    together = run(tiny, num_inference_steps=1)
    with accel.patched(tiny.pipe, accel.CachedMultiLoRA()):
        result = run(tiny, num_inference_steps=1)
    first = 1.5 / 2.5  # c = 1.5 of two: weights 2·1.5/2.5 and 2/2.5, over two
    expected = first * singles[0] + (1 - first) * singles[1]
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(result, together, rtol=1e-3)
    assert torch.equal(run(tiny, num_inference_steps=1), together)


def test_passes_are_full_in_turns_and_start_fresh() -> None:
    tiny = with_loras("ink", "sepia", "trophy")
    untouched = run(tiny)
    with accel.patched(tiny.pipe, accel.CachedMultiLoRA(interval=2)) as handle:
        first = run(tiny)
        verdicts = handle.report().verdicts
        assert torch.equal(run(tiny), first)
    assert verdicts == {
        "unet/ink": "CRRRRRCR",
        "unet/sepia": "CRCRRRRR",
        "unet/trophy": "CRRRCRRR",
    }
    assert Counter("".join(verdicts.values()))["C"] == 6
    assert torch.equal(run(tiny), untouched)
    assert not torch.equal(first, untouched)


def test_too_few_loras_and_other_models_are_refused() -> None:
    tiny = with_loras("ink")
    with pytest.raises(accel.AccelError, match=r"at least two loaded LoRAs.*ink"):
        accel.patch(tiny.pipe, accel.CachedMultiLoRA())
    with pytest.raises(accel.AccelError, match="at least two loaded LoRAs"):
        accel.patch(tiny.pipe, accel.CachedMultiLoRA(adapters=("ink", "none")))
    with pytest.raises(accel.AccelError, match="different names"):
        accel.CachedMultiLoRA(adapters=("ink", "ink"))
    other, baseline = built("wan21")
    with pytest.raises(accel.AccelError, match="needs a U-Net"):
        accel.patch(other.pipe, accel.CachedMultiLoRA())
    assert torch.equal(run(other), baseline)
