"""UniCP: windows grow and close, and outside of them pruned attention is blended with the cache."""

from __future__ import annotations

import pytest
import torch
from contract_cases import context_at
from tiny_pipelines import built, run

import accel
from accel.caches import uni_cp
from accel.kernels.principal_attention import PrincipalAttention
from accel.site import Computed


class Changes:
    """Signals whose every change is the next of a script."""

    def __init__(self, *changes: float) -> None:
        self.changes = list(changes)

    def relative_change(self, new, old) -> float:
        return self.changes.pop(0)


class Always:
    """A pruning that prunes whatever it may, and says what it was allowed."""

    def __init__(self) -> None:
        self.allowed: list[bool] = []

    def allow(self, attention, allowed) -> None:
        self.allowed.append(allowed)

    def pruned(self, attention) -> bool:
        return self.allowed[-1]


def test_windows_grow_and_close() -> None:
    settings = accel.UniCP(threshold=0.1, spike=0.4, widest=2, warmup=1)
    policy = uni_cp._Window(settings, object(), None)
    signals, output = Changes(0.01, 0.02, 0.6, 9.0, 0.01, 0.01), (torch.zeros(1),)
    skipped, letters = 0, ""
    for step in range(12):
        context = context_at(step, 12, skipped=skipped)
        skip = policy.skip(context, signals)
        letters += "R" if skip else "C"
        skipped = skipped + 1 if skip else 0
        if not skip:
            policy.computed(context, signals, Computed(output, output, output))
    assert letters == "CCRCRRCRCCRC"


def test_the_pruned_output_takes_over_as_the_error_rises() -> None:
    pruning = Always()
    policy = uni_cp._Window(accel.UniCP(threshold=0.1, widest=0, warmup=1), None, pruning)
    signals, handed = Changes(0.05, 0.1, 0.3, 0.9, 0.01, 0.01), []
    for step in range(7):
        context, output = context_at(step, 7), (torch.full((1,), float(step)), None)
        assert not policy.skip(context, signals)
        policy_output = policy.computed(context, signals, Computed(output, output, output))
        handed.append(float((policy_output or output)[0]))
    # full; half of 0 and 1; all of 2, 3 and 4; after the spike at 4 in full; in full at the end
    assert handed == [0, 0.5, 2, 3, 4, 5, 6]
    assert pruning.allowed == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("threshold", [0.01, 0.3, 1e9])
def test_equals_the_rule_written_as_hooks(threshold: float) -> None:
    """Beside PrincipalAttention alone, plain forward hooks blend as the rule says."""
    total, variance = 6, 0.5
    tiny, _ = built("wan21")

    def latents(*methods, hooks=()) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def keep(_pipe, _step, _timestep, values):
            seen.append(values["latents"].clone())
            return {}

        with accel.patched(tiny.pipe, *methods):
            handles = [module.register_forward_hook(hook) for module, hook in hooks]
            run(tiny, num_inference_steps=total, callback_on_step_end=keep)
            for handle in handles:
                handle.remove()
        return seen

    def blending():
        old: dict[int, torch.Tensor] = {}
        calls = iter(range(2 * total))

        def hook(_module, _inputs, output):
            call = next(calls)
            branch = call % 2
            if branch in old and call // 2 >= 1:
                error = float((output - old[branch]).abs().mean() / old[branch].abs().mean())
                weight = min(error / threshold, 1.0)
                output = weight * output + (1 - weight) * old[branch]
            old[branch] = output
            return output

        return hook

    hooks = [(block.attn1, blending()) for block in tiny.pipe.transformer.blocks]
    wanted = latents(PrincipalAttention(variance, warmup=1 / total), hooks=hooks)
    method = accel.UniCP(threshold=threshold, spike=1e9, widest=0, warmup=1, variance=variance)
    found = latents(method)
    for step in range(total - 1):  # the last step is computed in full
        torch.testing.assert_close(found[step], wanted[step], rtol=1e-4, atol=1e-5)
    plain = latents(PrincipalAttention(variance, warmup=1 / total))
    switched = torch.allclose(found[-2], plain[-2], rtol=1e-4, atol=1e-5)
    assert switched == (threshold == 0.01)  # far over the threshold the pruned output is all


@pytest.mark.parametrize("name", ["flux", "wan21", "qwen_image", "hunyuan_video"])
def test_pruning_starts_fresh_and_leaves_nothing(name: str) -> None:
    tiny, _ = built(name)
    before = run(tiny)
    with accel.patched(tiny.pipe, accel.UniCP(threshold=0.3, variance=0.5)):
        first, second = run(tiny), run(tiny)
    with accel.patched(tiny.pipe, accel.UniCP(threshold=0.3)):
        unpruned = run(tiny)
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, unpruned)
    assert torch.equal(run(tiny), before)


@pytest.mark.parametrize("variance", [0, -0.1, 1.5, True, "most"])
def test_variance_is_checked(variance) -> None:
    with pytest.raises(accel.AccelError, match="variance"):
        accel.UniCP(variance=variance)
