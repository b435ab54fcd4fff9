"""Logistic regression: the optimum by hand, by its gradient and by scikit-learn; the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression
from torch import nn

from fastdino.evaluation import logistic
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.logistic import accuracy, logistic_regression
from tests.evaluation.test_linear import clusters, damage_unseen, dataset, line, two_heads  # noqa: F401


def test_two_samples_of_two_classes_by_hand():
    """x = e1 and e2: by symmetry W = [[a, -a], [-a, a]], where a solves 1 / (1 + exp(2 a)) = 2 l a."""
    decay = 0.07
    a = brentq(lambda v: 1 / (1 + math.exp(2 * v)) - 2 * decay * v, 0, 10)
    fit = logistic_regression(3 * torch.eye(2), torch.tensor([0, 1]), decay=decay, tolerance=1e-14)
    expected = torch.tensor([[a, -a], [-a, a]], dtype=torch.float64)
    torch.testing.assert_close(fit.weight, expected, rtol=1e-6, atol=1e-6)
    assert fit.objective == pytest.approx(math.log1p(math.exp(-2 * a)) + decay / 2 * 4 * a * a)


def oracle(weight, features, labels, decay):
    """f by autograd."""
    x = features.double() / features.double().norm(dim=1, keepdim=True)
    return nn.functional.cross_entropy(x @ weight.T, labels) + decay / 2 * weight.square().sum()


@pytest.mark.parametrize("n, classes, block", [(200, 5, None), (61, 3, 17)])
def test_optimum_is_that_of_scikit_learn(n, classes, block, monkeypatch):
    if block:
        monkeypatch.setattr(logistic, "_LOGITS", block * classes)
    x, y = clusters(n, classes, 12, spread=1.5)
    decay = 0.1 / n
    fit = logistic_regression(x, y, tolerance=1e-15)
    weight = fit.weight.clone().requires_grad_()
    value = oracle(weight, x, y, decay)
    (grad,) = torch.autograd.grad(value, weight)
    assert float(grad.norm()) < 1e-8 and value.item() == pytest.approx(fit.objective, rel=1e-12)
    assert fit.gap == pytest.approx(float(grad.square().sum()) / (2 * decay), rel=1e-3)

    reference = LogisticRegression(C=1 / (decay * n), fit_intercept=False, tol=1e-11, max_iter=100_000)
    rows = nn.functional.normalize(x.double(), dim=1).numpy()
    coefficients = torch.from_numpy(reference.fit(rows, y.numpy()).coef_)
    assert fit.objective <= float(oracle(coefficients, x, y, decay)) + 1e-12
    assert float((fit.weight - coefficients).abs().max()) < 1e-6 * float(coefficients.abs().max())
    assert accuracy(fit, x, y)[0] == pytest.approx(100 * reference.score(rows, y.numpy()))


def test_the_bound_holds_and_ends_it():
    x, y = clusters(300, 4, 10, spread=2.0)
    best = logistic_regression(x, y, tolerance=1e-15)
    told: list[float] = []
    early = logistic_regression(x, y, tolerance=1e-3, progress=lambda done, gap: told.append(gap))
    assert 0 <= early.objective - best.objective <= early.gap <= 1e-3
    assert early.iterations == len(told) < best.iterations and told[-2] > 1e-3
    cut = logistic_regression(x, y, max_iterations=2)
    assert cut.iterations == 2 and cut.gap > 1e-3


def test_more_decay_gives_smaller_weights_and_lengths_do_not_matter():
    x, y = clusters(100, 3, 6, spread=1.0)
    weak, strong = (logistic_regression(x, y, decay=decay) for decay in (0.001, 0.1))
    assert strong.weight.norm() < 0.5 * weak.weight.norm()
    scaled = logistic_regression(x * torch.rand(100, 1).add(0.1), y, decay=0.001)
    torch.testing.assert_close(scaled.weight, weak.weight, rtol=1e-3, atol=1e-3)


def test_classes_without_an_image_get_no_weight():
    x, y = clusters(40, 3, 6)
    fit = logistic_regression(x, y, num_labels=5)
    assert fit.weight.shape == (5, 6) and accuracy(fit, x, y) == (100.0, 100.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0, 3])}, "labels"),
        ({"labels": torch.tensor([0, -1])}, "labels"),
        ({"features": torch.ones(3, 2)}, "features"),
        ({"decay": 0.0}, "decay"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    right = {"features": torch.eye(2), "labels": torch.tensor([0, 1]), "num_labels": 3}
    with pytest.raises(ValueError, match=message):
        logistic_regression(**(right | change))


def test_command(dataset, capsys):  # noqa: F811
    out = dataset / "out"
    assert main(line(dataset, "logistic", "--output_dir", str(out), "--batch_size_per_gpu", "4")) == 0
    shown = capsys.readouterr().out
    assert "14 training images, 6 held-out images, 2 classes" in shown and "Top1: 100.00" in shown
    assert "NOT CONVERGED" not in shown
    record = json.loads((out / "logistic.json").read_text())
    assert record["figures"] == {"top1": 100.0, "top5": 100.0} and record["details"]["gap"] <= 1e-6
    assert [path.name for path in out.iterdir()] == ["logistic.json"]


def test_a_killed_run_goes_on_with_its_features(dataset, capsys, monkeypatch):  # noqa: F811
    def killed(*_, **__):
        raise KeyboardInterrupt

    words = line(dataset, "logistic", "--output_dir", str(dataset / "out"), "--batch_size_per_gpu", "4")
    with monkeypatch.context() as patch:
        patch.setattr(logistic, "logistic_regression", killed)
        with pytest.raises(KeyboardInterrupt):
            main(words)
    damage_unseen(next((dataset / "train").rglob("*.png")))
    assert main(words) == 0  # no image is read
    assert main(words) == 2  # nothing was left of the finished run


def test_command_that_does_not_converge(dataset, capsys):  # noqa: F811
    assert main(line(dataset, "logistic", "--max_iterations", "1", "--undivided")) == 0
    assert "NOT CONVERGED" in capsys.readouterr().out


def test_command_on_a_subset(dataset, capsys):  # noqa: F811
    assert main(line(dataset, "logistic", "--subset", "50%")) == 0
    assert "7 training images" in capsys.readouterr().out
    assert main(line(dataset, "logistic", "--subset", "some")) == 2
    assert "--subset" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--lambd", "0"], ["--tolerance", "inf"]])
def test_errors_are_one_line(dataset, words, capsys):  # noqa: F811
    assert main(line(dataset, "logistic", *words)) == 2
    error = capsys.readouterr().err
    assert words[0] in error and error.count("\n") == 1
