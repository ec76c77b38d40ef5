"""`accel.patch(pipe)` knows models by their folder, their weights, or their class and size."""

import json
import logging

import pytest
import torch
from tiny_pipelines import TINY, built, run

import accel
from accel import known_recipes, model_zoo
from accel.fingerprint import fingerprint
from accel.recipe import Recipe, published_names


def test_the_folder_comes_first(tmp_path) -> None:
    tiny, _ = built("wan21")
    tiny.pipe.save_pretrained(tmp_path)
    recipe = {"entries": [{"name": "PlainCycle", "settings": {"interval": 4}}]}
    (tmp_path / "accel_recipe.json").write_text(json.dumps(recipe))
    loaded = type(tiny.pipe).from_pretrained(tmp_path)
    with accel.patched(loaded) as handle:
        assert handle.methods == (accel.PlainCycle(interval=4),)


@pytest.mark.parametrize("name", model_zoo.names())
def test_weights_are_known_wherever_they_lie(name, tmp_path) -> None:
    pipe, _, _ = model_zoo.load(name)
    shipped = Recipe.load(model_zoo.path(name) / "accel_recipe.json")
    pipe.register_to_config(_name_or_path=str(tmp_path))
    with accel.patched(pipe) as handle:
        assert handle.methods == shipped.methods
    module = getattr(pipe, "transformer", None) or pipe.unet
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with accel.patched(pipe) as handle:
        assert handle.methods == (accel.EasyCache(),)


def test_a_big_model_gets_its_published_settings(caplog) -> None:
    tiny, _ = built("flux")
    small = tiny.pipe.transformer
    sizes = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
    with torch.device("meta"):
        tiny.pipe.transformer = type(small)(**sizes)
    try:
        with caplog.at_level(logging.INFO), accel.patched(tiny.pipe) as handle:
            assert handle.methods == Recipe.read("published:magcache/flux.1-dev").methods
        assert "not measured" in caplog.text
    finally:
        tiny.pipe.transformer = small


def test_an_unknown_model_gets_the_online_method() -> None:
    tiny, baseline = built("flux")
    with accel.patched(tiny.pipe) as handle:
        assert handle.methods == (accel.EasyCache(),)
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("name", ["flux", "wan21", "sd15"])
def test_quantised_weights_are_not_looked_up(name) -> None:
    """Families of which a model is shipped, so that weights are compared."""
    quantization = pytest.importorskip("torchao.quantization")
    pipe = TINY[name]().pipe
    module = getattr(pipe, "transformer", None) or pipe.unet
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    with accel.patched(pipe) as handle:
        assert handle.methods == (accel.EasyCache(),)
    with pytest.raises(accel.AccelError, match="before they were quantised"):
        fingerprint(pipe)


def test_every_known_model_names_published_settings_of_its_class() -> None:
    import diffusers

    models = known_recipes._models()
    assert models
    for known in models:
        assert known["recipe"] in published_names()
        assert hasattr(diffusers, known["pipeline"])
        assert known["config"]
