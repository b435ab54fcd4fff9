"""The report as a stranger gets it: one file, safe, complete, and honest about what is missing."""

from __future__ import annotations

import json
import math
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.config import Config, config_to_yaml, preset, with_flags
from fastdino.dryrun import flops_per_image
from fastdino.models import VisionTransformer
from fastdino.report import details, write_report
from fastdino.report.__main__ import main
from fastdino.report.neighbours import neighbours
from fastdino.report.run import Run, checks, duration, health, read_scores, time_split, training_seconds

MISSING = {
    "No k-NN figures",
    "No attention maps or patch features",
    "No neighbours",
    "No curves",
    "No contact sheet",
    "No speed",
    "No config.yaml",
    "No environment.json",
    "No epoch has ended",
}


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "img", "br", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "


def record(step, **changes):
    """A line of metrics.jsonl, one step per second."""
    values = {"step": step, "epoch": (step - 1) // 50, "loss": 8.0 - step / 50, "lr": 1e-4 * step, "wd": 0.04}
    values |= {"momentum": 0.996, "teacher_temp": 0.04, "teacher_entropy": 4.0, "kl": 0.5, "img_s": 100.0}
    values |= {"t_data": 0.01, "t_forward": 0.04, "t_backward": 0.04, "t_update": 0.01, "bad_steps": 0}
    return values | {"time": 1.7e9 + step} | changes


def jsonl(records):
    return "".join(json.dumps(r) + "\n" for r in records)


@pytest.fixture
def run_dir(tmp_path):
    """A finished run of two epochs."""
    root = tmp_path / "my run"
    root.mkdir()
    config = Config()
    config.model.out_dim, config.crops.global_crops_size = 1000, 32
    config.eval.eval_data_path = "held_out"
    (root / "config.yaml").write_text(config_to_yaml(config))
    (root / "metrics.jsonl").write_text(jsonl(record(step) for step in range(10, 101, 10)))
    (root / "log.txt").write_text(
        jsonl(
            {"train_loss": 7.0 - e, "train_teacher_entropy": 4.0, "train_lr": 1e-4, "epoch": e}
            for e in range(2)
        )
    )
    untrained = {"10": 20.0, "20": 21.5}
    evals = [
        {
            "step": 0,
            "epoch": 0,
            "knn": untrained,
            "untrained": untrained,
            "raw_pixels": {"10": 15.0, "20": 16.5},
        }
    ]
    evals += [
        {"step": 50, "epoch": 1, "knn": {"10": 40.0, "20": 41.5}},
        {"step": 100, "epoch": 2, "knn": {"10": 60, "20": 61.5}},
    ]
    evals += [{"step": 100, "epoch": 2, "jaccard": {"untrained": 22.2, "trained": 44.4}}]
    (root / "eval.jsonl").write_text(jsonl(evals))
    facts = {
        "device": "a CPU",
        "packages": {"torch": "2.13"},
        "images": 5000,
        "global_batch": 32,
        "steps_per_epoch": 50,
    }
    (root / "environment.json").write_text(json.dumps(facts))
    Image.new("RGB", (400, 300), "teal").save(root / "crops.png")
    return root


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)


@pytest.fixture
def images(tmp_path):
    """Two photos with masks."""
    rng = np.random.default_rng(0)
    photos, masks = [], []
    for i in range(2):
        photos.append(tmp_path / f"photo{i}.jpg")
        masks.append(tmp_path / f"mask{i}.png")
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(photos[-1])
        mask = np.zeros((50, 40), np.uint8)
        mask[20:30, 10:30] = 255
        Image.fromarray(mask).save(masks[-1])
    return photos, masks


def assert_self_contained(text):
    page = Page(text)
    assert page.open == [], "unclosed elements"
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "srcset", "href", "action", "data", "poster", "xlink:href"):
            assert value.startswith(("data:", "#")), (tag, name, value[:80])
        assert name != "style" or "url(" not in value
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "http://" not in text and "https://" not in text
    policy = [
        value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src")
    ]
    assert len(policy) == 1 and "default-src 'none'" in policy[0] and "script" not in policy[0]
    assert len(text.encode()) < 5_000_000
    return page


def test_whole_report(run_dir, backbone, images):
    backbone.train()
    path = write_report(run_dir, backbone=backbone, image_paths=images[0], mask_paths=images[1])
    assert backbone.training
    assert path == run_dir / "report.html" and [p.name for p in run_dir.glob(".*")] == []
    page = assert_self_contained(path.read_text())
    words = " ".join(page.text.split())
    assert (
        "61.5 % of held-out images" in words
        and "against 21.5 % before training and 16.5 % with raw pixels" in words
    )
    assert "Untrained network 22.2 %" in words and "Trained teacher 44.4 %" in words
    assert "It learned 40.0 points above" in words and "No collapse" in words and "No bad steps" in words
    assert "10.0 % of each step went by waiting for crops" in words
    assert (
        "0: collapsed to one prototype" in words
        and f"ln K = {math.log(1000):.2f}: collapsed to uniform" in words
    )
    assert "Two global views of 32 pixels, each 40 to 100 % of the image, and 8 local views of 96" in words
    assert "out_dim 1000" in words and "packages.torch 2.13" in words
    assert "Held-out images, at 64 pixels" in words
    for title in (
        "Loss",
        "Learning rate",
        "Weight decay",
        "Teacher momentum",
        "Throughput",
        "Where the time went",
    ):
        assert title in words, title
    assert [sentence for sentence in MISSING if sentence in words] == ["No neighbours"]
    pictures = [value for tag, name, value in page.attributes if tag == "img" and name == "src"]
    assert len(pictures) == 2 * (1 + 1 + 3) + 1  # photo, features and three heads each; the crops
    assert words.count("% overlap") == 2


def test_empty_directory(tmp_path):
    words = assert_self_contained(write_report(tmp_path).read_text()).text
    for sentence in MISSING:
        assert sentence in words, sentence
    with pytest.raises(NotADirectoryError, match="nowhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "absent", ["config.yaml", "metrics.jsonl", "log.txt", "eval.jsonl", "environment.json", "crops.png"]
)
def test_each_file_may_be_absent_or_rubbish(run_dir, absent):
    (run_dir / absent).unlink()
    assert_self_contained(write_report(run_dir).read_text())
    for rubbish in (
        b"",
        b"\xff\xfe{[",
        b"[1, 2]",
        b"null\n3\n{}\n" + b"[" * 20000,
        b'{"step": 1e999}\n{"epoch": "x"}',
    ):
        (run_dir / absent).write_bytes(rubbish)
        assert_self_contained(write_report(run_dir).read_text())


def test_damaged_lines_are_counted(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "lo\n[]\n\n{"loss": 3}\n')
    assert "3 damaged lines of metrics.jsonl left out." in write_report(run_dir).read_text()


def test_hostile_text_is_escaped(run_dir, backbone, images, tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    root = tmp_path / "<b onclick=x>'\"&"
    run_dir.rename(root)
    (root / "config.yaml").write_text(json.dumps({"arch": evil, evil: evil, "out_dim": 1000}))
    (root / "environment.json").write_text(
        json.dumps({"device": evil, "precision": evil, evil: {evil: evil}})
    )
    (root / "eval.jsonl").write_text(json.dumps({"step": 5, "knn": {evil: 50.0}}))
    photo = tmp_path / "<i>\"x' onload=y.jpg"
    images[0][0].rename(photo)
    bad = tmp_path / "<u>.jpg"
    bad.write_text("no image")
    text = write_report(root, backbone=backbone, image_paths=[photo, bad]).read_text()
    page = assert_self_contained(text)
    assert not {"b", "i", "u", "script"} & {
        t for t, n, v in page.attributes if "alert" in v or n.startswith("on")
    }
    assert "u" not in page.tags and evil in page.text and "<b onclick=x>'\"&" in page.text
    assert "cannot be read: <u>.jpg" in page.text


def test_large_runs_stay_small(run_dir, backbone, images):
    (run_dir / "metrics.jsonl").write_text(
        jsonl(record(s, img_s=100 + s % 7, loss=s % 11) for s in range(1, 20001))
    )
    (run_dir / "log.txt").write_text(jsonl({"train_loss": 1.0, "epoch": e} for e in range(5000)))
    noise = np.random.default_rng(0).integers(0, 256, (2000, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run_dir / "crops.png")
    (run_dir / "environment.json").write_text(json.dumps({str(i): "x" * 10_000 for i in range(1000)}))
    wide = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=16)
    assert_self_contained(write_report(run_dir, backbone=wide, image_paths=[images[0][0]] * 20).read_text())


def test_untrained_run_shows_baselines_only(run_dir):
    lines = (run_dir / "eval.jsonl").read_text().splitlines()
    (run_dir / "eval.jsonl").write_text(lines[0] + "\n")
    scores = read_scores(Run.read(run_dir))
    assert [tone for _, tone, _ in scores.rows] == ["raw", "untrained"]
    assert "Raw pixels" in Page(write_report(run_dir).read_text()).text


def test_log_txt_serves_where_metrics_are_missing(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    text = write_report(run_dir).read_text()
    assert "loss: from 7 to 6" in text and "epoch 2" in text


def test_repeated_steps_of_a_resumed_run_count_once(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(jsonl(record(step, loss=1.0) for step in (90, 100, 110)))
    run = Run.read(run_dir)
    assert run.column("step") == [10.0 * i for i in range(1, 12)]
    assert run.column("loss")[-3:] == [1.0, 1.0, 1.0]


def states(root):
    run = Run.read(root)
    return {check.title: check.state for check in checks(run, read_scores(run))}


def test_findings(run_dir):
    assert set(states(run_dir).values()) == {"good"}
    (run_dir / "log.txt").unlink()
    for entropy, title in ((0.05, "Collapsed to one prototype"), (6.9, "Uniform output")):
        lines = [record(s, teacher_entropy=entropy, t_data=1.0, bad_steps=s // 50) for s in (50, 100)]
        (run_dir / "metrics.jsonl").write_text(jsonl(lines))
        found = states(run_dir)
        assert (
            found[title] == "bad" and found["2 bad steps"] == "note" and found["Waiting for data"] == "note"
        )
    (run_dir / "eval.jsonl").write_text(
        json.dumps({"step": 9, "knn": {"5": 20.0}, "raw_pixels": {"5": 30.0}})
    )
    assert states(run_dir)["Nothing learned yet"] == "bad"
    evals = {"step": 9, "knn": {"5": 20.0}, "raw_pixels": {"5": 30.0}, "untrained": {"5": 15.0}}
    (run_dir / "eval.jsonl").write_text(json.dumps(evals))
    assert states(run_dir)["Not yet better than raw pixels"] == "note"


def test_time(run_dir):
    run = Run.read(run_dir)
    assert [round(phase.share) for phase in time_split(run)] == [10, 40, 40, 10]
    assert training_seconds(run) == pytest.approx(90)
    lines = [record(s) for s in range(1, 50)] + [record(s, time=1.8e9 + s) for s in range(50, 100)]
    (run_dir / "metrics.jsonl").write_text(jsonl(lines))
    assert training_seconds(Run.read(run_dir)) == pytest.approx(48 + 49)  # the pause does not count
    assert [duration(s) for s in (52, 492, 11_100, 187_200)] == [
        "52 s",
        "8 min 12 s",
        "3 h 05 min",
        "2 d 4 h",
    ]


def test_masks_must_match_images(run_dir, backbone, images):
    with pytest.raises(ValueError, match="mask_paths"):
        write_report(run_dir, backbone=backbone, image_paths=images[0], mask_paths=images[1][:1])


def test_neighbours(run_dir, backbone, images, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    rng = np.random.default_rng(1)
    bank = [tmp_path / f"bank{i}.png" for i in range(7)]
    for path in bank:
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    Image.open(images[0][1]).save(tmp_path / "copy.png")
    paths = [*images[0], *bank, tmp_path / "copy.png", tmp_path / "broken.jpg"]
    rows = neighbours(backbone.eval(), images[0], paths, side=32, device="cpu")
    assert [[tile.cosine for tile in row][0] for row in rows] == [None, None]
    assert [len(row) for row in rows] == [6, 6]
    assert rows[1][1].name == "copy.png" and rows[1][1].cosine == pytest.approx(1.0, abs=1e-5)
    for row in rows:
        cosines = [tile.cosine for tile in row[1:]]
        assert cosines == sorted(cosines, reverse=True)
        assert not {"photo0.jpg", "photo1.jpg"} & {tile.name for tile in row[1:]}
    text = write_report(run_dir, backbone=backbone, image_paths=images[0], bank_paths=paths).read_text()
    page = assert_self_contained(text)
    assert "Nearest training images" in page.text and "No neighbours" not in page.text
    assert neighbours(backbone, images[0], bank[:5], side=32, device="cpu") == []


def test_without_labels_nothing_is_called_healthy_or_held_out(run_dir, backbone, images):
    (run_dir / "eval.jsonl").unlink()
    (run_dir / "config.yaml").write_text(config_to_yaml(Config()))
    words = Page(write_report(run_dir, backbone=backbone, image_paths=images[0]).read_text()).text
    assert "Healthy" not in words and "Learning not measured" in words
    assert "Training images, at" in words and "Held-out images, at" not in words


def test_health(run_dir):
    assert "Healthy" in Page(write_report(run_dir).read_text()).text
    lines = [record(s, teacher_entropy=0.05, t_data=1.0, bad_steps=2) for s in (50, 100)]
    (run_dir / "metrics.jsonl").write_text(jsonl(lines))
    assert health(checks(Run.read(run_dir), read_scores(Run.read(run_dir)))) == (
        "note",
        "2 bad steps; waiting for data",
    )
    (run_dir / "log.txt").unlink()
    words = Page(write_report(run_dir).read_text()).text
    assert "Healthy" not in words and "Collapsed to one prototype" in words.split("Did it learn?")[0]
    assert health([]) == ("", "")


def test_what_differs_from_the_nearest_preset(run_dir):
    config = with_flags(Config(), preset("paper-300") | {"lr": 0.001, "data_path": "/photos"})
    (run_dir / "config.yaml").write_text(config_to_yaml(config))
    found = details.difference(Run.read(run_dir))
    assert (found.name, found.flags) == ("paper-300", [("lr", "0.001", "0.0005")])
    words = " ".join(Page(write_report(run_dir).read_text()).text.split())
    assert "Beside the preset paper-300 1 flag differs" in words and "--lr 0.001 0.0005" in words
    assert "k-NN 72.8, linear 76.1" in words
    (run_dir / "config.yaml").write_text("lr: 0.001\nunknown_flag: 3\n")
    assert details.difference(Run.read(run_dir)).name == ""
    (run_dir / "config.yaml").write_text("lr: fast\n")
    assert details.difference(Run.read(run_dir)) is None


def test_use_of_the_machine(run_dir):
    facts = {"device": "NVIDIA A100-SXM4-80GB", "precision": "bfloat16", "processes": 2}
    (run_dir / "environment.json").write_text(json.dumps(facts))
    (run_dir / "config.yaml").write_text(config_to_yaml(Config()))
    lines = [record(s, img_s=1000.0, memory=m) for s, m in ((1, 5_000_000_000), (2, 6_000_000_000))]
    (run_dir / "metrics.jsonl").write_text(jsonl(lines))
    used = dict(details.efficiency(Run.read(run_dir)))
    flops = 1000 * flops_per_image(Config())
    assert used["Images per second, median"] == "1,000"
    assert used["Matrix products per second"] == f"{flops / 1e12:,.1f} TFLOP/s"
    assert used["Model FLOPs utilisation (MFU)"] == f"{100 * flops / 624e12:.1f} % of 624.0 TFLOP/s"
    assert used["Peak memory of the first process"] == "6.00 GB"
    (run_dir / "environment.json").write_text(json.dumps(facts | {"precision": "float32"}))
    assert "Model FLOPs utilisation (MFU)" not in dict(details.efficiency(Run.read(run_dir)))


def test_left_out_files_and_commands(run_dir):
    (run_dir / "bad_files.txt").write_text("".join(f"<{i}>.jpg: truncated\n" for i in range(250)))
    config = with_flags(Config(), {"data_path": "d/train", "eval_data_path": "d/val"})
    (run_dir / "config.yaml").write_text(config_to_yaml(config))
    page = assert_self_contained(write_report(run_dir).read_text())
    assert "<7>.jpg: truncated" in page.text and "and 50 more in bad_files.txt" in page.text
    lines = dict(details.commands(Run.read(run_dir)))
    root = f"'{run_dir}'"
    again = f"python train.py --config {root}/config.yaml --output_dir {root} --resume auto"
    assert again in lines.values()
    knn = f"python -m fastdino.evaluation knn --weights {root} --data_path"
    assert lines["k-NN"] == f"{knn} d --image_size 224"
    for training, held_out, data in (("d/train", "d/test", "d"), ("d/a", "d/b", "DIR"), ("d", None, "DIR")):
        paths = {"data_path": training, "eval_data_path": held_out, "global_crops_size": 48}
        (run_dir / "config.yaml").write_text(config_to_yaml(with_flags(Config(), paths)))
        told = dict(details.commands(Run.read(run_dir)))
        assert told["k-NN"] == f"{knn} {data} --image_size 48"
    for line in lines.values():
        assert line in page.text


def test_runs_side_by_side(run_dir, tmp_path, capsys):
    other = tmp_path / "<other>"
    shutil.copytree(run_dir, other)
    (other / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace("lr: 0.0005", "lr: 0.1"))
    (other / "eval.jsonl").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    roots = [str(run_dir), str(other), str(empty)]
    assert main([*roots, "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    page = assert_self_contained((tmp_path / "page.html").read_text())
    words = " ".join(page.text.split())
    assert "my run <other> empty" in words
    assert "k-NN of the teacher, k = 20, % 61.5 - -" in words
    assert "Steps 100 100 -" in words and "Loss" in words and "k-NN accuracy" in words
    assert main([roots[0], roots[1], "--output", str(tmp_path / "page.html")]) == 0
    words = " ".join(Page((tmp_path / "page.html").read_text()).text.split())
    assert "--lr 0.0005 0.1" in words and "--output_dir" not in words
    for bad in ([*roots, *roots], [roots[0], str(tmp_path / "nowhere")], [roots[0], "--output", "x.html"]):
        assert main(bad) == 2
        assert "python -m fastdino.report: error:" in capsys.readouterr().err
    assert main([roots[0]]) == 0 and (run_dir / "report.html").exists()
