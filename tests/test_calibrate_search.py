"""The search: a recipe with evidence, resumed after a kill, shared among machines, honest."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from test_calibrate_profile import SHIFTED, call_of
from tiny_pipelines import TINY, built
from typer.testing import CliRunner

import accel
from accel import calibrate_fit, cli, generate
from accel.calibrate_result import Calibration, UnreachableError
from accel.calibrate_target import Target
from accel.calibrate_trials import Trial, Trials
from accel.recipe import Choice, Recipe

pytestmark = pytest.mark.usefixtures("_few_candidates")
PROMPTS = ["a cat", "a dog", "a cow", "a fox"]
TWO = PROMPTS[:2]


@pytest.fixture
def _few_candidates(monkeypatch) -> None:
    monkeypatch.setattr(calibrate_fit, "_SHARES", (0.7, 0.5, 0.25))
    monkeypatch.setattr(calibrate_fit, "_FINE", ())
    monkeypatch.setattr(calibrate_fit, "_GUIDANCE", ((3, 0.1),))
    monkeypatch.setattr(calibrate_fit, "_INTERVALS", (2, 3))


def calibrated(folder=None, prompts=PROMPTS, **options):
    tiny, _ = built("wan21")
    target = options or {"psnr": 1}
    return accel.calibrate(tiny.pipe, prompts, call=call_of(tiny), folder=folder, **target)


def runs_in(folder) -> int:
    rows = json.loads((folder / "trials.json").read_text())["trials"]
    return sum(map(len, rows.values()))


def test_a_recipe_with_its_evidence(tmp_path) -> None:
    found = calibrated(tmp_path / "runs")
    tiny, _ = built("wan21")
    assert "_accel_patch" not in vars(tiny.pipe)
    assert found.generations <= 40
    found.save(tmp_path / "recipe.json")
    recipe = Recipe.load(tmp_path / "recipe.json")
    row = recipe.measured[0]
    assert row["validated"] and row["prompts"] == 2 and len(row["psnr_each"]) == 2
    assert recipe.valid_for.steps == (8, 8) and len(recipe.valid_for.levels) == 8
    speeds = [choice.speedup for choice in found.front]
    qualities = [choice.psnr for choice in found.front]
    assert speeds == sorted(speeds, reverse=True) and qualities == sorted(qualities)
    shares = []
    with accel.patched(tiny.pipe, recipe=recipe):
        for seed in (2, 3):  # the prompts that took no part
            call = {**call_of(tiny), "prompt": PROMPTS[seed]}
            tiny.pipe(**call, generator=torch.Generator().manual_seed(seed))
            shares.append(accel.stats(tiny.pipe).share_computed)
    assert statistics.median(shares) == pytest.approx(row["share_computed"], abs=1e-6)
    again = calibrated(tmp_path / "runs")
    assert again.generations == found.generations  # nothing is run twice
    assert again.recipe.entries == found.recipe.entries


def test_a_killed_search_goes_on(tmp_path) -> None:
    seen = []

    def kill(text: str) -> None:
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(tmp_path, TWO, psnr=1, say=kill)
    done = runs_in(tmp_path)
    assert done == 3
    calibrated(tmp_path, TWO)
    assert runs_in(tmp_path) > done
    tiny, _ = built("wan21")
    assert "_accel_patch" not in vars(tiny.pipe)


def test_another_target_in_the_folder_is_searched_for_too(tmp_path) -> None:
    calibrated(tmp_path, TWO, psnr=1)
    state = json.loads((tmp_path / "trials.json").read_text())
    found = calibrated(tmp_path, TWO, speedup=1.2)
    after = json.loads((tmp_path / "trials.json").read_text())
    assert len(after["trials"]) > len(state["trials"])
    assert list(after["begun"].values()) == [0, len(state["trials"])]
    assert calibrated(tmp_path, TWO, speedup=1.2).generations == found.generations


def test_one_prompt_costs_three_generations() -> None:
    """Recording and one run may cost more of a tiny model, but then no further one begins."""
    found = calibrated(prompts=["a cat"], psnr=1)
    assert found.generations <= 3.5 or len(found.recipe.measured) == 1
    assert not found.recipe.measured[0]["validated"]


def test_shards_cover_the_first_rung_and_merge(tmp_path) -> None:
    for part in (0, 1):
        folder = tmp_path / str(part)
        calibrated(folder, TWO, psnr=1, shard=(part, 2))
    one, two = (
        set(json.loads((tmp_path / part / "trials.json").read_text())["trials"]) for part in "01"
    )
    assert one and two and not one & two
    calibrated(tmp_path / "all", TWO, psnr=1, merge=[tmp_path / "0", tmp_path / "1"])
    assert one | two <= set(json.loads((tmp_path / "all" / "trials.json").read_text())["trials"])


def test_a_shard_without_work_is_refused(tmp_path) -> None:
    for prompts, shard in ((TWO, (7, 8)), (["a cat"], (1, 2))):
        with pytest.raises(accel.AccelError, match=r"at most \d shards have something to do"):
            calibrated(tmp_path / str(len(prompts)), prompts, psnr=1, shard=shard)


def test_merging_again_adds_no_cost(tmp_path) -> None:
    calibrated(tmp_path / "0", TWO, psnr=1, shard=(0, 2))
    costs = [
        calibrated(tmp_path / "all", TWO, psnr=1, merge=[tmp_path / "0"]).generations
        for _ in range(2)
    ]
    assert costs[0] == pytest.approx(costs[1])


def test_a_folder_is_of_one_scheduler(tmp_path) -> None:
    tiny, _ = built("wan21")
    calibrated(tmp_path, ["a cat"])
    before = tiny.pipe.scheduler
    try:
        tiny.pipe.scheduler = type(before).from_config(before.config, **SHIFTED)
        with pytest.raises(accel.AccelError, match="of another scheduler"):
            calibrated(tmp_path, ["a cat"])
    finally:
        tiny.pipe.scheduler = before


def test_two_processes_in_a_folder_lose_nothing(tmp_path) -> None:
    tiny, _ = built("wan21")
    several = [Trials(tiny.pipe, TWO, call_of(tiny), tmp_path, lambda _: None) for _ in range(2)]
    for number, trials in enumerate(several):
        trials.found[f"candidate {number}"] = [Trial(0, 30.0, 1.0, 2.0, 0.5)]
        trials.save()
    found = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert set(found) == {"candidate 0", "candidate 1"}
    assert [file.name for file in tmp_path.iterdir()] == ["trials.json"]


@pytest.mark.parametrize("text", ["[]", "{}", '{"generations": 1}', "\x80", "nonsense"])
def test_a_damaged_folder_is_named(text, tmp_path) -> None:
    (tmp_path / "trials.json").write_text(text, encoding="latin-1")
    with pytest.raises(accel.AccelError, match=r"trials\.json: (cannot be read|of another)"):
        calibrated(tmp_path)


def test_a_candidate_that_breaks_counts_as_nothing(tmp_path, monkeypatch) -> None:
    render, broken = generate.render, []

    def sometimes(pipe, call, seeds):
        arrays, seconds = render(pipe, call, seeds)
        patch = vars(pipe).get("_accel_patch")
        if patch is not None and "Recorder" not in patch.report().methods and not broken:
            broken.append(True)
            arrays = [each * float("nan") for each in arrays]
        return arrays, seconds

    monkeypatch.setattr(generate, "render", sometimes)
    calibrated(tmp_path)
    rows = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert broken and min(each["psnr"] for row in rows.values() for each in row) == 0.0


def test_no_time_means_no_new_candidate(tmp_path) -> None:
    calibrated(tmp_path, budget=1e-9, psnr=1)
    assert len(json.loads((tmp_path / "trials.json").read_text())["trials"]) == 1


def test_a_recipe_holds_for_the_run_it_was_calibrated_with(caplog) -> None:
    """Of image-to-image, which makes a part of its schedule."""
    tiny = TINY["sd15"]()
    pipe = StableDiffusionImg2ImgPipeline(**tiny.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (16, 16), "red")
    call = {"image": picture, "strength": 0.75, "num_inference_steps": 8}
    recipe = accel.calibrate(pipe, ["a cat"], psnr=1, call=call).recipe
    assert recipe.valid_for.steps == (8, 8)
    with accel.patched(pipe, recipe=recipe) as handle:
        pipe("a cat", **call, output_type="latent")
        assert handle.report().methods == tuple(each.name for each in recipe.entries)
    assert "recipe is not used" not in caplog.text


@pytest.mark.parametrize(("psnrs", "reached"), [([20.0, 30.1, 45.0], False), ([50.0] * 3, True)])
def test_nine_of_ten_are_asked_of_the_result_too(psnrs, reached) -> None:
    choice = Choice(entries=(), speedup=2.0, psnr=statistics.median(psnrs))
    recipe = Recipe(entries=(), front=(choice,), measured=({"psnr_each": psnrs},))
    found = Calibration(recipe, 1.0)
    found.check(Target.of(None, None, "balanced"))
    if reached:
        found.check(Target.of(None, 30, None))
        return
    with pytest.raises(UnreachableError, match="nine prompts in ten can be expected to keep"):
        found.check(Target.of(None, 30, None))


def test_what_cannot_be_reached_is_said_with_the_best() -> None:
    with pytest.raises(UnreachableError, match="the fastest is") as caught:
        calibrated(prompts=["a cat"], speedup=1000)
    assert caught.value.calibration.front


def test_bad_arguments(tmp_path) -> None:
    tiny, _ = built("wan21")
    for options, message in (
        ({"speedup": 2, "psnr": 30}, "one of"),
        ({"speedup": 1}, "above 1"),
        ({"psnr": -3}, "above 0"),
        ({"quality": "best"}, "accepted: lossless"),
        ({"shard": (2, 2)}, "shard"),
        ({"budget": -1}, "minutes ≥ 0"),
        ({"budget": "5"}, "minutes ≥ 0"),
        ({"call": {"output_type": "pt"}}, "output_type: set by accel itself"),
    ):
        with pytest.raises(accel.AccelError, match=message):
            accel.calibrate(tiny.pipe, ["a cat"], **options)
    with pytest.raises(accel.AccelError, match="at least one prompt"):
        accel.calibrate(tiny.pipe, [])
    (tmp_path / "trials.json").write_text('{"fingerprint": "Other:0"}')
    with pytest.raises(accel.AccelError, match="another fingerprint"):
        calibrated(tmp_path)


def test_targets_count_the_median_or_nine_of_ten() -> None:
    values = [30.0, 32.0, 40.0]
    balanced = Target.of(None, None, "balanced")
    assert balanced.decibels([32.0]) == balanced.decibels([32.0] * 5) == 32
    assert balanced.decibels(values) == pytest.approx(32 - statistics.stdev(values) / 3**0.5)
    sure = Target.of(None, 30.0, None)
    assert sure.decibels(values) < 30
    spread = statistics.stdev(values)
    for count, factor in ((20, 1.714 * 1.05**0.5), (5, 1.860 * 1.2**0.5)):  # Student's t at 95 %
        several = [30.0 + spread * (-1) ** k for k in range(count)]
        squares = 4 * 3.0**2 + (count - 1) * statistics.variance(several)
        limit = statistics.fmean(several) - factor * (squares / (count + 3)) ** 0.5
        assert sure.decibels(several) == pytest.approx(limit, abs=0.04 * spread)
    wanted = Target.of(3.0, None, None)
    assert wanted.score(3.1, 30) > wanted.score(2.5, 50)
    assert wanted.score(3.1, 31) > wanted.score(3.1, 30)
    assert wanted.score(5.0, 40) > wanted.score(3.1, 30)  # "at least": better in both
    near = replace(wanted, near=True)
    assert near.score(3.1, 30) == wanted.score(3.1, 30) and near.safer(1).near
    assert near.score(3.1, 40) > near.score(3.7, 43) > near.score(3.7, 42) > near.score(2.8, 60)
    assert wanted.score(2.95, 50) > wanted.score(3.5, 40) > wanted.score(2.8, 60)  # nearly counts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny, _ = built("wan21")
    accel.unpatch(tiny.pipe)
    tiny.pipe.save_pretrained(folder)
    return folder


def test_the_command_ends_with_4_when_nothing_reaches_the_target(model, tmp_path) -> None:
    prompts, recipe = tmp_path / "prompts.txt", tmp_path / "recipe.json"
    prompts.write_text("a cat\n")
    tiny, _ = built("wan21")
    names = ("height", "width", "num_frames", "max_sequence_length", "negative_prompt")
    sizes = json.dumps({name: tiny.call[name] for name in names if name in tiny.call})
    common = ["-m", str(model), "--prompts", str(prompts), "--steps", "8"]
    common += ["--pipeline-kwargs", sizes, "-o", str(recipe)]
    result = CliRunner().invoke(cli.app, ["calibrate", *common, "--speedup", "1000"])
    assert result.exit_code == 4, result.output
    assert Recipe.load(recipe).front
