"""The tiny pipelines themselves: without these properties the contract tests would prove little."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_pipelines import STEPS, TINY, built, run

PROMPTED = [name for name in TINY if name != "dit"]
GUIDED = [name for name in TINY if name not in ("flux", "hunyuan_video", "dit")]
SEQUENTIAL = {"flux_cfg", "wan21", "wan22", "qwen_image"}


def change(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new - old).abs().max() / old.abs().max())


@pytest.mark.parametrize("name", TINY)
def test_runs_finite_deterministic_and_seeded(name) -> None:
    tiny, baseline = built(name)
    assert torch.isfinite(baseline).all()
    assert torch.equal(run(tiny), baseline)
    assert change(run(tiny, seed=1), baseline) > 0.1


@pytest.mark.parametrize("name", ["flux", "wan22", "sdxl"])
def test_two_builds_are_the_same(name) -> None:
    assert torch.equal(run(TINY[name]()), built(name)[1])


@pytest.mark.parametrize("name", PROMPTED)
def test_the_prompt_matters(name) -> None:
    tiny, baseline = built(name)
    assert change(run(tiny, prompt="quick zebra"), baseline) > 1e-3


@pytest.mark.parametrize("name", GUIDED)
def test_the_negative_prompt_matters(name) -> None:
    tiny, baseline = built(name)
    assert change(run(tiny, negative_prompt="quick zebra"), baseline) > 1e-3


def test_the_class_label_matters() -> None:
    tiny, baseline = built("dit")
    assert change(run(tiny, class_labels=[7]), baseline) > 1e-3


def denoiser_calls(name: str) -> tuple[Counter[str], set[int], int]:
    """Forward calls per denoiser, batch sizes seen, and block calls of an untouched run."""
    tiny, _ = built(name)
    calls: Counter[str] = Counter()
    batches: set[int] = set()
    hooks = []

    def watch(component: str, module: torch.nn.Module) -> None:
        def before(_, args, kwargs) -> None:
            calls[component] += 1
            latent = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            batches.add(latent.shape[0])

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    for component in ("transformer", "transformer_2", "unet"):
        module = getattr(tiny.pipe, component, None)
        if module is not None:
            watch(component, module)
    run(tiny)
    for hook in hooks:
        hook.remove()
    return calls, batches, sum(calls.values())


@pytest.mark.parametrize("name", TINY)
def test_guidance_is_active_in_the_way_of_the_family(name) -> None:
    _, batches, total = denoiser_calls(name)
    if name in SEQUENTIAL:
        assert (total, batches) == (2 * STEPS, {1})
    elif name in ("flux", "hunyuan_video"):
        assert (total, batches) == (STEPS, {1})
    else:
        assert (total, batches) == (STEPS, {2})


def test_wan22_uses_both_experts() -> None:
    calls, _, _ = denoiser_calls("wan22")
    assert calls["transformer"] >= 4
    assert calls["transformer_2"] >= 4


@pytest.mark.parametrize("name", TINY)
def test_stacks_are_long_enough_to_skip(name) -> None:
    if name in ("sd15", "sdxl"):
        return
    transformer = built(name)[0].pipe.transformer
    lists = ("blocks", "transformer_blocks", "single_transformer_blocks")
    lengths = [len(getattr(transformer, found)) for found in lists if hasattr(transformer, found)]
    assert lengths
    assert min(lengths) >= 3
