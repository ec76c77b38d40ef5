"""The shared training loop: it learns, averages, resumes, and Muon orthogonalises."""

import copy

import pytest
import torch
from tiny_pipelines import TINY

from accel import model_zoo
from demos.zoo import text, train


def task(model: torch.nn.Module):
    truth = torch.arange(12.0).view(3, 4) / 10

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(16, 4, generator=generator)
        return (model(x) - x @ truth.T).square().mean()

    return loss, truth


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3))


def test_training_learns_and_resumes(tmp_path, capsys) -> None:
    learner = model()
    loss, truth = task(learner)
    options = {"minutes": 0.03, "lr": 0.02, "muon": ("0",), "ema": 0.9, "checkpoints": tmp_path}
    averaged = train.fit("toy", learner, loss, **options)
    first = torch.load(tmp_path / "toy.pt", weights_only=True)["step"]
    start, reached = (model()[0].weight - truth).abs().max(), averaged["0.weight"] - truth
    assert first > 50  # two seconds of a machine that may be busy
    assert reached.abs().max() < start
    again = model()
    train.fit("toy", again, task(again)[0], **options)
    saved = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert saved["step"] > first
    assert (saved["averaged"]["0.weight"] - truth).abs().max() < max(reached.abs().max(), 0.1)
    assert (tmp_path / "toy.csv").read_text().count("\n") >= first // 50


def test_newton_schulz_makes_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 6, 10), (3, 10, 6)):
        values = torch.linalg.svdvals(train.orthogonal(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.4


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_low_noise_is_trained_too(shift) -> None:
    levels = train.noise_levels(4000, shift, torch.Generator().manual_seed(0))
    assert levels.min() > 0
    assert levels.max() < 1
    assert (levels < 0.25).float().mean() > 0.23
    assert (levels > 0.5).float().mean() > 0.35
    again = train.noise_levels(4000, shift, torch.Generator().manual_seed(0))
    assert torch.equal(levels, again)


def test_an_exported_model_goes_on(tmp_path, monkeypatch) -> None:
    """Its weights, its curve and its autoencoder, but weights of another shape stay."""
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "checkpoints")
    shipped, folder = TINY["wan21"]().pipe, tmp_path / "model"
    shipped.save_pretrained(folder)
    (folder / "loss.csv").write_text("step,minutes,loss\n50,1.0,2.0\n100,2.0,1.5\n")
    model = torch.nn.Module()
    model.transformer = copy.deepcopy(shipped.transformer)
    for weight in model.transformer.parameters():
        weight.data.zero_()
    model.transformer.proj_out = torch.nn.Linear(3, 2)
    own = model.transformer.proj_out.weight.clone()
    train.start_from(model, folder, "toy", "toy-vae")
    known = shipped.transformer.state_dict()
    for key, weight in model.transformer.state_dict().items():
        if not key.startswith("proj_out"):
            assert torch.equal(weight, known[key])
    assert torch.equal(model.transformer.proj_out.weight, own)
    kept = torch.load(train.CHECKPOINTS / "toy-vae.pt", weights_only=True)["averaged"]
    assert kept.keys() == shipped.vae.state_dict().keys()
    assert train._steps(train.CHECKPOINTS / "toy.csv") == 100


def test_embeddings_of_a_smaller_vocabulary_are_taken_over_by_piece() -> None:
    known = model_zoo.load("emoji-image")[0]
    for old, own in (
        (known.tokenizer, text.clip_tokenizer(16)),
        (known.tokenizer_2, text.t5_tokenizer(16)),
    ):
        before, after = old.get_vocab(), own.get_vocab()
        rows = torch.arange(len(old) * 2.0).view(-1, 2)
        new = train._by_piece(torch.full((len(own), 2), -1.0), rows, old)
        for piece in ("apple", "blue", "background"):
            (mark,) = {f"{piece}</w>", f"▁{piece}"} & set(after)
            assert torch.equal(new[after[mark]], rows[before[mark]])
        (unknown,) = {"coconut</w>", "▁coconut"} & set(after)
        assert (new[after[unknown]] == -1).all()
