"""Names that files, classes and labels may have, of which every one is harmless and none looks it."""

from __future__ import annotations

import os

FORGED = "FORGED"
"""Stands at the beginning of lines that a name tries to write, and in what it tries to make of a page."""

NAMES = [
    "plain",
    " leading and trailing ",
    "two  spaces",
    "tab\there",
    "new\nline",
    f"x\n{FORGED}: step 7 loss nan",
    f"x\r{FORGED}: all images read",
    f"x\r\n{FORGED}",
    f"x\v{FORGED}\f{FORGED}\x1c{FORGED}\x85{FORGED}\u2028{FORGED}\u2029{FORGED}",
    f"\x1b[2J\x1b[1;31m{FORGED}\x1b[0m",
    f"\x1b]0;{FORGED}\x07",
    f"\x9b2J{FORGED}",
    "back\x08\x08\x08space",
    "bell\x07 delete\x7f",
    "-rf",
    "--output_dir=elsewhere",
    "~",
    "$HOME `id` $(id)",
    "${oc.env:HOME}",
    "%s %(name)s %n",
    "{name} {0} {{",
    "{{ 7 * 7 }}{% include 'passwd' %}",
    "[bold]rich [link=file:]x",
    "$\\frac{1}{$ _ ^ \\",
    "back\\slash \\n \\x00 \\\\",
    "'single' \"double\"",
    "a & b; c | d > e < f",
    "*?[a-z]{0..9}",
    "#hash",
    "comma, semicolon; colon:",
    "=cmd|' !A0",
    f"<script>alert('{FORGED}')<",
    f"<script>{FORGED}<",
    f"script><b>{FORGED}",
    f'"><img src=x onerror={FORGED}>',
    f"' onmouseover='{FORGED}",
    f"javascript:{FORGED}",
    f"<svg onload={FORGED}>",
    f"]]><!--{FORGED}--><",
    f"<!--{FORGED}",
    f"&lt;b&gt;{FORGED}&#60;",
    "<style>*{display:none}<",
    f"![{FORGED}](x) [a](b)",
    "\u202egpj.exe",
    "zero\u200bwidth\ufeff",
    "caf\u00e9",
    "cafe\u0301",
    "\u65e5\u672c\u8a9e \U0001f996",
    os.fsdecode(b"invalid \xff\xfe\x80"),
    os.fsdecode(b"cut \xe2\x82"),
    "x" * 251,
    "\u00e9" * 125,
    " ..",
]
"""Without an ending; each is at most 251 bytes and one file's name."""


def original(shown: str) -> str:
    """The path that `printable` showed."""
    path, at = "", 0
    plain = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t"}
    while at < len(shown):
        if shown[at] != "\\":
            path, at = path + shown[at], at + 1
        elif shown[at + 1] in plain:
            path, at = path + plain[shown[at + 1]], at + 2
        else:
            digits = {"x": 2, "u": 4, "U": 8}[shown[at + 1]]
            code = int(shown[at + 2 : at + 2 + digits], 16)
            # A byte of its own, if it is none of ASCII's control characters.
            code += 0xDC00 if digits == 2 and code >= 0x80 else 0
            path, at = path + chr(code), at + 2 + digits
    return path
