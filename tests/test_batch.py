"""`accel batch`: whole files, the same however they are made, and made again bit for bit."""

import dataclasses
import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import TINY
from typer.testing import CliRunner

import accel
from accel import batch, batch_plan, batch_worker, cli, generate, media
from accel.batch_manifest import Manifest, claim

PROMPTS = "a cat\na dog --d 40\nbad --w x\na cow --s 3\na pig --n cow\n"
SMALL = json.dumps({"height": 16, "width": 16})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved tiny Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("model")
    TINY["sd15"]().pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text(PROMPTS)
    return str(file)


def run(prompts: str, model: str, output: Path, *more: str, expect: int = 1):
    """The rows and the summary of one command; one line of PROMPTS is bad, so it exits with 1."""
    arguments = ["batch", prompts, "-m", model, "-o", str(output), "--steps", "4"]
    settings = ["--method", "plaincycle", "--set", "interval=2", "--pipeline-kwargs", SMALL]
    done = CliRunner().invoke(cli.app, [*arguments, *settings, "--format", "json", *more])
    assert done.exit_code == expect, done.output
    *rows, summary = [json.loads(line) for line in done.stdout.splitlines()]
    return rows, summary


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.png")}


def test_every_line_becomes_a_file_or_an_error(model, prompts, tmp_path) -> None:
    rows, summary = run(prompts, model, tmp_path / "out")
    assert [row["status"] for row in rows] == ["done", "done", "failed", "done", "done"]
    assert [row["seed"] for row in rows] == [0, 40, 2, 3, 4]
    assert "line 3: width must be a number" in rows[2]["error"]
    assert (summary["made"], summary["failed"], summary["not_begun"]) == (4, 1, 0)
    for row in rows:
        if row["status"] == "done":
            path = tmp_path / "out" / row["file"]
            about = media.read_metadata(path)
            assert about["id"] == row["id"]
            assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            text = Image.open(path).info["parameters"].splitlines()
            assert text[0] == row["prompt"]
            assert f"Seed: {row['seed']}" in text[-1]
    assert (
        "Negative prompt: cow" in Image.open(tmp_path / "out" / rows[4]["file"]).info["parameters"]
    )
    assert rows[3]["share_computed"] == pytest.approx(2 / 3)


def test_a_name_that_is_taken_fails_and_leaves_the_other_file_alone(model, tmp_path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cat\na dog\na cat\n")
    for made, kept in ((2, 0), (0, 2)):
        rows, summary = run(str(file), model, tmp_path / "out", "--name-template", "{slug}")
        assert [summary[key] for key in ("made", "kept", "failed")] == [made, kept, 1]
        assert "that of item 0 too" in rows[-1]["error"]
    assert set(files(tmp_path / "out")) == {"a-cat.png", "a-dog.png"}


def test_resume_makes_what_is_missing_or_damaged(model, prompts, tmp_path) -> None:
    rows, _ = run(prompts, model, tmp_path)
    before = files(tmp_path)
    (tmp_path / rows[0]["file"]).unlink()
    (tmp_path / rows[1]["file"]).write_bytes(b"half a fi")
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["index"] != 3]  # killed before its row
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(kept) + b'{"index": 4, "na')  # and torn
    again, summary = run(prompts, model, tmp_path)
    assert files(tmp_path) == before
    assert {row["index"] for row in again if row["status"] == "done"} == {0, 1, 3}
    assert next(row for row in again if row["index"] == 3)["seconds"] is None  # adopted
    assert (summary["made"], summary["kept"]) == (3, 1)
    assert not list(tmp_path.glob(".*.part"))
    third, summary = run(prompts, model, tmp_path)
    assert (summary["made"], summary["kept"], len(third)) == (0, 4, 1)


def test_files_do_not_depend_on_shards_or_resumption_and_overwrite_redoes(
    model, prompts, tmp_path
) -> None:
    two = ("--batch-size", "2")
    run(prompts, model, tmp_path / "whole", *two)
    run(prompts, model, tmp_path / "parts", *two, "--shard", "1/2", expect=0)
    run(prompts, model, tmp_path / "parts", *two, "--shard", "2/2")  # has the bad line
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    first = next((tmp_path / "parts").glob("*cat.png"))
    first.unlink()  # its partner in the batch is there already
    run(prompts, model, tmp_path / "parts", *two)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    _, summary = run(prompts, model, tmp_path / "parts", *two, "--overwrite")
    assert summary["made"] == 4
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_other_settings_do_not_replace_files_silently(model, prompts, tmp_path) -> None:
    run(prompts, model, tmp_path)
    before = files(tmp_path)
    rows, _ = run(prompts, model, tmp_path, "--guidance-scale", "3")
    assert {row["status"] for row in rows} == {"failed"}
    assert "made with other settings" in rows[0]["error"]
    assert files(tmp_path) == before


@pytest.mark.parametrize("size", ["1", "3"])
def test_show_rerun_is_bit_for_bit(model, prompts, tmp_path, size) -> None:
    rows, _ = run(prompts, model, tmp_path, "--batch-size", size)
    file = str(tmp_path / rows[-1]["file"])
    shown = CliRunner().invoke(cli.app, ["show", file, "--rerun", "--format", "json"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    assert result["identical"] is True
    assert Path(result["file"]).read_bytes() == Path(file).read_bytes()


@pytest.mark.parametrize("order", [1, -1])
def test_rerun_of_a_batch_where_some_have_a_negative_prompt(model, tmp_path, order) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\n".join(["a cat", "a pig --n cow"][::order]))
    rows, _ = run(str(file), model, tmp_path / "out", "--batch-size", "2", expect=0)
    for row in rows:
        made = str(tmp_path / "out" / row["file"])
        shown = CliRunner().invoke(cli.app, ["show", made, "--rerun"])
        assert shown.exit_code == 0, shown.output


def test_a_video_of_generate_is_made_again_bit_for_bit(tmp_path) -> None:
    TINY["wan21"]().pipe.save_pretrained(tmp_path / "model")
    call = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    done = CliRunner().invoke(
        cli.app,
        [
            *("generate", "-m", str(tmp_path / "model"), "-p", "a cat", "--steps", "4"),
            *("--pipeline-kwargs", json.dumps(call), "-o", str(tmp_path), "--format", "json"),
        ],
    )
    (file,) = json.loads(done.stdout)["files"]
    shown = CliRunner().invoke(cli.app, ["show", file, "--rerun", "-o", str(tmp_path / "b.mp4")])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "b.mp4").read_bytes() == Path(file).read_bytes()


def test_dry_run_lists_files_and_makes_none(model, prompts, tmp_path) -> None:
    arguments = ["batch", prompts, "-m", model, "-o", str(tmp_path / "out"), "--dry-run"]
    done = CliRunner().invoke(cli.app, [*arguments, "--seeds", "0-1", "--limit", "3"])
    assert done.exit_code == 0, done.output
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "00000_0_a-cat",
        "00001_1_a-cat",
        "00002_40_a-dog",
    ]
    assert not (tmp_path / "out").exists()


# --- the worker: faults, retries, memory -------------------------------------------------------


def worker(model: str, prompts: str, output: Path, **changes) -> tuple:
    """A worker on the good lines, and their batches."""
    options = {"seeds": None, "seed": 0, "limit": None, "prompts": prompts}
    from accel import batch_command

    items = batch_command._items(options | {"name_template": "{index}", "vbench_names": False})
    items = [item for item in items if item.error is None]
    job = generate.Job(model=model, prompt="", steps=4, extra=json.loads(SMALL))
    recipe = accel.Recipe.of((accel.PlainCycle(interval=2),)).model_dump(mode="json")
    size = changes.pop("size", 1)
    plan = batch_plan.Plan(job, str(output), recipe, items[0], batch.batches(items, size))
    plan = dataclasses.replace(plan, run="r", **changes)
    assert batch_plan.Plan.from_json(plan.to_json()) == plan
    return batch_worker.Worker(plan, "w"), plan


def breaking(monkeypatch, fault):
    """`fault(count, items, arrays)` sees, and may change or raise, each call of a pipeline."""
    calls = []
    real = generate.render

    def render(pipe, call, seeds):
        calls.append(len(seeds))
        arrays, seconds = real(pipe, call, seeds)
        return fault(len(calls), pipe, arrays), seconds

    monkeypatch.setattr(generate, "render", render)
    return calls


def test_values_that_are_not_finite_are_made_again_untouched(
    model, prompts, tmp_path, monkeypatch
) -> None:
    maker, plan = worker(model, prompts, tmp_path)
    item = plan.batches[0][0]

    def fault(count, pipe, arrays):
        if "_accel_patch" in pipe.__dict__:
            arrays[0] = arrays[0] * np.nan
        return arrays

    breaking(monkeypatch, fault)
    (row,) = maker.do((item,), [item])
    assert row["status"] == "done"
    assert row["check"] == "not finite; made again without acceleration"
    about = media.read_metadata(tmp_path / row["file"])
    assert about["check"] == row["check"]
    assert about["methods"] == []
    assert row["share_computed"] == 1.0


def test_what_is_wrong_without_acceleration_too_fails_or_is_kept(
    model, prompts, tmp_path, monkeypatch
) -> None:
    maker, plan = worker(model, prompts, tmp_path)
    item = plan.batches[0][0]
    calls = breaking(monkeypatch, lambda count, pipe, arrays: [arrays[0] * np.nan])
    (row,) = maker.do((item,), [item])
    assert row["status"] == "failed"
    assert "not finite, without acceleration too" in row["error"]
    assert calls == [1, 1]
    monkeypatch.undo()
    breaking(monkeypatch, lambda count, pipe, arrays: [arrays[0] * 0])
    (row,) = maker.do((item,), [item])
    assert (row["status"], row["check"]) == ("done", "all black; made again without acceleration")


def test_retries_are_counted(model, prompts, tmp_path, monkeypatch) -> None:
    def fault(count, pipe, arrays):
        if count < 3:
            raise RuntimeError("cosmic ray")
        return arrays

    maker, plan = worker(model, prompts, tmp_path, retry=2)
    calls = breaking(monkeypatch, fault)
    (row,) = maker.do(plan.batches[0], list(plan.batches[0]))
    assert (row["status"], len(calls)) == ("done", 3)
    maker, plan = worker(model, prompts, tmp_path / "b", retry=1)
    breaking(monkeypatch, lambda *_: fault(0, *_[1:]))
    (row,) = maker.do(plan.batches[0], list(plan.batches[0]))
    assert row["error"] == "RuntimeError: cosmic ray"


def test_out_of_memory_goes_down_the_ladder_and_says_so(
    model, prompts, tmp_path, monkeypatch
) -> None:
    def fault(count, pipe, arrays):
        if len(arrays) > 1 or not pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("no room")
        return arrays

    maker, plan = worker(model, prompts, tmp_path, size=4, oom_fallback=True)
    calls = breaking(monkeypatch, fault)
    group = next(each for each in plan.batches if len(each) > 2)
    rows = list(maker.do(group, list(group)))
    assert [row["status"] for row in rows] == ["done"] * 3
    assert [row["fallback"] for row in rows] == [["vae-tiling"]] * 3
    about = media.read_metadata(tmp_path / rows[0]["file"])
    assert about["fallback"] == ["vae-tiling"]
    assert "batch" not in about  # made alone in the end
    assert calls == [3, 1, 1, 2, 1, 1]
    monkeypatch.undo()
    shown = CliRunner().invoke(cli.app, ["show", str(tmp_path / rows[0]["file"]), "--rerun"])
    assert shown.exit_code == 0, shown.output


def test_out_of_memory_fails_where_nothing_may_or_can_be_given_up(
    model, prompts, tmp_path, monkeypatch
) -> None:
    def fault(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    for allowed, message in ((False, "can't allocate"), (True, "even with batch size 1 and vae")):
        maker, plan = worker(model, prompts, tmp_path / str(allowed), oom_fallback=allowed)
        breaking(monkeypatch, fault)
        (row,) = maker.do(plan.batches[0], list(plan.batches[0]))
        assert message in row["error"]


def test_a_full_disk_stops_and_leaves_no_part(model, prompts, tmp_path, monkeypatch) -> None:
    maker, plan = worker(model, prompts, tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        list(maker.do(plan.batches[0], list(plan.batches[0])))
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".png", ".part")]


def test_stop_at_the_first_failure(model, prompts, tmp_path) -> None:
    rows, summary = run(prompts, model, tmp_path, "--on-error", "stop")
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert summary["not_begun"] == 2


# --- the folder --------------------------------------------------------------------------------


def test_a_claim_is_given_once_and_given_back(tmp_path) -> None:
    with claim(tmp_path, "a") as first, claim(tmp_path, "a") as second, claim(tmp_path, "b") as b:
        assert (first, second, b) == (True, False, True)
    with claim(tmp_path, "a") as again:
        assert again


def test_manifest_keeps_whole_lines_and_leaves_out_torn_ones(tmp_path) -> None:
    manifest = Manifest(tmp_path)
    manifest.append({"name": "a", "n": 1})
    with manifest.path.open("ab") as file:
        file.write(b'{"name": "b"')
    manifest.refresh()
    assert set(manifest.by_name) == {"a"}
    manifest.append({"name": "c"})
    manifest.refresh()
    assert [row["name"] for row in manifest.rows] == ["a", "c"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "3/2"], "--shard '3/2'"),
        (["--seeds", "x"], "--seeds 'x'"),
        (["--prices", "a"], "--prices 'a'"),
        (["--gpus", "one"], "--gpus 'one'"),
        (["--video-format", "avi"], "--video-format 'avi'"),
        (["--method", "none"], "unknown method 'none'"),
    ],
)
def test_wrong_options_get_one_line_and_exit_2(
    model, prompts, tmp_path, more, message, capsys, monkeypatch
) -> None:
    arguments = ["accel", "batch", prompts, "-m", model, "-o", str(tmp_path / "out"), *more]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
