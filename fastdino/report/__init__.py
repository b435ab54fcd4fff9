"""What a run looked like: one self-contained HTML page, written while it trains and when it ends."""

from __future__ import annotations

from fastdino.report.page import write_report

__all__ = ["write_report"]
