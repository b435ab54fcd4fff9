"""Every method through the bench at toy size."""

from __future__ import annotations

import sys

from bench import methods


def test_all_rows_at_toy_size(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["methods", "--toy", "--local", "2", "--seconds", "0.1"])
    methods.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.split()[0] in methods.ROWS}
    assert list(rows) == list(methods.ROWS)
    assert rows["dino"][-4:-1] == ["1.00", "1.00", "1.00"]
    # matched regions: every patch goes through a head
    assert float(rows["esvit"][-3]) > 1.1 > float(rows["mse"][-3])
