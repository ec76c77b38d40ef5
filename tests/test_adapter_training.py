"""Training of guidance adapters: what is recorded, that errors fall, and that it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import built, run
from typer.testing import CliRunner

import accel
from accel import adapter_training, guided_model
from accel.adapter_training import Trainer, Training, mismatch, read_scales
from accel.chain import parameters
from accel.cli import app
from accel.guided_model import GuidedModel


@pytest.fixture
def folder(tmp_path, monkeypatch) -> tuple[str, Path]:
    """A saved tiny pipeline and a prompt file; runs of few steps."""
    monkeypatch.setattr(adapter_training, "STEPS", (3, 5))
    tiny, _ = built("wan21")
    tiny.pipe.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\nzebra\n")
    small = {"height": 32, "width": 32, "num_frames": 5}
    given = {key: tiny.call[key] for key in small if key in tiny.call}
    load = guided_model.load

    def smaller(*args: Any) -> Any:
        pipe, call, fps = load(*args)
        return pipe, {**given, **call}, fps

    monkeypatch.setattr(guided_model, "load", smaller)
    return str(tmp_path / "model"), prompts


def plan(**changes: Any) -> Training:
    settings = {"minutes": 0.03, "trajectories": 4, "batch": 2, "width": 8, **changes}
    return Training(**settings)


def test_errors_fall_and_a_stopped_training_goes_on(folder, tmp_path) -> None:
    model, prompts = folder
    lines: list[str] = []
    first = adapter_training.train(model, prompts, tmp_path / "out", plan(), lines.append)
    assert lines, "the guided runs are said"
    second = adapter_training.train(
        model, prompts, tmp_path / "out", plan(minutes=0.06), lines.append
    )
    assert second["step"] > first["step"] > 0
    assert second["seconds"] > first["seconds"]
    content = json.loads((tmp_path / "out" / "adapters.json").read_text())
    assert content["base"] == "WanTransformer3DModel"
    assert content["training"]["step"] == second["step"]
    assert second["held_error"] < 1.0, "1 is what no adapters at all have"
    tiny, baseline = built("wan21")
    with accel.patched(tiny.pipe, accel.AGD(str(tmp_path / "out"))):
        assert torch.isfinite(run(tiny)).all()
    assert torch.equal(run(tiny), baseline)


def test_trained_adapters_are_learnt_on_from(folder, tmp_path) -> None:
    model, prompts = folder
    first = adapter_training.train(model, prompts, tmp_path / "first", plan(), lambda _: None)
    short = {"start": str(tmp_path / "first"), "minutes": 1e-4}
    for width in (8, 12):
        again = plan(**short, width=width)
        second = adapter_training.train(model, prompts, tmp_path / "on", again, lambda _: None)
        assert second["step"] == 1
        assert second["held_error"] < (1 + first["held_error"]) / 2, "near where the first ended"
        shutil.rmtree(tmp_path / "on")
    for settings in ({"width": 4}, {"scales": (1.0, 4.0)}, {"variant": "cross"}):
        with pytest.raises(accel.AccelError, match=r"--start .*other scales, or are wider"):
            adapter_training.train(
                model, prompts, tmp_path / "on", plan(**short, **settings), lambda _: None
            )
        shutil.rmtree(tmp_path / "on")


def test_other_settings_do_not_go_on_with_what_lies_there(folder, tmp_path) -> None:
    model, prompts = folder
    short = {"minutes": 1e-4}
    adapter_training.train(model, prompts, tmp_path / "out", plan(**short), lambda _: None)
    for name, value in (
        ("scales", (1.0, 4.0)),
        ("seed", 1),
        ("trajectories", 8),
        ("start", str(tmp_path / "out")),
        ("width", 4),
        ("keep_length", False),
    ):
        with pytest.raises(accel.AccelError, match=f"another {name} .*another --output or --work"):
            adapter_training.train(
                model, prompts, tmp_path / "out", plan(**short, **{name: value}), lambda _: None
            )
    prompts.write_text("something else\n")
    with pytest.raises(accel.AccelError, match="another prompts"):
        adapter_training.train(model, prompts, tmp_path / "out", plan(**short), lambda _: None)


def test_trained_adapters_lead_half_of_the_guided_runs(folder, tmp_path, monkeypatch) -> None:
    model, prompts = folder
    adapter_training.train(model, prompts, tmp_path / "first", plan(), lambda _: None)
    led: list[float] = []
    lead = GuidedModel._led

    def counted(self: GuidedModel, leader: Any, scale: float, inputs: dict[str, Any]) -> Any:
        led.append(scale)
        return lead(self, leader, scale, inputs)

    monkeypatch.setattr(GuidedModel, "_led", counted)
    again = plan(start=str(tmp_path / "first"), minutes=1e-4, trajectories=8)
    trainer = Trainer(model, ["a cat"], again, tmp_path / "work")
    pool = trainer.pool(lambda _: None)
    assert 0.2 < 2 * len(led) / len(pool.cond) < 0.8
    assert len(set(led)) == 2 and trainer.own_scale in led, "at the call's scale and at another"
    assert not any(module._forward_hooks for module in trainer.module.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_errors_fall_on_a_gpu(folder, tmp_path) -> None:
    model, prompts = folder
    found = adapter_training.train(model, prompts, tmp_path, plan(device="cuda"), lambda _: None)
    assert found["held_error"] < 1.0


def test_the_frozen_model_is_not_trained(folder, tmp_path) -> None:
    model, prompts = folder
    trainer = Trainer(model, prompts.read_text().split("\n")[:2], plan(), tmp_path / "work")
    before = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    trainer.train(lambda _: None)
    after = trainer.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(value.requires_grad for value in trainer.module.parameters())


def test_guided_runs_are_kept_whole_or_not_at_all(folder, tmp_path, monkeypatch) -> None:
    model, prompts = folder
    trainer = Trainer(model, prompts.read_text().split("\n")[:2], plan(), tmp_path / "work")

    def stopped(content: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", stopped)
        trainer.pool(lambda _: None)
    assert len(trainer.pool(lambda _: None).cond) == len(trainer.pool(lambda _: None).cond) > 0


def test_adapters_that_do_nothing_have_an_error_of_one(folder, tmp_path) -> None:
    model, prompts = folder
    trainer = Trainer(model, prompts.read_text().split("\n")[:2], plan(), tmp_path / "work")
    pool = trainer.pool(lambda _: None)
    adapters = trainer.first_adapters(pool)
    adapters.attach(trainer.module)
    assert trainer._held(adapters, pool, pool.change) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "lora"},
        {"minutes": 0},
        {"trajectories": 3},
        {"scales": (4, 2)},
        {"width": 1},
        {"lr": -1.0},
    ],
)
def test_bad_settings_are_refused(settings) -> None:
    with pytest.raises(accel.AccelError, match=next(iter(settings))):
        plan(**settings)


def test_bad_scales_and_prompt_files_are_said(tmp_path) -> None:
    with pytest.raises(accel.AccelError, match="lowest,highest"):
        read_scales("1-8")
    with pytest.raises(accel.AccelError, match="cannot be read"):
        adapter_training.train("zoo:x", tmp_path / "none.txt", tmp_path, plan(), print)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(accel.AccelError, match="no prompt in it"):
        adapter_training.train("zoo:x", tmp_path / "empty.txt", tmp_path, plan(), print)


def test_the_command_is_there() -> None:
    result = CliRunner().invoke(app, ["adapters", "train", "--help"])
    assert result.exit_code == 0
    for option in ("--prompts", "--variant", "--minutes", "--scales"):
        assert option in result.stdout


def test_what_cannot_be_predicted_does_not_shorten_what_is_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    known, noise = torch.randn(2, 512, 64, generator=generator)
    wanted = known + noise  # half of its energy follows from what is seen

    def best_length(loss) -> float:
        factors = torch.linspace(0.05, 2, 40)
        losses = torch.stack([loss(factor * known, wanted).mean() for factor in factors])
        return float(factors[losses.argmin()] * known.square().mean().sqrt())

    length = float(wanted.square().mean().sqrt())
    assert best_length(lambda a, b: (a - b).square().mean(1)) < 0.75 * length
    assert best_length(mismatch) == pytest.approx(length, rel=0.1)


def test_errors_are_by_length_and_angle_or_by_least_squares(folder, tmp_path) -> None:
    model, _ = folder
    kept = Trainer(model, ["a cat"], plan(), tmp_path / "work")
    least = Trainer(model, ["a cat"], plan(keep_length=False), tmp_path / "work")
    pool = kept.pool(lambda _: None)
    adapters = kept.first_adapters(pool)
    handle = adapters.attach(kept.module)
    scale, rows = torch.tensor([3.0, 5.0]), torch.tensor([0, 1])
    with torch.no_grad():
        for each in adapters.parameters():
            each.add_(0.1)  # they add something
        by_length = kept.errors(adapters, pool, rows, scale)
        adapters.guidance = scale
        handle.remove()
        handle = adapters.attach(least.module)
        by_squares = least.errors(adapters, pool, rows, scale)
    handle.remove()
    assert (by_squares - by_length).abs().min() > 0.01 * by_squares.min()


def test_the_mismatch_is_nothing_for_the_same_and_one_for_no_adapters() -> None:
    wanted = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mismatch(torch.zeros_like(wanted), wanted), _mean(wanted))
    assert (mismatch(wanted, wanted) < 0.05 * _mean(wanted)).all()
    still = torch.zeros(4, 8, requires_grad=True)
    mismatch(still, torch.zeros(4, 8)).sum().backward()
    assert still.grad is not None
    assert still.grad.isfinite().all()


def test_half_of_the_runs_and_rows_have_the_scale_of_the_call(folder, monkeypatch) -> None:
    model, prompts = folder
    trainer = Trainer(
        model, [prompts.read_text().split()[0]], plan(trajectories=16), Path("unused")
    )
    trainer.own_scale = 3.25
    asked: list[float] = []
    settings = GuidedModel._settings

    def seen(self: GuidedModel, scale: float, steps: int, batch: int) -> Any:
        asked.append(scale)
        return settings(self, scale, steps, batch)

    monkeypatch.setattr(GuidedModel, "_settings", seen)
    parts = [trainer._states(index, 8, None) for index in range(8)]
    assert asked[1::2] == [3.25] * 4
    others = asked[::2]
    assert max(others) - min(others) > 2, "spread over 1 to 8"
    assert 3.25 not in others
    adapters = trainer.first_adapters(parts[0])
    handle = adapters.attach(trainer.module, parameters(trainer.module))
    optimiser = adapter_training._optimiser(adapters)
    trainer._step(adapters, optimiser, parts[0], parts[0].change, {"step": 0.0, "seconds": 0.0})
    handle.remove()
    assert (adapters.guidance == 3.25).tolist() == [True, False]


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).square().mean(1)
