"""Patching together with LoRA, offload, compile, copies, other schedulers and threads."""

import copy
import threading

import diffusers
import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import STEPS, TINY, Tiny, built, run

import accel

CYCLE = accel.PlainCycle(interval=2)


def fresh(family: str) -> Tiny:
    return TINY[family]()


def add_lora(pipe, layers=("to_q", "to_v")) -> None:
    torch.manual_seed(3)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=list(layers), init_lora_weights=False)
    )


@pytest.mark.parametrize("family", ["wan21", "flux"])
def test_lora_before_and_after_patching_agree(family) -> None:
    before, after = fresh(family), fresh(family)
    add_lora(before.pipe)
    accel.patch(before.pipe, CYCLE)
    accel.patch(after.pipe, CYCLE)
    plain = run(after)
    add_lora(after.pipe)
    result = run(before)
    assert torch.equal(result, run(after))
    assert not torch.equal(result, plain)
    accel.unpatch(after.pipe)
    after.pipe.transformer.disable_adapters()
    assert torch.equal(run(after), built(family)[1])


@pytest.mark.parametrize("method", [accel.FORA(interval=2), accel.TaylorSeer(interval=2)], ids=repr)
def test_a_lora_on_layers_that_are_cached_may_come_and_go(method) -> None:
    """A single-stream block's projections are overridden themselves, and PEFT exchanges them."""
    before, after = fresh("flux"), fresh("flux")
    layers = ["to_q", "to_v", "proj_mlp", "proj_out"]
    add_lora(before.pipe, layers)
    accel.patch(before.pipe, method)
    accel.patch(after.pipe, method)
    plain = run(after)
    add_lora(after.pipe, layers)
    result = run(after)
    assert torch.equal(run(before), result)
    assert not torch.equal(result, plain)
    for tiny in (before, after):
        tiny.pipe.transformer.unload_lora()
        assert torch.equal(run(tiny), plain)
        accel.unpatch(tiny.pipe)
        assert torch.equal(run(tiny), built("flux")[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.transformer.disable_adapters(),
        lambda pipe: pipe.transformer.set_adapters(["default"], [0.3]),
        lambda pipe: pipe.set_adapters(["default"], [0.3]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.fuse_lora(components=["transformer"]),
        lambda pipe: pipe.unload_lora_weights(),
    ],
    ids=["disable_adapters", "scale", "scale of pipe", "disable_lora", "fuse", "unload"],
)
def test_changing_adapters_in_a_run_drops_the_cache(change) -> None:
    tiny = fresh("wan21")
    add_lora(tiny.pipe)
    accel.patch(tiny.pipe, accel.PlainCycle(interval=100))

    def at_step_three(pipe, step, timestep, kwargs):
        if step == 3:
            change(pipe)
        return kwargs

    run(tiny, callback_on_step_end=at_step_three)
    assert accel.stats(tiny.pipe).verdicts == {
        "transformer/cond": "CRRRCRRR",
        "transformer/uncond": "CRRRCRRR",
    }


def test_adapter_scale_changed_between_runs() -> None:
    weak, changed = fresh("wan21"), fresh("wan21")
    for tiny in (weak, changed):
        add_lora(tiny.pipe)
    weak.pipe.transformer.set_adapters(["default"], [0.3])
    accel.patch(weak.pipe, CYCLE)
    accel.patch(changed.pipe, CYCLE)
    full = run(changed)
    changed.pipe.transformer.set_adapters(["default"], [0.3])
    result = run(changed)
    assert torch.equal(result, run(weak))
    assert not torch.equal(result, full)


def test_changing_the_prompt_in_a_run_drops_the_cache() -> None:
    tiny, _ = built("sd3")

    def other_prompt(pipe, step, timestep, kwargs):
        if step == 3:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"] + 1
        return kwargs

    with accel.patched(tiny.pipe, accel.PlainCycle(interval=100)) as handle:
        run(
            tiny,
            callback_on_step_end=other_prompt,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
        assert handle.report().verdicts["transformer/batched"] == "CRRRCRRR"


@pytest.mark.parametrize("order", ["offload first", "patch first"])
@pytest.mark.parametrize("kind", ["model", "block_level", "leaf_level"])
def test_offloading_keeps_the_result(kind, order) -> None:
    expected = fresh("flux")
    with accel.patched(expected.pipe, CYCLE):
        wanted = run(expected)
    tiny = fresh("flux")

    def offload() -> None:
        if kind == "model":
            tiny.pipe.enable_model_cpu_offload(device="cpu")
        else:
            tiny.pipe.transformer.enable_group_offload(
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type=kind,
                num_blocks_per_group=1,
            )

    if order == "offload first":
        offload()
    accel.patch(tiny.pipe, CYCLE)
    if order == "patch first":
        offload()
    for _ in range(2):
        assert torch.equal(run(tiny), wanted)
        assert accel.stats(tiny.pipe).hit_rate == 0.5
    accel.unpatch(tiny.pipe)
    assert torch.equal(run(tiny), built("flux")[1])


def test_what_is_observed_of_an_offloaded_block_is_there_first() -> None:
    """TeaCache calls the first block's norm, whose weights group offload keeps away until then."""
    tiny = fresh("flux")
    block = tiny.pipe.transformer.transformer_blocks[0]
    cpu, order = torch.device("cpu"), []
    tiny.pipe.transformer.enable_group_offload(
        cpu, cpu, offload_type="block_level", num_blocks_per_group=1
    )
    group = block._diffusers_hook.hooks["group_offloading"].group
    onload, norm = group.onload_, block.norm1.forward
    group.onload_ = lambda: (order.append("onload"), onload())
    block.norm1.forward = lambda *a, **k: (order.append("norm1"), norm(*a, **k))[1]
    with accel.patched(tiny.pipe, accel.TeaCache(threshold=0)):
        run(tiny)
    assert order[:2] == ["onload", "norm1"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compile first", "patch first"])
def test_regional_compile_without_graph_breaks(order) -> None:
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    tiny = fresh("flux")
    with accel.patched(tiny.pipe, CYCLE):
        wanted = run(tiny)
    if order == "patch first":
        accel.patch(tiny.pipe, CYCLE)
    tiny.pipe.transformer.compile_repeated_blocks(backend=count, fullgraph=True)
    if order == "compile first":
        accel.patch(tiny.pipe, CYCLE)
    result = run(tiny)
    first = len(graphs)
    assert torch.allclose(result, wanted, atol=1e-5)
    assert accel.stats(tiny.pipe).hit_rate == 0.5
    run(tiny)
    assert len(graphs) == first, "reuse made it compile again"
    assert 1 <= first <= 4
    torch._dynamo.reset()


def test_whole_compile_is_refused_for_block_methods() -> None:
    tiny = fresh("flux")
    tiny.pipe.transformer.compile(backend="eager")
    with pytest.raises(accel.AccelError, match="compile_repeated_blocks"):
        accel.patch(tiny.pipe, CYCLE)
    accel.patch(tiny.pipe, accel.EasyCache())


@pytest.mark.parametrize("method", [accel.PlainCycle(2, whole=True), accel.CfgCache()], ids=repr)
def test_a_model_exchanged_for_its_compiled_self(method) -> None:
    """`OptimizedModule.forward` takes anything; a U-Net gets its latent by position."""
    tiny = fresh("sd15")
    with accel.patched(tiny.pipe, method) as handle:
        expected, share = run(tiny), handle.report().share_computed
    tiny.pipe.unet = torch.compile(tiny.pipe.unet, backend="eager")
    with accel.patched(tiny.pipe, method) as handle:
        assert torch.allclose(run(tiny), expected, rtol=1e-3, atol=1e-3)
        assert handle.report().share_computed == share < 1
    torch._dynamo.reset()


def test_copies_of_patched_models_are_plain_and_independent() -> None:
    tiny = fresh("wan21")
    before = type(tiny.pipe.transformer), type(tiny.pipe.transformer.blocks[0])
    accel.patch(tiny.pipe, CYCLE)
    run(tiny)
    twin = copy.deepcopy(tiny.pipe.transformer)
    assert (type(twin), type(twin.blocks[0])) == before
    assert not any("accel" in key for key in [*vars(twin), *vars(twin.blocks[0])])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    accel.unpatch(tiny.pipe)
    assert torch.equal(run(tiny), built("wan21")[1])


def test_saving_while_patched(tmp_path) -> None:
    tiny = fresh("wan21")
    accel.patch(tiny.pipe, CYCLE)
    run(tiny)
    tiny.pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is diffusers.WanTransformer3DModel
    assert torch.allclose(run(Tiny(loaded, tiny.call)), built("wan21")[1], atol=1e-5)


def test_two_pipelines_of_one_class_do_not_touch_each_other() -> None:
    one, two = fresh("wan21"), fresh("wan21")
    accel.patch(one.pipe, CYCLE)
    assert torch.equal(run(two), built("wan21")[1])
    accel.patch(two.pipe, accel.PlainCycle(interval=4))
    first = run(one)
    accel.unpatch(two.pipe)
    assert torch.equal(run(one), first)
    assert torch.equal(run(two), built("wan21")[1])


def test_swapped_scheduler_is_followed_and_given_back() -> None:
    tiny = fresh("sd15")
    accel.patch(tiny.pipe, CYCLE)
    run(tiny)
    old = tiny.pipe.scheduler
    tiny.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(old.config)
    run(tiny)
    assert accel.stats(tiny.pipe).hit_rate == 0.5
    assert type(old) is diffusers.DDIMScheduler
    accel.unpatch(tiny.pipe)
    assert type(tiny.pipe.scheduler) is diffusers.EulerDiscreteScheduler


def test_a_scheduler_made_from_the_held_ones_class_counts_each_step_once() -> None:
    """`type(pipe.scheduler).from_config(...)` of a patched pipeline is an instance of our class."""
    tiny = fresh("sd15")
    plain = type(tiny.pipe.scheduler)
    accel.patch(tiny.pipe, CYCLE)
    run(tiny)
    held = tiny.pipe.scheduler
    tiny.pipe.scheduler = type(held).from_config(held.config)
    run(tiny)
    assert accel.stats(tiny.pipe).hit_rate == 0.5
    assert len(accel.stats(tiny.pipe).verdicts["unet/batched"]) == STEPS
    tiny.pipe.scheduler = type(tiny.pipe.scheduler).from_config(held.config)
    accel.unpatch(tiny.pipe)
    assert type(tiny.pipe.scheduler) is plain


def test_processors_made_from_the_held_ones_class_attend_as_before() -> None:
    """Loading an IP-Adapter makes new processors by `type(old)()`."""
    tiny = fresh("sd15")
    plain = run(tiny)
    with accel.patched(tiny.pipe, accel.Attention("sdpa")):
        kinds = {name: type(each) for name, each in tiny.pipe.unet.attn_processors.items()}
        tiny.pipe.unet.set_attn_processor({name: kind() for name, kind in kinds.items()})
        assert torch.equal(run(tiny), plain)
    assert torch.equal(run(tiny), plain)


def test_a_lora_unfused_during_a_run_drops_what_was_cached() -> None:
    """The pipeline unmerges the layers itself and asks no denoiser."""
    tiny = fresh("wan21")
    add_lora(tiny.pipe)

    def unfuse(pipe, step, timestep, kwargs):
        if step == 2:
            pipe.unfuse_lora(components=["transformer"])
        return kwargs

    def unfusing() -> torch.Tensor:
        tiny.pipe.fuse_lora(components=["transformer"])
        return run(tiny, callback_on_step_end=unfuse)

    plain = unfusing()
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=1)):
        assert torch.equal(unfusing(), plain)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=4, warmup=1)) as handle:
        unfusing()
        assert handle.report().verdicts["transformer/cond"] == "CRRCCRRR"


@pytest.mark.parametrize("family", ["wan21", "pixart"])
@pytest.mark.parametrize("method", [CYCLE, accel.FORA(interval=2)], ids=repr)
def test_blocks_wrapped_one_by_one_before_patching(family, method) -> None:
    """`blocks[i] = torch.compile(blocks[i])` hides the block's signature and its layers."""
    tiny = fresh(family)
    with accel.patched(tiny.pipe, method):
        wanted = run(tiny)
    transformer = tiny.pipe.transformer
    blocks = transformer.blocks if family == "wan21" else transformer.transformer_blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")
    with accel.patched(tiny.pipe, method) as handle:
        assert torch.equal(run(tiny), wanted)
        assert handle.report().share_computed < 1


def test_second_order_schedulers_count_their_own_steps() -> None:
    tiny = fresh("sd15")
    tiny.pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(tiny.pipe.scheduler.config)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=1)) as handle:
        run(tiny, num_inference_steps=5)
        assert handle.report().verdicts == {"unet/batched": "C" * 9}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("flux", diffusers.FluxImg2ImgPipeline), ("sd15", diffusers.StableDiffusionImg2ImgPipeline)],
)
def test_image_to_image_makes_fewer_steps(family, kind) -> None:
    tiny = fresh(family)
    pipe = kind(**tiny.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    size = tiny.call["height"]
    call = {**tiny.call, "image": torch.rand(1, 3, size, size), "strength": 0.5}
    if family == "sd15":
        call = {key: value for key, value in call.items() if key not in ("height", "width")}
    both = Tiny(pipe, call)
    with accel.patched(pipe, accel.EasyCache(threshold=1e6, warmup=2)) as handle:
        run(both)
        (verdicts,) = handle.report().verdicts.values()
    assert verdicts == "CCRC"


def test_threads_take_turns() -> None:
    tiny = fresh("wan21")
    with accel.patched(tiny.pipe, CYCLE):
        wanted = [run(tiny, seed=seed) for seed in range(2)]
    results: dict[int, torch.Tensor] = {}
    with accel.patched(tiny.pipe, CYCLE):
        threads = [
            threading.Thread(target=lambda s=seed: results.update({s: run(tiny, seed=s)}))
            for seed in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[seed], wanted[seed]) for seed in range(2))


def test_extra_guidance_calls_are_their_own_branch() -> None:
    tiny, _ = built("sd3")
    with accel.patched(tiny.pipe, CYCLE) as handle:
        run(
            tiny,
            skip_guidance_layers=[1],
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        )
        assert {row.branch for row in handle.report().rows} == {"batched", "call1"}
