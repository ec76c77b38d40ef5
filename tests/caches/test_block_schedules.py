"""Methods that decide block by block, against replays that run every block and overwrite it."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import built, run

import accel

FAMILY = "pixart"
"""Its blocks take and return one tensor, and its guidance is one batched call a step."""


def replayed(tiny, computes, keeps_output: bool) -> tuple[torch.Tensor, dict[int, list[int]]]:
    """A run in full in which `computes(block, step, new, old)` says what is kept, else reused.

    `old` and `new` are outputs, `old` of the last computed step. Returns the latents, and the
    computed steps of each block.
    """
    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    steps: dict[int, list[int]] = {}
    counts: dict[int, int] = {}
    hooks = []

    def overwrite(index: int):
        def hook(_, args, kwargs, output):
            step = counts[index] = counts.get(index, -1) + 1
            entered = args[0] if args else kwargs["hidden_states"]
            if computes(index, step, output, held.get(index, (None, None))[0]):
                held[index] = (output, output - entered)
                steps.setdefault(index, []).append(step)
                return output
            return held[index][0] if keeps_output else entered + held[index][1]

        return hook

    for index, block in enumerate(tiny.pipe.transformer.transformer_blocks):
        hooks.append(block.register_forward_hook(overwrite(index), with_kwargs=True))
    try:
        return run(tiny), steps
    finally:
        for hook in hooks:
            hook.remove()


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((result - expected).abs().max() / expected.abs().max()) < 2e-5


def blocks(tiny) -> int:
    return len(tiny.pipe.transformer.transformer_blocks)


def total_steps(tiny) -> int:
    return tiny.call["num_inference_steps"]


def test_block_caching_follows_each_row_of_its_table() -> None:
    tiny, _ = built(FAMILY)
    steps = total_steps(tiny)
    table = tuple((0.0, *[0.1 * (1 + row)] * (steps - 1)) for row in range(blocks(tiny)))
    method = accel.BlockCaching(threshold=0.25, changes=table)
    with accel.patched(tiny.pipe, method) as handle:
        result = run(tiny)
        rows = handle.report().rows

    def computes(block: int, step: int, new, old) -> bool:
        period = int(0.25 / (0.1 * (1 + block)) + 1e-9) + 1
        return step % period == 0

    expected, computed = replayed(tiny, computes, keeps_output=False)
    assert_close(result, expected)
    assert computed[0] != computed[1]
    for step, row in enumerate(rows):
        assert row.blocks_run == sum(step in each for each in computed.values())


def test_block_caching_measures_its_table_in_the_first_run(baseline) -> None:
    tiny, _ = built(FAMILY)
    seen: dict[int, list[torch.Tensor]] = {}
    hooks = [
        block.register_forward_hook(
            lambda _, args, kwargs, output, index=index: seen.setdefault(index, []).append(
                output - (args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
        for index, block in enumerate(tiny.pipe.transformer.transformer_blocks)
    ]
    with accel.patched(tiny.pipe, accel.BlockCaching(threshold=10.0)) as handle:
        first = run(tiny)
        for hook in hooks:
            hook.remove()
        assert handle.report().share_computed == 1.0
        run(tiny)
        assert handle.report().hit_rate > 0
        (settled,) = handle.methods
    assert torch.equal(first, baseline(FAMILY))
    for index, residuals in seen.items():
        pairs = zip(residuals[1:], residuals, strict=False)
        wanted = [float((new - old).abs().sum() / new.abs().sum()) for new, old in pairs]
        assert settled.changes[index] == pytest.approx([0.0, *wanted], rel=1e-4)
    again = accel.Recipe.of((settled,)).methods
    assert again == (settled,)


def test_foresight_compares_with_the_warm_up() -> None:
    tiny, _ = built(FAMILY)
    steps, warm = total_steps(tiny), 3
    method = accel.Foresight(gamma=1.0, interval=2, warmup=warm / steps)
    limits: dict[int, float] = {}
    changes: dict[int, float] = {}

    def computes(block: int, step: int, new, old) -> bool:
        past = step - warm
        allowed = past >= 0 and (past + 1) % 2 != 0
        if allowed and changes[block] <= limits[block]:
            return False
        if old is not None:
            changes[block] = float((new - old).square().mean())
            if step < warm:
                limits[block] = changes[block]
        return True

    with accel.patched(tiny.pipe, method) as handle:
        result = run(tiny)
        hit_rate = handle.report().hit_rate
    expected, computed = replayed(tiny, computes, keeps_output=True)
    assert_close(result, expected)
    reused = sum(steps - len(each) for each in computed.values())
    assert reused > 0
    assert hit_rate == pytest.approx(reused / (steps * blocks(tiny)))


@pytest.mark.parametrize("boundary", [0.0, 0.5, 1.0])
def test_delta_dit_skips_the_rear_early_and_the_front_late(boundary) -> None:
    tiny, _ = built(FAMILY)
    share, count, steps = 1 / blocks(tiny), 1, total_steps(tiny)

    def computes(block: int, step: int, new, old) -> bool:
        if step % 2 == 0:
            return True
        if step >= boundary * steps:
            return block >= count
        return block < blocks(tiny) - count

    with accel.patched(tiny.pipe, accel.DeltaDiT(2, share, boundary)) as handle:
        result = run(tiny)
        rows = handle.report().rows
    assert {row.blocks_run for row in rows[1::2]} == {blocks(tiny) - count}
    assert_close(result, replayed(tiny, computes, keeps_output=False)[0])


def test_unet_attention_alone_is_cached_by_block_caching() -> None:
    tiny, _ = built("sd15")
    ran = {"resnet": 0, "attention": 0}
    hooks = []
    for module in tiny.pipe.unet.modules():
        kind = {"ResnetBlock2D": "resnet", "Transformer2DModel": "attention"}.get(
            type(module).__name__
        )
        if kind:

            def count(*_, kind=kind) -> None:
                ran[kind] += 1

            hooks.append(module.register_forward_pre_hook(count))
    run(tiny)
    full = dict(ran)
    ran.update(resnet=0, attention=0)
    with accel.patched(tiny.pipe, accel.BlockCaching(changes=((0.0, 0.1, 0.1),))):
        run(tiny)
    for hook in hooks:
        hook.remove()
    assert ran["resnet"] == full["resnet"]
    assert 0 < ran["attention"] < full["attention"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accel.BlockCaching(threshold=-1), "threshold"),
        (lambda: accel.BlockCaching(changes=((1.0,),)), "at least two numbers"),
        (lambda: accel.BlockCaching(changes=((0.0, float("nan")),)), "at least two numbers"),
        (lambda: accel.Foresight(gamma=-1), "gamma"),
        (lambda: accel.Foresight(interval=1), "interval"),
        (lambda: accel.Foresight(warmup=2), "warmup"),
        (lambda: accel.DeltaDiT(share=0.6), "share"),
        (lambda: accel.DeltaDiT(interval=0), "interval"),
        (lambda: accel.DeltaDiT(boundary=-0.1), "boundary"),
    ],
)
def test_wrong_settings_are_named(make, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        make()


def test_a_table_of_another_model_is_refused() -> None:
    tiny, _ = built(FAMILY)
    with pytest.raises(accel.AccelError, match="5 rows for the"):
        accel.patch(tiny.pipe, accel.BlockCaching(changes=((0.0, 0.1),) * 5))
