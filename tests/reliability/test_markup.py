"""Names, labels and flags that are markup: every page has the elements of its template and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastdino.report import write_report
from fastdino.report.comparison import read_results, write_comparison
from fastdino.report.runs import write_runs
from reliability.hostile_names import FORGED, NAMES
from reliability.promises import NIGHTLY, promise

STRINGS = [
    *NAMES,
    f"</script><script>{FORGED}</script>",
    f"</title></head><body onload={FORGED}>",
    f"</style><script src=https://example.org/{FORGED}></script>",
    f"--></p><iframe srcdoc='<script>{FORGED}</script>'></iframe>",
    "<base href=https://example.org/>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<link rel=stylesheet href=https://example.org/x.css>",
    "<form action=https://example.org><input name=x>",
    f"<a href=javascript:{FORGED}>x</a>",
    f"<img src=https://example.org/x.png onerror={FORGED}>",
    "<object data=https://example.org></object><embed src=x>",
    f"<math><mi xlink:href='javascript:{FORGED}'>x",
    "url(https://example.org/x.png) expression(1)",
    "100%;background:url(https://example.org)",
    f'" style="background:url(https://example.org)" onfocus="{FORGED}" autofocus x="',
    f"&#x3c;script&#x3e;{FORGED}",
    f"\\u003cscript\\u003e{FORGED}\\u003c/script\\u003e",
    "\ufeff<?xml version='1.0'?><!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>&e;",
    f"<noscript><p title='</noscript><img src=x onerror={FORGED}>'>",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "\ud800 lone surrogate",
]
PLAIN = "plain text"
_VOID = {"meta", "link", "img", "br", "hr", "input", "path", "circle"}
_URLS = {"href", "src", "srcset", "action", "data", "poster", "xlink:href", "formaction"}


class Tree(HTMLParser):
    """The elements of a page in order, with the names of their attributes, and where they close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *sorted(name for name, _ in attributes)))
        self.attributes += [(name, value or "") for name, value in attributes]

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", data))

    def handle_decl(self, data: str) -> None:
        self.elements.append(("declaration", data))

    def handle_pi(self, data: str) -> None:
        self.elements.append(("instruction", data))


def check(page: str, template: Tree) -> None:
    """AssertionError unless ``page`` has the elements of ``template`` and asks nothing of anybody."""
    found = Tree(page)
    assert found.elements == template.elements
    for name, value in found.attributes:
        assert not name.startswith("on"), f"{name}={value[:100]!r}"
        if name in _URLS:
            assert value.startswith(("data:image/", "data:,", "#")), f"{name}={value[:100]!r}"
        if name == "style":
            assert "url(" not in value and "expression" not in value, f"{name}={value[:100]!r}"
    assert "default-src 'none'" in page


# ------------------------------------------------------------------------------------------------------ pages


def run_directory(root: Path, text: str) -> Path:
    """A run with ``text`` wherever a file may hold text."""
    root.mkdir(parents=True, exist_ok=True)
    config = {"data_path": text, "eval_data_path": text, "arch": text, "output_dir": text, "out_dim": 8}
    lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
    (root / "config.yaml").write_text("\n".join(lines), "utf-8", "replace")
    facts = {"device": text, "precision": text, "commit": text, "packages": {"torch": text}, "images": 5}
    (root / "environment.json").write_text(json.dumps({**facts, f"key {text}": text}))
    record = {"step": 1, "epoch": 0, "loss": 2.0, "lr": 1.0, "teacher_entropy": 1.0, "kl": 0.5, "img_s": 9.0}
    records = [record | {"time": 1.0}, record | {"step": 2, "time": 2.0, text: text}]
    (root / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (root / "log.txt").write_text(json.dumps({"epoch": 0, "train_loss": 2.0, f"train_{text}": text}) + "\n")
    knn = {"10": 50.0, text: 40.0}
    (root / "eval.jsonl").write_text(json.dumps({"step": 2, "knn": knn, "untrained": knn, "raw_pixels": knn}))
    (root / "bad_files.txt").write_text(f"{text}: {text}\n", "utf-8", "replace")
    (root / "crops.png").write_bytes(b"no picture")
    return root


def page_of_a_run(folder: Path, text: str) -> str:
    return write_report(run_directory(folder / "run", text)).read_text("utf-8")


def page_of_runs(folder: Path, text: str) -> str:
    roots = [run_directory(folder / name, text) for name in ("one", "two")]
    return write_runs(roots, folder / "runs.html").read_text("utf-8")


def page_of_an_evaluation(folder: Path, text: str) -> str:
    networks = []
    for name in (f"a {text}", f"b {text}"):
        root = folder / name[0]
        root.mkdir(exist_ok=True)
        record = {
            "protocol": "knn",
            "figures": {"top1_k20": 50.0, f"top1 {text}": 3.0},
            "settings": {text: text, "list": [text]},
            "network": {"name": text, "parameters": 1},
            "environment": {"device": text},
            "command": text,
            "data_path": text,
            "seconds": 1.0,
            "pictures": {text: text, "../outside.png": text},
        }
        (root / "knn.json").write_text(json.dumps(record))
        (root / "knn.other.json").write_text(json.dumps(record | {"protocol": text}))
        (root / "damaged.json").write_text("{" + text, "utf-8", "replace")
        networks.append(read_results(name, root))
    return write_comparison(networks, folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize("make", [page_of_a_run, page_of_runs, page_of_an_evaluation])
def test_pages_have_the_elements_of_their_templates(make: Callable[[Path, str], str], tmp_path: Path) -> None:
    template = Tree(make(tmp_path, PLAIN))
    check(make(tmp_path, PLAIN), template)
    with promise(30, f"hostile text in a {make.__name__.replace('_', ' ')}") as cases:
        for text in STRINGS if NIGHTLY else STRINGS[::2]:
            with cases.case(repr(text)):
                check(make(tmp_path, text), template)


def test_curves_for_tensorboard_hold_no_text(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from fastdino.engine.trackers import Curves

    config: dict[str, Any] = {f"flag {i}": text for i, text in enumerate(STRINGS)}
    curves = Curves(["tensorboard"], tmp_path, config, 0)
    curves.add({"loss": 1.0}, 1)
    curves.close()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    with promise(30, "hostile text in the files of TensorBoard") as cases:
        for text in STRINGS:
            if len(text) < 4:  # numbers in the file may hold such bytes by chance
                continue
            with cases.case(repr(text)):
                assert b"loss" in written and text.encode("utf-8", "surrogatepass") not in written
