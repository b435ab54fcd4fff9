"""YAML as a file of settings needs it: no aliases, tags, duplicates or depths, and few bytes.

A few lines of aliases of aliases stand for billions of values, of two entries of one name the last would win
unseen, ``010`` would be 8 and ``1e-3`` text.
"""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

MAX_BYTES, MAX_DEPTH = 1 << 16, 16
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    depth = 0
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag in (f"{_PREFIX}null", f"{_PREFIX}bool")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _error("no anchors and aliases", repr(event.anchor), event)
        if event.tag:
            raise _error("no tags", repr(event.tag), event)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error(f"at most {MAX_DEPTH} values in each other", "more", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a name", "a list or mapping", key)
            if key.value in names:
                raise _error("every name once", repr(key.value[:100]), key)
            names.add(key.value)
        return super().construct_mapping(node, deep)


# Plain decimal numbers; what else YAML takes for a number (octal, 1:30, dates) stays text.
_Loader.add_implicit_resolver(f"{_PREFIX}int", re.compile(r"[-+]?(0|[1-9]\d{0,17})\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_PREFIX}float",
    re.compile(r"([-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.inf|\.nan)\Z"),
    list("-+.0123456789"),
)


def _error(expected: str, got: str, at: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=f"expected {expected}, got {got}", problem_mark=at.start_mark)


def parse(text: str) -> Any:
    """The value of one YAML document. Raises yaml.YAMLError saying what is wrong and where."""
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"expected at most {MAX_BYTES:,} characters")
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def read(path: str | os.PathLike[str]) -> Any:
    """The same of a UTF-8 file, of which no more is read. Raises OSError and UnicodeDecodeError besides."""
    with open(path, "rb") as file:
        return parse(file.read(MAX_BYTES + 1).decode("utf-8"))
