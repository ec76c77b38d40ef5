"""The command line, run as users run it."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import TINY
from typer.testing import CliRunner

import accel
from accel import cli, generate, media
from accel.recipe import Validity

CALL = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "max_sequence_length": 16,
    "negative_prompt": "dog",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved tiny Wan pipeline."""
    folder = tmp_path_factory.mktemp("model")
    TINY["wan21"]().pipe.save_pretrained(folder)
    return folder


def call(*arguments: str):
    """`accel …` in this process."""
    return CliRunner().invoke(cli.app, list(arguments))


def command(model, output, *more: str) -> list[str]:
    return [
        *("generate", "-m", str(model), "-p", "a cat", "--steps", "8", "-o", str(output)),
        *("--pipeline-kwargs", json.dumps(CALL), "--format", "json", *more),
    ]


def test_help_is_quick_and_loads_no_torch() -> None:
    began = time.monotonic()
    code = (
        "import sys; sys.argv = ['accel', '--help']\n"
        "from accel.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    assert time.monotonic() - began < 10


def test_generate_writes_a_video_that_tells_how_it_was_made(model, tmp_path) -> None:
    result = call(*command(model, tmp_path, "--method", "plaincycle", "--set", "interval=2"))
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    (file,) = printed["files"]
    assert printed["hits"] == 8
    metadata = media.read_metadata(media.Path(file))
    assert metadata["seed"] == 0
    assert metadata["recipe"]["entries"] == [
        {"name": "PlainCycle", "settings": {"interval": 2}},
    ]
    shown = call("show", file, "--format", "json")
    assert json.loads(shown.stdout) == metadata


def test_compare_reports_quality_and_writes_three_files(model, tmp_path) -> None:
    result = call(*command(model, tmp_path, "--method", "magcache", "--compare"))
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert len(printed["files"]) == 3
    assert 0 < printed["share_computed"] < 1
    assert printed["speedup"] > 0
    assert printed["psnr"] > 10
    assert 0 < printed["ssim_gaussian11"] <= 1
    assert printed["feature_distance"] >= 0


def test_recipe_file_is_used(model, tmp_path) -> None:
    recipe = tmp_path / "r.json"
    accel.Recipe.of((accel.PlainCycle(interval=4),)).save(recipe)
    result = call(*command(model, tmp_path, "--recipe", str(recipe)))
    assert json.loads(result.stdout)["share_computed"] == pytest.approx(0.25)


def test_outside_of_a_recipe_an_online_method_runs_and_is_named(model, tmp_path, caplog) -> None:
    file = tmp_path / "r.json"
    held = accel.Recipe.of((accel.PlainCycle(interval=4),), valid_for=Validity(steps=(50, 50)))
    held.save(file)
    result = call(*command(model, tmp_path, "--recipe", str(file)))
    assert "holds for 50 to 50 steps, and this run has 8" in caplog.text
    printed = json.loads(result.stdout)
    assert printed["methods"] == ["EasyCache"]
    metadata = media.read_metadata(media.Path(printed["files"][0]))
    assert metadata["methods"] == ["EasyCache"]
    assert accel.Recipe.read(metadata["recipe"]).valid_for == held.valid_for
    again = json.loads(call("show", printed["files"][0], "--rerun", "--format", "json").stdout)
    assert again["identical"]


def test_a_recipe_without_methods_is_the_untouched_pipeline(model, tmp_path) -> None:
    file = tmp_path / "r.json"
    accel.Recipe(entries=()).save(file)
    result = call(*command(model, tmp_path, "--recipe", str(file), "--compare"))
    printed = json.loads(result.stdout)
    assert printed["methods"] == [] and printed["psnr"] == 100.0


def test_guidance_is_what_was_asked_for_and_comes_back(model, tmp_path) -> None:
    pictures = {}
    for name, given, more in (
        ("asked", {}, ["--guidance-scale", "3"]),
        ("among others", {"guidance_scale": 3.0}, []),
        ("plain", {}, []),
    ):
        more += ["--method", "easycache", "--video-format", "png"]
        arguments = command(model, tmp_path / name, *more)
        arguments[arguments.index(json.dumps(CALL))] = json.dumps(CALL | given)
        (file,) = json.loads(call(*arguments).stdout)["files"]
        pictures[name] = media.Path(file)
    metadata = [media.read_metadata(pictures[name]) for name in ("asked", "among others")]
    assert [each["call"]["guidance_scale"] for each in metadata] == [3.0, 3.0]
    content = {name: np.asarray(Image.open(file)).tolist() for name, file in pictures.items()}
    assert content["asked"] == content["among others"] != content["plain"]
    again = call("show", str(pictures["asked"]), "--rerun", "--format", "json")
    assert json.loads(again.stdout)["identical"]


def test_nothing_saved_is_said_loudly(model, tmp_path, caplog) -> None:
    same = ("--method", "plaincycle", "--set", "interval=1", "--compare")
    result = call(*command(model, tmp_path, *same))
    assert "nothing was saved" in caplog.text
    assert json.loads(result.stdout)["psnr"] == 100.0  # JSON knows no infinity


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "nocache"], "unknown method 'nocache'; accepted: adacache"),
        (["--method", "magcache", "--set", "treshold=1"], "no setting treshold; accepted"),
        (["--method", "magcache", "--set", "threshold"], "write key=value"),
        (["--set", "threshold=1"], "--set needs exactly one --method"),
        (["--recipe", "none.json"], "recipe none.json: cannot be read"),
        (["--method", "magcache", "--recipe", "x"], "--method or --recipe, not both"),
        (["--pipeline-kwargs", "{"], "--pipeline-kwargs: not JSON"),
        (["--pipeline-kwargs", '{"colour": 1}'], "WanPipeline takes no colour"),
        (["--pipeline-kwargs", '{"output_type": "pt"}'], "output_type: set by accel itself"),
        (["--pipeline-kwargs", '{"num_videos_per_prompt": 2}'], "num_videos_per_prompt=2: one"),
    ],
)
def test_wrong_arguments_get_one_line(model, tmp_path, more, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["accel", *command(model, tmp_path, *more)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("accel: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_two_results_of_one_prompt_are_refused() -> None:
    def pipe(**_):
        return SimpleNamespace(images=np.zeros((2, 4, 4, 3)))

    with pytest.raises(accel.AccelError, match="function made 2 results of 1 prompts"):
        generate.make(pipe, {}, 0)


def test_calibration_refuses_wrong_files_before_it_runs(tmp_path) -> None:
    prompts = tmp_path / "latin.txt"
    prompts.write_bytes(b"caf\xe9\n")
    unread = ["-m", "none", "--prompts", str(prompts), "-o"]
    for arguments, message in (
        (["calibrate", *unread, str(tmp_path)], "is a folder; name the recipe's file"),
        (["calibrate", *unread, str(tmp_path / "r.json")], "not UTF-8 (line 1, byte 3)"),
        (["profile", *unread, str(tmp_path / "runs")], "not UTF-8 (line 1, byte 3)"),
    ):
        error = call(*arguments).exception
        assert isinstance(error, accel.AccelError)
        assert message in str(error)


def test_unknown_models_name_what_is_accepted(tmp_path, capsys, monkeypatch) -> None:
    messages = {"zoo:none": "unknown zoo model 'none'", "no/such": "a folder or a repository"}
    for model, message in messages.items():
        monkeypatch.setattr(sys, "argv", ["accel", *command(model, tmp_path)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_doctor_examines_this_machine() -> None:
    result = call("doctor", "--format", "json")
    found = json.loads(result.stdout)
    assert found["versions"]["torch"]
    assert found["problems"] == []
    assert result.exit_code == 0
