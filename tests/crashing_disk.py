"""A disk that a test can make die in the middle of a save."""

from fastdino.engine.checkpoint import Disk


class CrashingDisk(Disk):
    """Dies before or after its n-th operation; a write that dies leaves half its bytes."""

    def __init__(self, fail_at=0, after=False):
        self.count, self.fail_at, self.after = 0, fail_at, after

    def _run(self, operation, *arguments, half=None):
        self.count += 1
        if self.count == self.fail_at and not self.after:
            if half:
                half()
            self.die()
        operation(*arguments)
        if self.count == self.fail_at:
            self.die()

    def die(self):
        raise KeyboardInterrupt

    def make_directory(self, path):
        self._run(super().make_directory, path)

    def write(self, path, data):
        self._run(super().write, path, data, half=lambda: path.write_bytes(data[: len(data) // 2]))

    def sync_directory(self, path):
        self._run(super().sync_directory, path)

    def rename(self, source, target):
        self._run(super().rename, source, target)
