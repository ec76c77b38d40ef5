"""Recipes are strict, and come back as they were saved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pipelines import built, run

import accel
from accel import registry
from accel.recipe import Recipe

GOOD = {"entries": [{"name": "MagCache", "settings": {"threshold": 0.1}}]}


def write(tmp_path, content: object):
    path = tmp_path / "recipe.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_round_trip(tmp_path) -> None:
    methods = (
        accel.MagCache(ratios={"cond": (1.0, 0.9), "uncond": (1.0, 0.8)}, reuse=accel.Newton(2)),
        accel.EasyCache(),
    )
    Recipe.of(methods, model="WanTransformer3DModel").save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json").methods == methods
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_its_folder_is_made_or_the_error_names_the_file(tmp_path) -> None:
    recipe = Recipe.of((accel.EasyCache(),))
    recipe.save(tmp_path / "a" / "b" / "r.json")
    assert Recipe.load(tmp_path / "a" / "b" / "r.json") == recipe
    for wrong in (tmp_path / "a", tmp_path / "a" / "b" / "r.json" / "c.json"):
        with pytest.raises(accel.AccelError, match=f"{wrong.name}: cannot be written"):
            recipe.save(wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not UTF-8 JSON"),
        ('{"entries": [], "entries": []}', "duplicate keys entries"),
        ({"entries": [], "more": 1}, "more: Extra inputs"),
        ({**GOOD, "schema_version": 2}, "schema_version"),
        (
            {"entries": [{"name": "NoCache"}]},
            "unknown method 'NoCache'; accepted: adacache",
        ),
        ({"entries": [{"name": "EasyCache", "settings": {"treshold": 1}}]}, "no setting treshold"),
        ({"entries": [{"name": "EasyCache", "settings": {"threshold": -1}}]}, "number ≥ 0"),
        ({"entries": [{"name": "EasyCache", "settings": {"threshold": "1"}}]}, "number ≥ 0"),
        ('{"entries": [{"name": "EasyCache", "settings": {"threshold": NaN}}]}', "NaN is no"),
        (
            {"entries": [{"name": "EasyCache", "settings": {"reuse": {"name": "Magic"}}}]},
            "unknown approximator 'Magic'",
        ),
    ],
)
def test_wrong_files_get_one_clear_message(tmp_path, content, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        _ = Recipe.load(write(tmp_path, content)).methods


def test_too_large_and_missing_files(tmp_path) -> None:
    with pytest.raises(accel.AccelError, match="larger than"):
        Recipe.load(write(tmp_path, " " * 1_000_001))
    with pytest.raises(accel.AccelError, match="cannot be read"):
        Recipe.load(tmp_path / "none.json")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_any_json_value_is_refused_cleanly(value) -> None:
    with pytest.raises(accel.AccelError):
        _ = Recipe.read({"entries": [{"name": "EasyCache", "settings": {"threshold": [value]}}]})


PUBLISHED = json.loads((Path(accel.__file__).parents[1] / "pipelines/published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_whole(name) -> None:
    recipe = accel.Recipe.read(f"published:{name}")
    assert recipe.source
    assert recipe.measured == ()
    (method,) = recipe.methods
    assert not getattr(method, "unmeasured", False)
    if recipe.model in registry.FAMILIES:
        family = registry.FAMILIES[recipe.model]
        tiny, _ = built({"wan": "wan21"}.get(family, family))
        steps = 30 if hasattr(method, "ratios") else 12
        with accel.patched(tiny.pipe, recipe=f"published:{name}") as handle:
            assert torch.isfinite(run(tiny, num_inference_steps=steps)).all()
            assert handle.recipe().methods == (method,)


def test_published_polynomials_are_not_negative_in_their_domain() -> None:
    for name, content in PUBLISHED.items():
        if name.startswith("teacache/"):
            settings = content["entries"][0]["settings"]
            changes = np.linspace(*settings["domain"], 200)
            assert (np.polyval(settings["polynomial"], changes) >= -1e-3).all(), name


def test_an_unknown_published_name_lists_the_known_ones() -> None:
    tiny, _ = built("wan21")
    with pytest.raises(accel.AccelError, match="magcache/qwen-image"):
        accel.patch(tiny.pipe, recipe="published:nothing")


def test_tensors_travel_with_a_recipe(tmp_path) -> None:
    tiny, baseline = built("dit")
    method = accel.BlockCaching(threshold=2.0, adjustment=str(tmp_path / "fitted.safetensors"))
    with accel.patched(tiny.pipe, method) as handle:
        run(tiny)
        run(tiny)  # the first measures, the second fits
        recipe = handle.recipe()
    with accel.patched(tiny.pipe, recipe=recipe):
        wanted = run(tiny)
    assert not torch.equal(wanted, baseline)
    (tmp_path / "one").mkdir()
    recipe.save(tmp_path / "one" / "recipe.json")
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "fitted.safetensors").unlink()
    content = json.loads((tmp_path / "two" / "recipe.json").read_text())
    (name,) = content["tensors"]
    assert content["entries"][0]["settings"]["adjustment"] == name
    with accel.patched(tiny.pipe, recipe=tmp_path / "two" / "recipe.json"):
        assert torch.equal(run(tiny), wanted)

    file = tmp_path / "two" / name
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(accel.AccelError, match="not the file that it was saved with"):
        Recipe.load(tmp_path / "two" / "recipe.json")
    file.unlink()
    with pytest.raises(accel.AccelError, match="missing beside it"):
        Recipe.load(tmp_path / "two" / "recipe.json")
    for path in ("../x.safetensors", "/etc/passwd", "other.safetensors"):
        content["entries"][0]["settings"]["adjustment"] = path
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(accel.AccelError, match="none of its tensors"):
            Recipe.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"entries": [], "measured": [{"psnr": NaN}]}', "NaN is no number"),
        ('{"entries": [], "measured": [{"psnr": -Infinity}]}', "-Infinity is no number"),
        ('{"entries": [], "valid_for": {"steps": [50, 10]}}', "least comes first"),
        ('{"entries": [{"name": "PlainCycle", "settings": {"reuse": "Taylor"}}]}', "reuse must be"),
        (
            '{"entries": [{"name": "PlainCycle", "settings": {"reuse": {"order": 1}}}]}',
            "reuse must",
        ),
        ('{"entries": [{"name": "PlainCycle", "settings": {"reuse": null}}]}', "reuse must be"),
        ('{"entries": [], "x": ' + "1" * 5000 + "}", "r.json"),
    ],
)
def test_what_would_break_later_is_refused_at_once(content, message, tmp_path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(accel.AccelError, match=message):
        Recipe.load(tmp_path / "r.json")


def test_a_recipe_file_names_no_folder(tmp_path) -> None:
    recipe = Recipe.of((accel.AGD(adapters=str(tmp_path)),))
    with pytest.raises(accel.AccelError, match="holds no paths"):
        recipe.save(tmp_path / "recipe.json")
    assert not (tmp_path / "recipe.json").exists()
    text = '{"entries": [{"name": "AGD", "settings": {"adapters": "/x"}}]}'
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(accel.AccelError, match="holds no paths"):
        Recipe.load(tmp_path / "recipe.json")
