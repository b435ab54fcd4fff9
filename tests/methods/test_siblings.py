"""BYOL, MoCo-v2 and SwAV against their formulas; sizes of their heads; SwAV's queue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import Config, with_flags
from fastdino.engine.build import build
from fastdino.engine.schedules import Schedule
from fastdino.methods import build_method
from tests.engine.test_step import B
from tests.methods.oracles import (
    SIBLINGS,
    assert_same_loss,
    configured,
    crops,
    cross_entropy,
    mean_over_pairs,
    perturb,
    sinkhorn,
)

NO, YES = torch.tensor(False), torch.tensor(True)


def built(name: str, **flags):
    torch.manual_seed(0)
    return build_method(configured(**SIBLINGS[name] | flags))


def call(method, batch, *, local: bool = True, use_queue: float = 1.0, frozen: bool = False):
    return method(
        batch.global_,
        batch.local if local else None,
        teacher_temp=0.04,
        freeze_last_layer=frozen,
        use_queue=use_queue,
    )


def embedded(model, batch, local: bool, n: int | None = None) -> list[Tensor]:
    """Unit embeddings of each view; batch norm sees the views that one forward pass brings to the head."""
    groups = [batch.global_] if not local else [batch.global_, batch.local]
    z = model.head(torch.cat([model.backbone(x) for x in groups]))
    return list(F.normalize(z, dim=-1).split(B))


@pytest.mark.parametrize("local", [True, False])
def test_byol(local):
    method = built("byol")
    perturb(method.student, 1)
    perturb(method.teacher, 2)
    out = call(method, crops(), local=local)
    with torch.no_grad():
        t = embedded(method.teacher, crops(), False)
    s = embedded(method.student, crops(), local)
    expected = mean_over_pairs(lambda g, v: (s[v] - t[g]).square().sum(-1).mean(), len(s))
    assert_same_loss(method.student, out.loss, expected)
    names = set(dict(method.student.named_parameters())) - set(dict(method.teacher.named_parameters()))
    assert names == {f"head.predictor.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")}


@pytest.mark.parametrize("local", [True, False])
def test_mocov2(local):
    method = built("mocov2")
    perturb(method.student, 1)
    perturb(method.teacher, 2)
    negatives = method.queue.columns.clone()
    torch.testing.assert_close(negatives.norm(dim=0), torch.ones(32))
    out = call(method, crops(), local=local)
    with torch.no_grad():
        k = embedded(method.teacher, crops(), False)
    q = embedded(method.student, crops(), local)

    def term(g: int, v: int) -> Tensor:
        scores = torch.cat([(q[v] * k[g]).sum(-1, keepdim=True), q[v] @ negatives], 1)
        return F.cross_entropy(scores / 0.1, torch.zeros(B, dtype=torch.int64))

    assert_same_loss(method.student, out.loss, mean_over_pairs(term, len(q)))
    torch.testing.assert_close(
        out.signs["spread"], 4 * torch.cat(k).std(0, correction=0).mean(), rtol=1e-5, atol=1e-6
    )
    assert {n for n, _ in method.student.named_parameters()} == {
        n for n, _ in method.teacher.named_parameters()
    }


@pytest.mark.parametrize("local", [True, False])
def test_swav_without_a_queue(local):
    method = built("swav")
    perturb(method.student.backbone, 1)
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(20))
    out = call(method, crops(), local=local)
    z = embedded(method.student, crops(), local)
    logits = [x @ method.prototypes.T for x in z]
    q = [sinkhorn(x.detach(), 0.05, 3) for x in logits[:2]]
    assert_same_loss(method.student, out.loss, cross_entropy(q, logits, 0.1))
    h = -(torch.cat(q) * torch.cat(q).log()).sum(-1).mean()
    torch.testing.assert_close(out.signs["teacher_entropy"], h, rtol=1e-4, atol=1e-5)


def test_swavs_queue_counts_once_it_is_full():
    method = built("swav-queue", queue_length=3 * B)
    plain = built("swav")
    earlier: list[list[Tensor]] = []
    for step in range(7):
        batch = crops(step)
        started = step > 0
        out = call(method, batch, use_queue=float(started))
        with torch.no_grad():
            z = embedded(method.student, batch, True)
            logits = [x @ method.prototypes.T for x in z]
            q = []
            for view in range(2):
                old = [step_views[view] @ method.prototypes.T for step_views in earlier[-3:]]
                rows = torch.cat([*old, logits[view]]) if len(earlier) >= 3 else logits[view]
                q.append(sinkhorn(rows, 0.05, 3)[-B:])
        torch.testing.assert_close(out.loss, cross_entropy(q, logits, 0.1), rtol=2e-5, atol=1e-6)
        alone = call(plain, batch).loss
        assert torch.isclose(out.loss, alone, rtol=1e-5) == (len(earlier) < 3)
        skipped = step == 2
        method.update(out.statistics, YES if skipped else NO)
        if started and not skipped:
            earlier.append([x.detach() for x in z[:2]])
    assert method.queue.full


def test_swavs_prototypes_are_normalised_by_each_update_that_happens():
    method = built("swav")
    with torch.no_grad():
        method.prototypes.mul_(torch.linspace(0.5, 2, 20)[:, None])
    stretched = method.prototypes.detach().clone()
    statistics = call(method, crops(), frozen=True).statistics
    method.update(statistics, YES)
    assert torch.equal(method.prototypes, stretched)
    method.update(statistics, NO)
    torch.testing.assert_close(method.prototypes, F.normalize(stretched, dim=1))
    call(method, crops(), frozen=True).loss.backward()
    assert method.prototypes.grad is None and method.student.head.mlp[0].weight.grad is not None


def test_swavs_queue_waits_for_its_epoch():
    config = configured(**SIBLINGS["swav-queue"] | {"epoch_queue_starts": 1})
    engine, schedule = build(config), Schedule(config, 2, B)
    filled = []
    for step in range(5):
        engine.step.run(iter([crops(step)]), schedule(step))
        filled.append((int(engine.method.queue.ptr), bool(engine.method.queue.full)))
    assert filled == [(0, False), (0, False), (4, False), (0, True), (4, True)]


def parts(flags: dict) -> dict[str, int]:
    """Parameters of the parts of a student's head."""
    with torch.device("meta"):
        head = build_method(with_flags(Config(), flags)).student.head
    return {name: sum(p.numel() for p in part.parameters()) for name, part in head.named_children()}


def test_heads_have_the_published_sizes():
    resnet = {"arch": "resnet50"}
    assert parts({"method": "byol", **resnet}) == {"mlp": 9_449_472, "predictor": 2_109_440}
    assert parts({"method": "mocov2", **resnet}) == {"mlp": 8_925_440}
    assert parts({"method": "mocov2"}) == {"mlp": 5_517_568}
    assert parts({"method": "swav", **resnet}) == {"mlp": 4_462_720, "last_layer": 384_000}


def test_every_method_says_what_is_evaluated():
    flags = {"dino-mse": {"loss": "mse"}, "dino-infonce": {"loss": "infonce", "queue_length": 32}, "dino": {}}
    for name, own in (SIBLINGS | flags).items():
        method = build_method(configured(**own))
        assert method.evaluated == ("teacher" if name.startswith("dino") else "student")
        assert (method.teacher is None) == name.startswith("swav")
