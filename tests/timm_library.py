"""timm beside a torch that no torchvision fits: the library can then not be imported as it is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


class _Names(type):
    """Of a class that has a text under every name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(ModuleType):
    """A module that has a class under every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _EmptyTorchvision(MetaPathFinder, Loader):
    """timm imports torchvision for data sets and transforms; a model needs neither."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def opened() -> Iterator[Any]:
    """The library, with an empty torchvision while it is imported if the real one is absent or does not fit
    this torch.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.MonkeyPatch.context() as torchvision:
            if not _has_torchvision():
                torchvision.setattr(sys, "meta_path", [_EmptyTorchvision(), *sys.meta_path])
            library = pytest.importorskip("timm", reason="timm is not installed")
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Anything)]:
            del sys.modules[name]  # others ask whether there is a torchvision
        yield library


def _has_torchvision() -> bool:
    before = set(sys.modules)
    try:
        importlib.import_module("torchvision")
    except Exception:  # its operators are not those of this torch
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]
        return False
    return True
