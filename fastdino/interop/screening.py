"""What a file of ``torch.save`` may hold, decided before torch reads it and looked over afterwards.

``torch.load(weights_only=True)`` runs nothing of a file, but lets it claim memory: a compressed archive grows
a thousandfold, ``bytearray(10**10)`` is allowed, and so are tensors of any shape over a single number or over
memory that nobody has written. Weights need none of it.
"""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import re
import struct
import zipfile
from typing import IO, Any

import torch

# What a pickle of weights may name, "module name"; torch.load alone would also take bytearray(10**10).
_NAMES = re.compile(
    r"argparse Namespace|numpy dtype|numpy\.(core|_core)\.multiarray scalar|_codecs encode"
    r"|collections (OrderedDict|Counter)|(builtins|__builtin__) set|torch (Size|device)"
    r"|torch\._utils _rebuild_(tensor(_v2)?|parameter)|torch\.nn\.parameter Parameter"
    r"|torch(\.cuda)? \w+Storage|torch (bool|b?float\d+|u?int\d+)"
)
MAX_PICKLE = 4 << 20
"""Bytes of the largest pickle in a file, in which the numbers of its tensors are not."""
MAX_CALLS, MAX_VALUES, MAX_DEPTH = 50_000, 1_000_000, 32
"""Of a pickle: calls, values that a walk through its contents meets, containers in each other."""


class Refused(ValueError):
    """What is wrong with a file, without its name."""


def screen(file: IO[bytes]) -> bool:
    """Look through a file of ``torch.save`` before torch does; whether it is a zip archive.

    Raises Refused for names that weights do not need and contents that would grow beyond the file's size.
    """
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        file.seek(0)
        _screen_pickles(file.read(MAX_PICKLE), count=5)  # the fourth holds the contents
        return False
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Refused("refused, expected an archive that is not compressed, as torch.save writes it")
    if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
        raise Refused("refused, the members of the archive claim more bytes than the file has")
    names = [member.filename for member in members]
    pickles = [member for member in members if member.filename.endswith(".pkl")]
    if len(set(names)) != len(names) or len(pickles) != 1 or not _same_view(file, members):
        raise Refused("refused, expected one pickle in the archive and every member once")
    file.seek(_data_offset(file, pickles[0]))
    _screen_pickles(file.read(min(pickles[0].file_size, MAX_PICKLE)), count=1)
    return True


def _same_view(file: IO[bytes], members: list[zipfile.ZipInfo]) -> bool:
    """Whether torch's own reader finds the same members at the same places."""
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)
    here = {m.filename.partition("/")[2]: m for m in members}
    return set(reader.get_all_records()) == here.keys() and all(
        reader.get_record_offset(name)  # type: ignore[attr-defined]
        == _data_offset(file, member)
        for name, member in here.items()
    )


def _data_offset(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    file.seek(member.header_offset)
    header = file.read(30)  # local header: the lengths of name and extra field are its last two numbers
    return member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _screen_pickles(data: bytes, count: int) -> None:
    """Names and number of calls of the first ``count`` pickles in ``data``, none of which is run."""
    stream, calls = io.BytesIO(data), 0
    for _ in range(count):
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "GLOBAL" and not _NAMES.fullmatch(str(argument)):
                raise Refused(f"refused, it wants to call {str(argument).replace(' ', '.', 1)[:200]}")
            calls += operation.name in ("REDUCE", "NEWOBJ")
            if calls > MAX_CALLS:
                raise Refused(f"refused, more than {MAX_CALLS:,} calls")


def weigh(value: Any) -> None:
    """Raises Refused for tensors without numbers of their own and containers that share others too often."""
    _weigh(value, 0, {})


def _weigh(value: Any, depth: int, known: dict[int, int]) -> int:
    """Number of values that a walk meets, containers met again counted again; ``known`` by identity."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Tensor):
        if (
            value.layout != torch.strided
            or value.device.type != "cpu"
            or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise Refused(f"refused, a tensor of shape {list(value.shape)} that the file has no numbers for")
        return 1
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if depth > MAX_DEPTH:
        raise Refused(f"refused, more than {MAX_DEPTH} containers in each other")
    total = 1 + sum(_weigh(part, depth + 1, known) for part in parts)
    if total > MAX_VALUES:
        raise Refused(f"refused, more than {MAX_VALUES:,} values")
    known[id(value)] = total
    return total
