"""Notices when a process of the run hangs, stops or fails, and ends the others, so that a launcher can start
them again.

Two threads per process. One tells the others through the key-value store that this process lives and where it
is; the other judges. Both sleep nearly always, and the training thread does no more than note where it is.

* No progress: the training thread has been in the same phase of a step for ``timeout`` seconds (ten times
  that in the first steps, which compile and may decode the whole data set). Those who wait for another
  process wait in a collective and have come further: the ones to blame are those that are behind.
* Silence: a process has said nothing for ``timeout`` seconds, in whatever phase: it is stopped, or its
  machine is gone.
* Failure: a process ends with an error; the others need not wait for what will not come.
* The launcher is gone: the process stops as after a SIGTERM.

A process that was itself stopped for a while (Ctrl-Z, a suspended job) does not take that time for a hang."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist

from fastdino.engine import exits, parallel
from fastdino.engine.disk import Disk
from fastdino.engine.launch import parent_and_birth

_UNTIMED = ("start", "evaluation", "report", "end")
"""Phases that take as long as they take."""
_WARM_UP, _WARM_UP_FACTOR = 2, 10
_GRACE = 3.0  # seconds in which a process may end by itself after another one's failure
_CHUNK = 64 << 20  # bytes of a checkpoint that are flushed together
_END = "end"  # key of the first reason to stop


@dataclass
class _Peer:
    """What is known of a process: its last word, and when it was heard, by this process's clock."""

    word: str
    heard: float

    @property
    def process(self) -> tuple[str, str, str, str]:
        """Host, pid, time of birth, descriptor of its board."""
        host, pid, born, board = self.word.split("|")[1:5]
        return host, pid, born, board

    @property
    def is_sister(self) -> bool:
        """Whether it runs here, started by the same launcher."""
        host, pid, born, _ = self.process
        return host == socket.gethostname() and parent_and_birth(pid) == (str(os.getppid()), born)

    @property
    def place(self) -> tuple[int, int, str]:
        """Beats, step and phase: now, of a sister, else as it said last."""
        _, pid, _, board = self.process
        with suppress(OSError):
            if board and self.is_sister:
                return _Board.read(f"/proc/{pid}/fd/{board}")
        beats, step, phase = self.word.split("|")[5:]
        return int(beats), int(step), phase

    def told(self) -> str:
        """The place, for people."""
        _, step, phase = self.place
        return f"in {phase} of step {step} (pid {self.process[1]} on {self.process[0]})"

    def kill(self) -> None:
        """SIGKILL to a sister: a stopped process obeys nothing else."""
        if self.is_sister:
            os.kill(int(self.process[1]), signal.SIGKILL)


class _Board:
    """Memory in which a process notes where it is, and its sisters read even when it is stopped."""

    layout = struct.Struct("qq32s")

    def __init__(self) -> None:
        self.memory: Any = bytearray(self.layout.size)
        self.descriptor = ""
        if hasattr(os, "memfd_create"):
            self.file = os.fdopen(os.memfd_create("fastdino-watchdog"), "r+b", buffering=0)
            os.ftruncate(self.file.fileno(), self.layout.size)
            self.memory = mmap.mmap(self.file.fileno(), self.layout.size)
            self.descriptor = str(self.file.fileno())

    def note(self, beats: int, step: int, phase: str) -> None:
        self.layout.pack_into(self.memory, 0, beats, step, phase.encode())

    @classmethod
    def read(cls, path: str) -> tuple[int, int, str]:
        beats, step, phase = cls.layout.unpack(Path(path).read_bytes())
        return beats, step, phase.rstrip(b"\0").decode()


class Watchdog:
    """Watches from ``start`` to ``close``; ``beat`` and ``begin`` are what the training thread calls.

    ``timeout`` is in seconds; 0 finds no hangs, only failures of others.
    """

    _opened = 0

    def __init__(self, timeout: float, rank: int = 0, size: int = 1):
        self.timeout, self.rank, self.size = timeout, rank, size
        self.interval = min(max(timeout / 20, 0.1), 5.0) if timeout else 5.0
        self.phase, self.step, self.begun, self.beats, self.since = "start", 0, 0, 0, time.monotonic()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._deadline: float | None = None  # by when the training thread should have ended after an error
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._ticks, self._board = 0, _Board()
        _, born = parent_and_birth(str(os.getpid()))
        self._process = socket.gethostname(), str(os.getpid()), born, self._board.descriptor
        self._board.note(self.beats, self.step, self.phase)
        self._peers: list[_Peer] = []
        Watchdog._opened += 1
        self._store = parallel.another_store(f"watchdog {Watchdog._opened}")
        self._is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # by rank 0
        self._hosts = self._is_hosted and rank == 0 and size > 1

    def start(self) -> Watchdog:
        """Every process must come here."""
        targets = [self._judge]
        if self._store is not None:
            self._store.set(str(self.rank), self._word())
            parallel.barrier()  # all have said something
            now = time.monotonic()
            words = self._store.multi_get([str(rank) for rank in range(self.size)])
            self._peers = [_Peer(word.decode(), now) for word in words]
            targets.append(self._exchange)
        for target in targets:
            threading.Thread(target=target, name=f"fastdino-watch{target.__name__}", daemon=True).start()
        return self

    def begin(self, step: int) -> None:
        """The training thread begins a step."""
        self.step, self.begun = step, self.begun + 1

    def beat(self, phase: str) -> None:
        """The training thread enters a phase."""
        self.phase, self.since = phase, time.monotonic()
        self.beats += 1
        self._board.note(self.beats, self.step, phase)

    def alive(self) -> None:
        """What the training thread may be waiting for goes on."""
        if self.phase == "save":
            self.since = time.monotonic()

    def close(self) -> None:
        self._closed.set()

    # -- failures --------------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> str | None:
        """Tell the others of the ``error`` that ends this process, which gets some seconds to do so.

        Returns the failure of another process if that was first, and ``error`` only its consequence.
        """
        self._error = error
        self._deadline = time.monotonic() + 3 * _GRACE
        first = self._first() if isinstance(error, RuntimeError) else None  # as errors of collectives are
        if first is None:
            self._post(f"rank {self.rank} failed: {type(error).__name__}: {error}")
        else:
            self._say(f"stops because {first}")
        return first

    def _first(self) -> str | None:
        """The reason another process gave; waits a little for it."""
        for _ in range(20):
            with suppress(RuntimeError):
                if self._store is not None and self._store.check([_END]):
                    return self._store.get(_END).decode()
            if self._store is None:
                break
            time.sleep(0.1)
        return None

    def _post(self, reason: str) -> None:
        """Leave a reason for the others, unless there is one; gives up after a while."""

        def post() -> None:
            with suppress(RuntimeError):
                if self._store is not None:
                    self._store.compare_set(_END, "", reason)

        thread = threading.Thread(target=post, daemon=True)
        thread.start()
        thread.join(2.0)

    # -- the two threads -------------------------------------------------------------------------------------

    def _word(self) -> str:
        self._ticks += 1
        return "|".join(map(str, (self._ticks, *self._process, self.beats, self.step, self.phase)))

    def _exchange(self) -> None:
        store = self._store
        assert store is not None
        names = [str(rank) for rank in range(self.size)]
        while not self._closed.wait(self.interval):
            try:
                store.set(str(self.rank), self._word())
                for peer, word in zip(self._peers, store.multi_get(names), strict=True):
                    if word.decode() != peer.word:
                        peer.word, peer.heard = word.decode(), time.monotonic()
                if store.check([_END]):
                    self._follow(store.get(_END).decode())
            except dist.DistStoreError:
                continue  # no answer in time
            except RuntimeError:
                return  # the store is gone, as at the end of a run

    def _follow(self, reason: str) -> None:
        """Another process has ended: so does this one, by itself or not."""
        if self._deadline is None and self._closed.wait(_GRACE):
            return
        if self._deadline is None:
            self._exit(f"stops because {reason}")

    def _judge(self) -> None:
        told = False
        while True:
            asleep = time.monotonic()
            if self._closed.wait(self.interval):
                return
            now = time.monotonic()
            if now - asleep > 2 * self.interval + self.timeout / 4:  # this process was stopped meanwhile
                self.since = now
                for peer in self._peers:
                    peer.heard = now
            if self._deadline is not None and now > self._deadline:
                traceback.print_exception(self._error)
                os._exit(1)
            if self._parent is not None and not told and os.getppid() != self._parent:
                self._say("the launcher is gone")
                os.kill(os.getpid(), signal.SIGTERM)
                told = True
            if self.timeout:
                self._look_for_silence(now)
                self._look_for_standstill(now)

    def _look_for_silence(self, now: float) -> None:
        silent = [r for r, peer in enumerate(self._peers) if now - peer.heard > self.timeout]
        if self.rank in silent:  # what this process says does not come back either: the store is silent
            silent = [0] if self._is_hosted and self.rank else []
        if silent:
            who = ", ".join(f"rank {r} {self._peers[r].told()}" for r in silent)
            self._hang(f"silent for {self.timeout:g} s: {who}", [self._peers[r] for r in silent])

    def _look_for_standstill(self, now: float) -> None:
        limit = self.timeout * (1 if self.begun > _WARM_UP else _WARM_UP_FACTOR)
        if self.phase in _UNTIMED or now - self.since <= limit:
            return
        ranks = dict(enumerate(self._peers)) | {self.rank: _Peer(self._word(), now)}
        first = min(peer.place[0] for peer in ranks.values())
        behind = [rank for rank, peer in ranks.items() if peer.place[0] == first]
        who = ", ".join(f"rank {rank} {ranks[rank].told()}" for rank in behind)
        mute = [ranks[rank] for rank in behind if now - ranks[rank].heard > self.timeout / 2]
        self._hang(f"no progress for {limit:g} s: {who}", mute)  # what is stopped does not end by itself

    def _hang(self, what: str, dead: list[_Peer]) -> None:
        faulthandler.dump_traceback(all_threads=True)
        self._post(f"of a hang: {what}")
        for peer in dead:
            with suppress(OSError):
                peer.kill()
        self._exit(f"HANG: {what} (--hang_timeout). All processes stop; the same command continues")

    def _exit(self, message: str) -> None:
        self._say(message)
        sys.stdout.flush()
        if self._hosts:  # the others read the reason from a store that ends with this process
            time.sleep(min(2 * self.interval, 0.8 * _GRACE))
        os._exit(exits.HUNG)

    def _say(self, message: str) -> None:
        print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)


class PatientDisk(Disk):
    """Tells the watchdog of progress: a large checkpoint on a slow disk is no hang."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog = watchdog

    def read(self, path: Path) -> bytes:
        data = super().read(path)
        self.watchdog.alive()
        return data

    def fill(self, file: BinaryIO, data: bytes | memoryview) -> None:
        whole = memoryview(data)
        for first in range(0, len(data), _CHUNK):
            if first:
                self.sync(file)
            super().fill(file, whole[first : first + _CHUNK])
            self.watchdog.alive()
