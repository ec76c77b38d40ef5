"""The shared training loop: it learns, averages, resumes, and Muon orthogonalises."""

import torch

from demos.zoo import train


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
