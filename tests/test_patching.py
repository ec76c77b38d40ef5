"""`accel.patch` and `accel.unpatch`: twice, failing, refused, with the recipe beside the model."""

import io
import pickle

import diffusers
import pytest
import torch
from tiny_pipelines import TINY, built, run

import accel

CYCLE = accel.PlainCycle(interval=2)


def test_patching_again_replaces() -> None:
    tiny, wanted = built("wan21")
    accel.patch(tiny.pipe, accel.PlainCycle(interval=4))
    handle = accel.patch(tiny.pipe, CYCLE)
    run(tiny)
    assert handle.report().hit_rate == 0.5
    handle.remove()
    handle.remove()
    accel.unpatch(tiny.pipe)
    assert torch.equal(run(tiny), wanted)


def test_failed_patching_keeps_the_previous_patch() -> None:
    tiny, _ = built("sd3")
    with accel.patched(tiny.pipe, CYCLE):
        with pytest.raises(accel.AccelError, match="needs a U-Net"):
            accel.patch(tiny.pipe, accel.DeepCache())
        run(tiny)
        assert accel.stats(tiny.pipe).hit_rate == 0.5


def test_a_recipe_is_looked_up_by_the_weights_below_the_previous_patch() -> None:
    tiny, wanted = built("flux")
    linear = accel.Linear("int8", least=16, backend="own")
    with accel.patched(tiny.pipe, linear):
        assert accel.patch(tiny.pipe).methods == (accel.EasyCache(),)
        handle = accel.patch(tiny.pipe, linear)
        with pytest.raises(accel.AccelError, match="not both"):
            accel.patch(tiny.pipe, CYCLE, speedup=2.0)
        assert handle.methods == (linear,)
        assert not torch.equal(run(tiny), wanted)
        accel.unpatch(tiny.pipe)
    assert torch.equal(run(tiny), wanted)


class Nothing(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("pipe", "methods", "message"),
    [
        (object(), (CYCLE,), "object is not a diffusers pipeline"),
        ("sd15", (accel.PlainCycle,), "is not a method; accepted are objects such as MagCache"),
        ("sd15", ("magcache",), "is not a method"),
        ("flux", (CYCLE, accel.MagCache()), "both change the 'stack' slot"),
        ("flux", (accel.FirstBlockCache(probe_blocks=99),), "are not a part of the 6 blocks"),
    ],
)
def test_wrong_calls_are_named_and_change_nothing(pipe, methods, message) -> None:
    if isinstance(pipe, str):
        tiny, wanted = built(pipe)
        with pytest.raises(accel.AccelError, match=message):
            accel.patch(tiny.pipe, *methods)
        assert torch.equal(run(tiny), wanted)
        with pytest.raises(accel.AccelError, match="is not patched"):
            accel.stats(tiny.pipe)
    else:
        with pytest.raises(accel.AccelError, match=message):
            accel.patch(pipe, *methods)


def test_pipelines_without_denoiser_and_unknown_structures_are_refused() -> None:
    tiny = TINY["flux"]()
    components = {**tiny.pipe.components, "transformer": None}
    with pytest.raises(accel.AccelError, match="has no denoiser with a scheduler"):
        accel.patch(diffusers.FluxPipeline(**components), CYCLE)
    tiny.pipe.transformer = Nothing()
    with pytest.raises(accel.AccelError, match="takes none of hidden_states, sample, x"):
        accel.patch(tiny.pipe, CYCLE)


def test_foreign_caches_are_refused() -> None:
    tiny = TINY["flux"]()
    tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(accel.AccelError, match="FirstBlockCacheConfig; disable it first"):
        accel.patch(tiny.pipe, CYCLE)
    tiny.pipe.transformer.disable_cache()
    accel.patch(tiny.pipe, CYCLE)


def test_without_methods_the_recipe_beside_the_model_is_used(tmp_path, caplog) -> None:
    tiny = TINY["wan21"]()
    assert accel.patch(tiny.pipe).methods == (accel.EasyCache(),)
    accel.unpatch(tiny.pipe)
    tiny.pipe.save_pretrained(tmp_path)
    accel.Recipe.of((CYCLE,)).save(tmp_path / "accel_recipe.json")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert accel.patch(loaded).methods == (CYCLE,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_a_patched_model_is_a_plain_one(protocol) -> None:
    tiny, _ = built("sd15")
    with accel.patched(tiny.pipe, accel.PlainCycle(2)):
        run(tiny)
        copied = pickle.loads(pickle.dumps(tiny.pipe.unet, protocol))
        assert type(copied) is diffusers.UNet2DConditionModel
        weights = zip(copied.parameters(), tiny.pipe.unet.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in weights)
        torch.save(tiny.pipe.scheduler, io.BytesIO())
