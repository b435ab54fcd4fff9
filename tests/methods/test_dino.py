"""The switches of DINO's ablations against their formulas, and teachers that are not averages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.engine.build import Engine, build
from fastdino.engine.schedules import Schedule
from fastdino.methods import DINO
from fastdino.methods.dino import ContrastDINO, RegressionDINO
from tests.engine.test_step import B, K, batches
from tests.methods.oracles import (
    assert_same_loss,
    configured,
    crops,
    cross_entropy,
    mean_over_pairs,
    perturb,
    sinkhorn,
    views,
)


def logits_of(model, images: list[Tensor]) -> list[Tensor]:
    return [model.head(model.backbone(x)) for x in images]


def embeddings_of(model, images: list[Tensor]) -> list[Tensor]:
    return [model(x) for x in images]


def softmax_over_batch(x: Tensor, temp: float) -> Tensor:
    q = (x / temp).softmax(0)
    return q / q.sum(1, keepdim=True)


def one_hot(x: Tensor) -> Tensor:
    return F.one_hot(x.argmax(-1), K).float()


# Flags -> targets of the teacher's logits of both views and the center.
Targets = Callable[[list[Tensor], Tensor], list[Tensor]]
OPERATIONS: list[tuple[dict, Targets]] = [
    ({}, lambda t, c: [((x - c) / 0.06).softmax(-1) for x in t]),
    ({"teacher_temp": 0.0, "warmup_teacher_temp_epochs": 0}, lambda t, c: [one_hot(x - c) for x in t]),
    ({"teacher_op": "softmax_batch"}, lambda t, c: [softmax_over_batch(x, 0.06) for x in t]),
    ({"teacher_op": "sinkhorn"}, lambda t, c: [sinkhorn(x, 0.06, 3) for x in t]),
    (
        {"teacher_op": "sinkhorn", "sinkhorn_iterations": 5, "predictor": "on", "local_crops_number": 0},
        lambda t, c: [sinkhorn(x, 0.06, 5) for x in t],
    ),
    (
        {"teacher_op": "sinkhorn", "sk_joint": True},
        lambda t, c: list(sinkhorn(torch.cat(t), 0.06, 3).chunk(2)),
    ),
    (
        {"predictor": "on", "predictor_hidden_dim": 20},
        lambda t, c: [((x - c) / 0.06).softmax(-1) for x in t],
    ),
    (
        {"bottleneck_dim": 0, "head_layers": 2, "head_act": "relu", "teacher_op": "sinkhorn"},
        lambda t, c: [sinkhorn(x, 0.06, 3) for x in t],
    ),
]


@pytest.mark.parametrize(
    ("flags", "targets"), OPERATIONS, ids=[" ".join(f) or "plain" for f, _ in OPERATIONS]
)
def test_the_loss_of_each_teacher_operation_is_its_formula(flags, targets):
    torch.manual_seed(0)
    method = DINO(configured(**flags))
    perturb(method.student, 1)
    perturb(method.teacher, 2)
    method.center.copy_(torch.randn(K))
    batch = crops()
    if flags.get("local_crops_number") == 0:
        batch = dataclasses.replace(batch, local=None)
    out = method(batch.global_, batch.local, teacher_temp=torch.tensor(0.06), freeze_last_layer=False)
    images = views(batch)
    with torch.no_grad():
        t = logits_of(method.teacher, images[:2])
        p = targets(t, method.center)
    assert_same_loss(method.student, out.loss, cross_entropy(p, logits_of(method.student, images), 0.1))
    h = -torch.xlogy(torch.cat(p), torch.cat(p)).sum(-1).mean()
    torch.testing.assert_close(out.signs["teacher_entropy"], h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.signs["kl"], out.loss.detach() - h, rtol=1e-4, atol=1e-4)
    if flags.get("teacher_op"):
        assert out.statistics.numel() == 0
        method.update(out.statistics, torch.tensor(False))
    else:
        torch.testing.assert_close(out.statistics, torch.cat(t).mean(0), rtol=1e-4, atol=1e-5)


def test_sinkhorn_with_one_iteration_is_softmax_over_the_batch():
    losses = []
    for flags in ({"teacher_op": "sinkhorn", "sinkhorn_iterations": 1}, {"teacher_op": "softmax_batch"}):
        torch.manual_seed(0)
        method = DINO(configured(**flags))
        out = method(crops().global_, crops().local, teacher_temp=0.04, freeze_last_layer=False)
        losses.append(out.loss)
    assert torch.equal(*losses)


def test_a_frozen_last_layer_gets_no_gradient_in_any_form():
    for flags in ({"teacher_op": "sinkhorn"}, {"teacher_temp": 0.0, "warmup_teacher_temp_epochs": 0}):
        method = DINO(configured(**flags))
        method(crops().global_, None, teacher_temp=0.04, freeze_last_layer=True).loss.backward()
        assert method.student.head.last_layer.weight_v.grad is None
        assert method.student.head.mlp[0].weight.grad is not None


@pytest.mark.parametrize("momentum", [0.9, 1.0])
@pytest.mark.parametrize("predictor", ["off", "on"])
def test_mse_is_two_minus_twice_the_cosine_of_centered_targets(momentum, predictor):
    torch.manual_seed(0)
    flags = {"loss": "mse", "predictor": predictor, "predictor_hidden_dim": 20, "center_momentum": momentum}
    method = RegressionDINO(configured(**flags))
    perturb(method.student, 1)
    perturb(method.teacher, 2)
    if momentum < 1:
        method.center.copy_(0.2 * torch.randn(16))
    batch, center = crops(), method.center.clone()
    out = method(batch.global_, batch.local, teacher_temp=0.04, freeze_last_layer=False)
    images = views(batch)
    with torch.no_grad():
        t = embeddings_of(method.teacher, images[:2])
        unit = [F.normalize(x - center, dim=-1) for x in t]
    s = [F.normalize(x, dim=-1) for x in embeddings_of(method.student, images)]
    expected = mean_over_pairs(lambda g, v: (s[v] - unit[g]).square().sum(-1).mean(), len(s))
    assert_same_loss(method.student, out.loss, expected)
    cosine = mean_over_pairs(lambda g, v: F.cosine_similarity(s[v], unit[g]).mean(), len(s))
    torch.testing.assert_close(out.loss, 2 - 2 * cosine, rtol=1e-5, atol=1e-5)
    raw = F.normalize(torch.cat(t), dim=-1)
    torch.testing.assert_close(out.signs["spread"], 4 * raw.std(0, correction=0).mean())  # sqrt(16)
    mean = torch.cat(t).mean(0)
    method.update(out.statistics, torch.tensor(True))
    assert torch.equal(method.center, center)
    method.update(out.statistics, torch.tensor(False))
    torch.testing.assert_close(method.center, momentum * center + (1 - momentum) * mean)


def test_infonce_is_the_dense_formula():
    torch.manual_seed(0)
    method = ContrastDINO(configured(loss="infonce", queue_length=24))
    perturb(method.student, 1)
    perturb(method.teacher, 2)
    negatives = method.queue.columns.clone()
    batch, images = crops(), views(crops())
    out = method(batch.global_, batch.local, teacher_temp=0.04, freeze_last_layer=False)
    with torch.no_grad():
        keys = [F.normalize(x, dim=-1) for x in embeddings_of(method.teacher, images[:2])]
    queries = [F.normalize(x, dim=-1) for x in embeddings_of(method.student, images)]

    def term(g: int, v: int) -> Tensor:
        positive = (queries[v] * keys[g]).sum(-1, keepdim=True)
        scores = torch.cat([positive, queries[v] @ negatives], 1) / 0.1
        return F.cross_entropy(scores, torch.zeros(B, dtype=torch.int64))

    assert_same_loss(method.student, out.loss, mean_over_pairs(term, len(queries)))
    method.update(out.statistics, torch.tensor(True))
    assert torch.equal(method.queue.columns, negatives) and method.queue.ptr == 0
    for _ in range(4):
        method(batch.global_, None, teacher_temp=0.04, freeze_last_layer=False)
        method.update(out.statistics, torch.tensor(False))
    assert method.queue.ptr == 4 * 2 * B % 24
    newest = method.queue.columns[:, :8]  # 32 keys into 24 places: the last 8 came round to the beginning
    torch.testing.assert_close(newest.T, torch.cat(keys))
    assert not torch.equal(method.queue.columns[:, 8:], negatives[:, 8:])


def trained(engine: Engine, config, steps: range) -> list[float]:
    schedule = Schedule(config, 3, B)
    return [engine.step.run(batches(s), schedule(s)).loss for s in steps]


def weights(model) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_teachers_that_are_no_average(precision, optimizer):
    """Three steps per epoch; the last layer begins in the second epoch."""
    seen: dict[str, list[list[Tensor]]] = {}
    for follows in ("copy", "prev_iter", "prev_epoch"):
        config = configured(teacher=follows, precision=precision, optimizer=optimizer, lr=0.01)
        engine = build(config)
        students = [weights(engine.method.student)]
        for step in range(7):
            trained(engine, config, range(step, step + 1))
            students.append(weights(engine.method.student))
            assert step == 0 or not same(students[-1], students[-2])
            teacher = weights(engine.method.teacher)
            age = {"copy": 0, "prev_iter": 1, "prev_epoch": (step + 1) % 3}[follows]
            assert same(teacher, students[-1 - age]), (follows, step)
            assert all(torch.equal(c, p.bfloat16()) for p, c in engine.updater.copies.items())
        seen[follows] = students
        assert bool(engine.updater.copies) == (precision == "bf16")


def test_a_skipped_step_moves_no_teacher():
    config = configured(teacher="prev_iter")
    engine = build(config)
    trained(engine, config, range(4))
    student, teacher = weights(engine.method.student), weights(engine.method.teacher)
    bad = crops()
    bad.local[0, 0, 0, 0] = float("nan")
    assert engine.step.run(iter([bad]), Schedule(config, 3, B)(4)).skipped
    assert same(student, weights(engine.method.student)) and same(teacher, weights(engine.method.teacher))


def test_a_predictor_belongs_to_the_student_and_is_trained():
    config = configured(predictor="on", predictor_hidden_dim=20, use_bn_in_head=True)
    engine = build(config)
    student, teacher = (
        set(dict(m.named_parameters())) for m in (engine.method.student, engine.method.teacher)
    )
    extra = {"head.predictor.0.weight", "head.predictor.0.bias", "head.predictor.3.weight"}
    extra |= {"head.predictor.1.weight", "head.predictor.1.bias", "head.predictor.3.bias"}
    assert student - teacher == extra and teacher < student
    before = engine.method.student.head.predictor[0].weight.detach().clone()
    kept = engine.method.teacher.head.mlp[0].weight.clone()
    trained(engine, config, range(1, 3))
    assert not torch.equal(engine.method.student.head.predictor[0].weight, before)
    assert not torch.equal(engine.method.teacher.head.mlp[0].weight, kept)


def test_a_center_of_momentum_one_stays_zero():
    config = configured(center_momentum=1.0)
    engine = build(config)
    trained(engine, config, range(1, 4))
    assert engine.method.center.eq(0).all()
