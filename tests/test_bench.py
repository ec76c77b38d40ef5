"""The benchmark on a tiny model: its arithmetic and its honesty, never its speed."""

import json

import pytest
from tiny_pipelines import TINY

from accel import AccelError, PlainCycle, bench, generate, model_zoo, peers
from accel.recipe import Recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A zoo that holds one tiny random video model."""
    folder = tmp_path_factory.mktemp("zoo")
    TINY["wan21"]().pipe.save_pretrained(folder / "tiny")
    call = {
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "max_sequence_length": 16,
        "guidance_scale": 3.0,
        "num_inference_steps": 8,
    }
    settings = {"call": call, "fps": 8, "negative_prompt": ""}
    (folder / "tiny" / "call.json").write_text(json.dumps(settings))
    for part in ("train", "heldout", "final"):
        (folder / f"prompts_{part}.txt").write_text(f"a {part}\nb {part}\nc {part}\n")
    return folder


@pytest.fixture
def tiny_zoo(zoo, monkeypatch):
    monkeypatch.setattr(model_zoo, "folder", lambda: zoo)


def plan(**changes):
    settings = {"model": "zoo:tiny", "num_prompts": 2, "steps": 6, "repeats": 2}
    return bench.Plan(**{**settings, **changes})


def test_rows_hold_speed_share_and_quality(tiny_zoo, tmp_path) -> None:
    output = tmp_path / "deep" / "b.json"
    result = bench.run(plan(methods="plaincycle,magcache"), output, command="accel bench …")
    assert json.loads(output.read_text()) == result
    assert result["prompts"] == 2
    assert result["command"] == "accel bench …"
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "PlainCycle(interval=2)"
    assert "MagCache()" in names
    first = result["rows"][0]
    assert first["share_computed"] == 0.5
    assert first["speedup_spread"][0] <= first["speedup"] <= first["speedup_spread"][1]
    assert first["psnr"]["worst_decile"] <= first["psnr"]["median"]
    assert first["feature_distance"]["worst_decile"] >= first["feature_distance"]["median"]
    assert 0 < result["overhead"]["microseconds_per_block"] < 1000
    text = bench.table(result)
    assert len(text.splitlines()) == 1 + len(names)


def test_doing_nothing_is_reported_as_failing(tiny_zoo) -> None:
    import accel

    running = bench.Bench(plan(), lambda _: None)
    row = running.measure(running._ours((accel.PlainCycle(interval=1),)))
    assert row["failed"] == "nothing was skipped"
    assert row["psnr"]["median"] == 100.0


def test_two_methods_are_measured_together(tiny_zoo, tmp_path) -> None:
    result = bench.run(plan(methods="plaincycle+cfgcache"), tmp_path / "b.json", command="")
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "PlainCycle(interval=2) + CfgCache(interval=3)"
    assert len(names) == 3
    shares = [row["share_computed"] for row in result["rows"] if "failed" not in row]
    assert shares
    assert all(share <= 0.51 for share in shares)


def test_the_front_of_a_recipe_is_measured_too(tiny_zoo, tmp_path) -> None:
    mild, strong = (Recipe.of((PlainCycle(interval=k),)).entries for k in (2, 3))
    front = (
        {"entries": strong, "speedup": 2.0, "psnr": 20.0},
        {"entries": mild, "speedup": 1.5, "psnr": 30.0},
    )
    file = tmp_path / "recipe.json"
    Recipe(entries=mild, front=front).save(file)
    wanted = plan(methods="plaincycle", recipe=file)
    rows = {row["name"]: row for row in bench.run(wanted, tmp_path / "b.json", command="")["rows"]}
    assert rows["calibrated 0: PlainCycle"]["share_computed"] == pytest.approx(1 / 3)
    one, same = rows["calibrated 1: PlainCycle"], rows["PlainCycle(interval=2)"]
    assert one["psnr"] == same["psnr"] and one["share_computed"] == same["share_computed"]


def test_peers_are_measured_or_reported_as_failing(tiny_zoo, tmp_path) -> None:
    result = bench.run(plan(methods="plaincycle", peers=True), tmp_path / "b.json", command="")
    peers = {row["name"]: row for row in result["rows"] if row["kind"] == "peer"}
    assert peers["TaylorSeer(interval=3)"]["failed"] == "nothing was skipped"
    assert "IndexError" in peers["FasterCache(spatial=2)"]["failed"]
    working = [row for row in peers.values() if "failed" not in row]
    assert working
    assert all(0 < row["share_computed"] < 1 for row in working)


@pytest.mark.parametrize(
    ("module", "end", "count", "label"),
    [
        ("cache_dit", " of cache-dit", 15, "DBCache(F1, mask=fast)"),
        ("para_attn", " of ParaAttention", 8, "FBCache(threshold=0.4)"),
    ],
)
def test_other_libraries_are_peers_where_installed(tiny_zoo, module, end, count, label) -> None:
    pytest.importorskip(module)
    running = bench.Bench(plan(), lambda _: None)
    kind, before = type(running.pipe), dict(vars(type(running.pipe)))
    theirs = {each.label: each for each in peers.candidates(running)}
    assert sum(name.endswith(end) for name in theirs) == count
    row = running.measure(theirs[label + end])
    assert 0 < row["share_computed"] < 1, row
    assert (running.make(0)[0] == running.untouched[0]).all(), "it was not switched off whole"
    assert dict(vars(kind)) == before


def test_wrong_plans_are_named(tiny_zoo, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(AccelError, match="unknown method 'none'"):
        patch.setattr(generate, "load", lambda *_: pytest.fail("said before anything is loaded"))
        bench.run(plan(methods="plaincycle,none"), tmp_path / "b.json", command="")
    with pytest.raises(AccelError, match="cannot be read"):
        bench.Bench(plan(prompts=tmp_path / "none.txt"), lambda _: None)
    Recipe.of((PlainCycle(),)).save(tmp_path / "recipe.json")
    with pytest.raises(AccelError, match="has no front"):
        bench.Bench(plan(recipe=tmp_path / "recipe.json"), lambda _: None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(AccelError, match="not UTF-8"):
        bench.Bench(plan(prompts=tmp_path / "latin.txt"), lambda _: None)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(AccelError, match="no prompt in it"):
        bench.Bench(plan(prompts=tmp_path / "empty.txt"), lambda _: None)
