"""`accel recipe` lists, checks, compares and exchanges recipe files."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import accel
from accel import cli, model_zoo
from accel.recipe import FILE_NAME, published_names


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.json"
    accel.Recipe.of((accel.PlainCycle(interval=4),), model="WanTransformer3DModel").save(path)
    return path


def call(*arguments: object):
    return CliRunner().invoke(cli.app, ["recipe", *map(str, arguments)])


def test_list_names_every_shipped_recipe() -> None:
    printed = call("list").stdout
    assert "zoo:emoji-video" in printed
    assert all(f"published:{name} " in printed for name in published_names())


def test_show_prints_what_can_be_loaded(tmp_path) -> None:
    path = tmp_path / "shown.json"
    path.write_text(call("show", "zoo:emoji-video").stdout)
    assert accel.Recipe.load(path) == accel.Recipe.load(model_zoo.path("emoji-video") / FILE_NAME)


def test_validate_names_the_wrong_file(file, tmp_path) -> None:
    assert "PlainCycle" in call("validate", file).stdout
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"entries": [{"name": "Nope"}]}')
    result = call("validate", file, wrong)
    assert isinstance(result.exception, accel.AccelError)
    assert "Nope" in str(result.exception)


def test_diff_tells_what_changed(file, tmp_path) -> None:
    assert call("diff", file, file).exit_code == 0
    other = tmp_path / "other.json"
    accel.Recipe.of((accel.PlainCycle(interval=5),), model="WanTransformer3DModel").save(other)
    result = call("diff", file, other)
    assert result.exit_code == 1
    assert result.stdout == "entries.0.settings.interval: 4 -> 5\n"


def test_pull_pins_the_commit(file, tmp_path, monkeypatch) -> None:
    asked = []
    info = lambda self, repository, revision: SimpleNamespace(sha="abc123")  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *args, **kwargs: asked.append((args, kwargs)) or file,
    )
    target = tmp_path / "pulled.json"
    assert "owner/name@abc123" in call("pull", "owner/name", "-o", target).stdout
    assert asked == [(("owner/name", FILE_NAME), {"revision": "abc123"})]
    assert json.loads(target.read_text()) == json.loads(file.read_text())


def test_push_uploads_a_checked_file(file, tmp_path, monkeypatch) -> None:
    sent = []

    def upload(self, repository, operations, **kwargs):
        sent.append(kwargs | {"parts": {each.path_in_repo for each in operations}})
        return SimpleNamespace(oid="abc123", commit_url="https://hub/c")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", upload)
    assert "abc123" in call("push", file, "owner/name", "--pull-request").stdout
    assert sent[0]["parts"] == {FILE_NAME}
    assert sent[0]["create_pr"] is True
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert isinstance(call("push", wrong, "owner/name").exception, accel.AccelError)
    assert len(sent) == 1


def test_tensors_travel_through_the_hub(tmp_path, monkeypatch) -> None:
    weights = tmp_path / "fitted.safetensors"
    save_file({"x": torch.ones(2)}, weights)
    method = accel.BlockCaching(threshold=2.0, adjustment=str(weights))
    mine, hub = tmp_path / "mine" / "recipe.json", tmp_path / "hub"
    accel.Recipe.of((method,)).save(mine)
    hub.mkdir()

    def commit(self, repository, operations, **kwargs):
        for each in operations:
            shutil.copy(each.path_or_fileobj, hub / each.path_in_repo)
        return SimpleNamespace(oid="abc", commit_url="https://hub/c")

    def download(repository, name, revision):
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(hub / name, tmp_path / "cache" / name)

    info = lambda self, repository, revision: SimpleNamespace(sha="abc")  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert call("push", mine, "owner/name").exit_code == 0
    pulled = tmp_path / "pulled" / "other.json"
    assert call("pull", "owner/name", "-o", pulled).exit_code == 0
    (found,) = accel.Recipe.load(pulled).methods
    assert load_file(found.adjustment)["x"].tolist() == [1, 1]
    assert call("diff", mine, pulled).exit_code == 0, "equal wherever the tensors lie"


def test_a_hub_that_cannot_be_reached_is_one_message(tmp_path, monkeypatch) -> None:
    def fail(self, *args, **kwargs):
        raise OSError("no route to host\nlong trace")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    result = call("pull", "owner/name", "-o", tmp_path / "x.json")
    assert str(result.exception) == "owner/name: no route to host"
    assert not (tmp_path / "x.json").exists()
