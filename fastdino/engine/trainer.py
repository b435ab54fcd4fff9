"""The run: data, model and optimizer are built once, then steps, checkpoints, evaluations and the report
follow.

Order of construction is the order in which a user's mistakes show: flags, output directory, data, only then
the model."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from fastdino.config import Config, config_to_dict, config_to_yaml, split_batch
from fastdino.data import containers, runlist, sampler
from fastdino.data.decoding import import_dali
from fastdino.data.loader import AUGMENTATION_VERSION, MultiCropLoader, finishes_on_gpu, wants_cache
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.data.prescan import BAD_NAME, prescan
from fastdino.data.preview import contact_sheet
from fastdino.data.remote import is_url
from fastdino.engine import checkpoint, exits, identity, launch, lock, output, parallel, rows
from fastdino.engine.build import build
from fastdino.engine.logs import (
    Screen,
    append_line,
    environment,
    keep_lines,
    peak_memory,
    write_text,
)
from fastdino.engine.metrics import StepResult, Stragglers
from fastdino.engine.monitor import Monitor
from fastdino.engine.repeat import UnequalError
from fastdino.engine.schedules import Hyper, Schedule
from fastdino.engine.trackers import Curves
from fastdino.engine.watchdog import PatientDisk, Watchdog
from fastdino.evaluation.features import available_cores
from fastdino.report import write_report
from fastdino.report.neighbours import MOST, spread
from fastdino.switches import prototypes
from fastdino.validation import method_warnings

_PHASES = ("data", "forward", "backward", "update")


class Stopped(SystemExit):
    """The run ended early on purpose; ``code`` is the process's exit code."""


class _Interrupted(Exception):
    """A signal came during an evaluation."""


class Trainer:
    """One training run in ``config.run.output_dir``. ``Trainer(config).fit()`` is all there is to it."""

    def __init__(self, config: Config):
        self.config = config
        output.check(config)
        self.world = parallel.start(config.run.device)
        self.global_batch, self.micro_batch, self.accumulate = split_batch(config, self.world.size)
        self.output = Path(config.run.output_dir)
        if self.world.main:
            lock.take(self.output)
        try:
            self._construct(config)
        except BaseException:
            lock.release(self.output)  # nothing was begun, and this process may live on
            raise

    # -- construction ----------------------------------------------------------------------------------------

    def _construct(self, config: Config) -> None:
        import_dali()  # without which nothing below makes sense
        self.watchdog = Watchdog(config.run.hang_timeout, self.world.rank, self.world.size)
        self.stragglers = Stragglers()
        self.signal = 0
        # Workers that torchrun starts again go on where they were, whatever --resume says to the first ones.
        self.restarted = parallel.broadcast_object(self.world.main and launch.is_restart(self.output))

        self.manifest = self._open_data()
        self.steps_per_epoch = sampler.steps_per_epoch(len(self.manifest), self.global_batch)
        on_gpu = finishes_on_gpu(config.data.augment_on, self.world.device)
        self.cache_decoded = wants_cache(
            self.manifest,
            config.data.cache_decoded,
            self._data_threads(),
            self.world.device if on_gpu else None,
        )
        self.schedule = Schedule(config, self.steps_per_epoch, self.global_batch)
        self.total_steps = min(config.optim.max_steps or self.schedule.total_steps, self.schedule.total_steps)
        self.monitor = Monitor(
            config.eval,
            config.crops.global_crops_size,
            self.manifest,
            self.world.device,
            self._clean_held_out,
        )

        self.engine = build(config, self.world, accumulate=self.accumulate)
        self.method, self.dtype = self.engine.method, self.engine.dtype
        self.saver = checkpoint.Saver(self.checkpoints, disk=PatientDisk(self.watchdog))
        self.step = 0  # steps that were begun
        self.read = 0  # steps whose results are known; on a GPU a little behind
        self.counters = {"bad_steps": 0, "bad_in_a_row": 0}
        # Over the good steps of this epoch: loss, signs of collapse; and their number.
        self.sums: dict[str, float] = {}
        self.resumed_from: Path | None = None
        self._resume()

    def _open_data(self) -> Manifest:
        """The manifest without bad files; rank 0 scans, the others read its result."""
        data_path = self.config.data.data_path
        indexed = containers.find(data_path) is not None  # by rank 0, then the others read its index
        if indexed and not self.world.main:
            parallel.after_main()
        manifest = build_manifest(data_path, progress=self.world.main, without=self.output)
        if indexed and self.world.main:
            parallel.after_main()
        return self._run_list(self._clean(manifest, self.output))

    def _run_list(self, found: Manifest) -> Manifest:
        """The images the run in the output directory began with; ``found`` are those a new run begins
        with.
        """
        file = self.output / "images.json"
        resuming = self.restarted or self.config.run.resume != "none"
        begun = resuming and checkpoint.checkpoints(self.checkpoints) and file.exists()
        parallel.barrier()  # every process has looked before one writes
        if begun:
            return runlist.reconcile(found, file)
        if self.world.main:
            write_text(file, runlist.write(found))
        return found

    def _clean(self, manifest: Manifest, cache_dir: Path) -> Manifest:
        """``manifest`` without what --prescan finds unreadable."""
        choice = self.config.data.prescan
        costly = len(manifest) > 200_000 or is_url(manifest.root)
        if choice == "off" or (choice == "auto" and costly):
            return manifest
        if not self.world.main:
            parallel.after_main()
        manifest = prescan(manifest, cache_dir, num_threads=self._data_threads(), progress=self.world.main)
        if self.world.main:
            parallel.after_main()
        return manifest

    def _clean_held_out(self, manifest: Manifest) -> Manifest:
        return self._clean(manifest, self.output / "held_out" / Path(manifest.root).name)

    def _data_threads(self) -> int:
        return max(1, min(self.config.data.num_workers, available_cores()))

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its continuation; made once, for it covers every image."""
        found = identity.identity(self.config, self.manifest, self.global_batch, self.dtype) | {
            "augmentation version": AUGMENTATION_VERSION,
            "DALI version": import_dali().__version__,
        }
        if identity.mixes_images(self.method, self.config):
            found["images in a pass"] = self.micro_batch * self.world.size
        return found

    def _resume(self) -> None:
        wanted, found = self.config.run.resume, None
        if self.restarted or wanted == "auto":
            found = parallel.broadcast_object(
                checkpoint.latest(self.checkpoints, quarantine=True) if self.world.main else None
            )
        if found is None and wanted not in ("auto", "none"):
            found = Path(wanted)
            official = found / "checkpoint.pth" if found.is_dir() else found
            if official.is_file():
                raise checkpoint.CheckpointError(
                    f"--resume {wanted}: {official.name} is a file of the official code or of a backbone; "
                    f"python -m fastdino.interop official import {official} {self.output} makes a run of it"
                )
            if checkpoint.step_of(found) < 0:
                found = checkpoint.latest(
                    found / "checkpoints" if (found / "checkpoints").is_dir() else found
                )
            if found is None:
                raise checkpoint.CheckpointError(f"--resume {wanted}: no valid checkpoint there")
        if found is not None:
            self.restore(found)  # type: ignore[arg-type]

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint. Raises CheckpointError naming every difference if it belongs to another
        run.
        """
        model, optimizer, meta = checkpoint.load(path)
        # An official file does not know its images and counts epochs only; a backbone knows neither.
        imported = "official" in meta or "began_with" in meta
        different = identity.differences(self._identity, meta, self.config.run.allow_changes)
        if different:
            raise checkpoint.CheckpointError(
                f"{path} belongs to another run; use another --output_dir, or --resume none --overwrite, or "
                "--allow_changes with the names of flags.\n  " + "\n  ".join(different)
            )
        self.engine.load_state(model)
        self.engine.updater.load_state(optimizer)
        epochs = meta["epoch"] if imported else meta["step"] / meta["steps_per_epoch"]
        self.step = self.read = round(epochs * self.steps_per_epoch)
        self.counters, self.sums = meta["counters"], meta["epoch_sums"]
        self.engine.step.scaler.load_state(meta["scaler"])
        self.resumed_from = path

    # -- the loop --------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to the end and return the run directory. Raises Stopped (exit code 143, 130 or 1) when it
        ends early.
        """
        try:
            return self._fit()
        finally:  # this process may live on
            self.saver.end()
            lock.release(self.output)

    def _fit(self) -> Path:
        run = self.config.run
        loader = MultiCropLoader(
            self.manifest,
            self.config.crops,
            seed=run.seed,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            start_step=self.step,
            device=self.world.device,
            dtype=torch.float32 if self.world.device.type == "cpu" else self.dtype,
            num_threads=self._data_threads(),
            cache_decoded=self.cache_decoded,
            augment_on=self.config.data.augment_on,
            bad_files=self.output / BAD_NAME,
        )
        log = self.output / "train.log"
        screen = Screen(self.total_steps, self.step, enabled=self.world.main, log=log)
        lost = lock.explaining(self.output)
        with _signals(self._on_signal), lost, closing(self.watchdog.start()), loader:
            self._prepare_output(screen)
            curves = Curves(
                run.logger if self.world.main else (), self.output, config_to_dict(self.config), self.step
            )
            try:
                if self.step == 0:
                    self._evaluate(screen, curves, baseline=True)
                elif self._evaluates_at(self.step):  # unless that was still done before the run stopped
                    self._evaluate(screen, curves)
                    self._report(screen, final=self.step == self.total_steps)
                self._loop(iter(loader), screen, curves)
                self.watchdog.beat("save")
                self.saver.wait()
            except Stopped:
                self.saver.wait()
                parallel.stop()
                raise
            except Exception as error:
                if self.watchdog.failed(error):  # another process, and this error is what came of it
                    raise Stopped(exits.HUNG) from None
                raise
            finally:
                curves.close()
                screen.close()
        parallel.stop()
        return self.output

    def _loop(self, batches: Iterator[Any], screen: Screen, curves: Curves) -> None:
        run, window = self.config.run, _Window(self.global_batch)
        self.engine.step.beat = self.watchdog.beat
        while self.step < self.total_steps:
            hyper, epoch = self.schedule(self.step), self.step // self.steps_per_epoch
            # stochastic depth draws from a function of (seed, step, rank): nothing to save
            torch.manual_seed(((run.seed * 1_000_003 + self.step) * 65_537 + self.world.rank) % 2**63)
            self.watchdog.begin(self.step)
            self.engine.step.twice = run.verify_every > 0 and (self.step + 1) % run.verify_every == 0
            try:
                self.engine.step.enqueue(batches, hyper, lambda: self.signal != 0)
            except UnequalError as error:
                raise UnequalError(f"step {self.step + 1}, rank {self.world.rank}: {error}") from None
            self.step += 1
            self.watchdog.beat("results")
            self.saver.check()
            epoch_ends = self.step % self.steps_per_epoch == 0
            finished = self.step == self.total_steps
            saves = epoch_ends or finished or (run.save_every > 0 and self.step % run.save_every == 0)
            self._read(window, screen, curves, every=saves)
            if epoch_ends:
                self._end_epoch(epoch, hyper, screen)
            if saves:
                self._save(
                    keep=finished
                    or (epoch_ends and run.saveckp_freq > 0 and (epoch + 1) % run.saveckp_freq == 0)
                )
            if self._evaluates_at(self.step):
                paused = time.perf_counter()
                self._evaluate(screen, curves)
                self._report(screen, final=finished)
                window.since += time.perf_counter() - paused
                if parallel.any_of(self.signal != 0, self.world.device):
                    self._stop(screen)

    def _read(self, window: _Window, screen: Screen, curves: Curves, *, every: bool) -> None:
        """Count and log the steps whose results are due, or ``every`` one. All processes read the same
        results after the same step, so they stop together.
        """
        for result in self.engine.step.ring.take(every=every):
            if result.stop:
                self._forget_unread()
                self._stop(screen)
            self.read += 1
            screen.tick(self.read)
            window.add(result)
            self.stragglers.add(result.worked)
            if self._is_last_straw(result, screen):
                self._forget_unread()
                self._save(keep=True)
                raise Stopped(exits.NOT_FINITE)
            if self.read % 10 == 0:
                for rank, seconds, usual in self.stragglers.take():
                    screen.say(
                        f"WARNING: rank {rank} is slow: it works {seconds:.3f} s per step, the others "
                        f"{usual:.3f} s, and they wait for it"
                    )
            due = self.read % self.config.run.log_every == 0 or self.read == self.total_steps
            if due and self.world.main:
                self._log(window, screen, curves)

    def _forget_unread(self) -> None:
        """The steps begun after the one read last do not count: a stop undid them, or the run ends anyway."""
        for result in self.engine.step.ring.take(every=True):
            self.read += not result.stop
        self.step = self.read

    def _log(self, window: _Window, screen: Screen, curves: Curves) -> None:
        hyper, epoch = self.schedule(self.read - 1), (self.read - 1) // self.steps_per_epoch
        record = {
            "step": self.read,
            "epoch": epoch,
            **{
                k: v
                for k, v in dataclasses.asdict(hyper).items()
                if k not in ("freeze_last_layer", "use_queue")
            },
            **window.take(),
            "bad_steps": self.counters["bad_steps"],
            "memory": peak_memory(self.world.device),
            "time": time.time(),
        }
        record["wd"] = record.pop("weight_decay")
        lock.check(self.output)
        append_line(self.output / "metrics.jsonl", record)
        curves.add({k: v for k, v in record.items() if k not in ("step", "time")}, self.read)
        screen.show(self.read, epoch, _line(record), self.global_batch / record["img_s"])

    def _evaluates_at(self, step: int) -> bool:
        epochs, rest = divmod(step, self.steps_per_epoch)
        every = self.config.eval.eval_every
        return step == self.total_steps or (rest == 0 and every > 0 and epochs % every == 0)

    def _stop(self, screen: Screen) -> NoReturn:
        """Save what a signal to any process asks to be saved, and end with its exit code."""
        if (no_data := self.engine.step.no_data) is not None:
            if self.step:
                self._save(keep=False)
                self.saver.wait()
            screen.say(f"stopped for want of images after step {self.step}")
            raise no_data
        self._save(keep=False)
        name = signal.Signals(self.signal).name if self.signal else "a signal to another process"
        screen.say(f"stopped by {name} after step {self.step}; the same command continues from there")
        raise Stopped(128 + (self.signal or signal.SIGTERM))

    def _is_last_straw(self, result: StepResult, screen: Screen) -> bool:
        """Sum up a good step, count a bad one; whether that was one too many in a row."""
        if not result.skipped:
            self.counters["bad_in_a_row"] = 0
            for key, value in {"loss": result.loss, **result.signs}.items():
                self.sums[key] = self.sums.get(key, 0.0) + value
            self.sums["steps"] = self.sums.get("steps", 0.0) + 1.0
            return False
        if self.engine.step.scaler.enabled and math.isfinite(result.loss) and result.scale > 1.0:
            return False  # fp16 gradients overflowed: the loss scale was halved, the run is healthy
        self.counters["bad_steps"] += 1
        self.counters["bad_in_a_row"] += 1
        screen.say(
            f"step {self.read}: loss {result.loss} or a gradient is not finite, or the optimizer's state; "
            "the step was skipped, nothing changed"
        )
        if self.counters["bad_in_a_row"] < self.config.optim.max_bad_steps:
            return False
        self.counters["bad_in_a_row"] = 0
        screen.say(
            f"--max_bad_steps: {self.config.optim.max_bad_steps} bad steps in a row, the run stops. "
            "The checkpoint holds the last good state. Likely causes: --lr too high, --precision fp16 "
            "(try bf16 or fp32), --clip_grad 0, broken images."
        )
        return True

    def _end_epoch(self, epoch: int, hyper: Hyper, screen: Screen) -> None:
        """Write the official log line and warn of collapse."""
        steps = self.sums.get("steps", 0.0)
        if steps and self.world.main:
            mean = {k: self.sums[k] / steps for k in ("loss", *self.method.signs)}
            append_line(
                self.output / "log.txt",
                {"train_loss": mean.pop("loss"), "train_lr": hyper.lr, "train_wd": hyper.weight_decay}
                | {f"train_{k}": v for k, v in mean.items()}
                | {"epoch": epoch},
            )
            self._warn_of_collapse(mean, screen)
        self.sums = {}

    def _warn_of_collapse(self, signs: dict[str, float], screen: Screen) -> None:
        highest = math.log(max(1, prototypes(self.config)))
        temperature = "--epsilon" if self.config.method.method == "swav" else "--teacher_temp"
        # A single prototype on purpose: no temperature to blame.
        entropy = signs.get("teacher_entropy") if self.config.loss.teacher_temp else None
        if entropy is not None and entropy < 0.01 * highest:
            screen.say(
                f"WARNING: COLLAPSE to one prototype: teacher entropy {entropy:.3f} is "
                "within 1 % of 0. Likely causes: "
                f"{temperature} too low, or --center_momentum too close to 1 (the center lags behind)."
            )
        elif entropy is not None and entropy > 0.99 * highest:
            screen.say(
                f"WARNING: COLLAPSE to the uniform distribution: teacher entropy "
                f"{entropy:.3f} is within 1 % of ln K = {highest:.3f}. Likely causes: "
                f"{temperature} too high, or --lr too low to have moved yet."
            )
        if signs.get("spread", 1.0) < 0.05:
            screen.say(
                f"WARNING: COLLAPSE: the embeddings of all images are nearly the same (spread "
                f"{signs['spread']:.3f} of at most 1). Likely causes: --lr too high, no predictor, no center."
            )

    # -- output ----------------------------------------------------------------------------------------------

    def _prepare_output(self, screen: Screen) -> None:
        if not self.world.main:
            return
        for name in ("metrics.jsonl", "eval.jsonl"):
            keep_lines(self.output / name, lambda r: 0 < self.step >= r["step"])
        keep_lines(self.output / "log.txt", lambda r: r["epoch"] < self.step // self.steps_per_epoch)
        if "data_path" in self.config.run.allow_changes:
            write_text(self.output / "images.json", runlist.write(self.manifest))
        write_text(self.output / "config.yaml", config_to_yaml(self.config))
        facts = environment(self.world.size, self.world.device) | {
            "precision": str(self.dtype).removeprefix("torch."),
            "attention": self.engine.attention,
        }
        facts |= {
            "images": len(self.manifest),
            "global_batch": self.global_batch,
            "steps_per_epoch": self.steps_per_epoch,
        }
        write_text(self.output / "environment.json", json.dumps(facts, indent=1, sort_keys=True) + "\n")
        sheet = self.output / "crops.png"
        if not (self.step and sheet.exists()):
            contact_sheet(self.manifest, self.config.crops, self.config.run.seed, 6, sheet)
        parameters = sum(p.numel() for p in self.method.student.parameters())
        classes = self.manifest.class_names
        folders = f" in {len(classes)} classes" if classes else ""
        screen.say(
            f"{len(self.manifest)} images{folders}, {parameters / 1e6:.1f} M parameters, global batch "
            f"{self.global_batch} = {self.world.size} process(es) x {self.accumulate} x {self.micro_batch}, "
            f"{self.total_steps} steps in {facts['precision']} on {facts['device']}"
        )
        for warning in method_warnings(self.config):
            screen.say(f"WARNING: {warning}")
        if self.step == self.total_steps:
            screen.say(
                f"complete: {self.step} of {self.total_steps} steps in {self.resumed_from}; to train longer, "
                "give more --epochs and --allow_changes epochs"
            )
        elif self.step:
            screen.say(f"continuing after step {self.step} from {self.resumed_from}")
        old = self.resumed_from  # in another folder it leaves nothing to keep in this one
        after = self.step if old is not None and old.parent.resolve() == self.checkpoints.resolve() else -1
        if moved := checkpoint.set_aside(self.checkpoints, after):
            screen.say(
                f"{len(moved)} checkpoints of {'later' if after >= 0 else 'other'} steps are set aside in "
                f"{self.checkpoints}, the newest as "
                f"{moved[0].name}"
            )
        launch.sign(self.output)

    def _save(self, *, keep: bool) -> None:
        """Begin a checkpoint; it is written while training goes on."""
        self.watchdog.beat("save")
        lock.check(self.output)
        rank, writers = rows.writer(self.method)
        attempt = str(parallel.broadcast_object(uuid.uuid4().hex[:8]))
        if rank is None:
            return
        meta = {
            "epoch": self.step // self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "config": config_to_dict(self.config),
            "identity": self._identity,
            "world_size": self.world.size,
            "scaler": self.engine.step.scaler.state(),
            "counters": self.counters,
            "epoch_sums": self.sums,
            "keep": keep,
        }
        state, optimizer = self.engine.state(), self.engine.updater.state()
        self.saver.start(self.step, state, optimizer, meta, rank=rank, world_size=writers, attempt=attempt)

    def _evaluate(self, screen: Screen, curves: Curves, *, baseline: bool = False) -> None:
        """k-NN of the teacher on rank 0, unless it is known; ``baseline`` adds raw pixels (the teacher is
        then the untrained network).
        """
        self.watchdog.beat("evaluation")
        backbone = self.engine.evaluated_backbone() if self.monitor.active else None
        if backbone is not None and self.world.main and not self._evaluated():
            started = time.perf_counter()
            try:
                scores = self.monitor.knn(backbone, self._interruptible)
                raw = self.monitor.raw_pixels() if baseline else None
            except _Interrupted:
                screen.say("evaluation interrupted")
            except (ValueError, OSError) as error:
                screen.say(f"WARNING: no k-NN figures, training goes on: {error}")
            else:
                self._log_scores(scores, raw, time.perf_counter() - started, screen, curves)
        parallel.after_main()

    def _log_scores(
        self,
        scores: dict[str, float],
        raw: dict[str, float] | None,
        seconds: float,
        screen: Screen,
        curves: Curves,
    ) -> None:
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "knn": scores,
            "seconds": seconds,
            "time": time.time(),
        }
        if raw is not None:
            record |= {"untrained": scores, "raw_pixels": raw}
        append_line(self.output / "eval.jsonl", record)
        curves.add({f"knn_top1_{k}": v for k, v in scores.items()}, self.step)
        text = "  ".join(f"k={k} {v:.1f} %" for k, v in scores.items())
        screen.say(
            f"k-NN top-1 of the {self.method.evaluated if raw is None else 'untrained network'}: {text}"
        )

    def _evaluated(self) -> bool:
        path = self.output / "eval.jsonl"
        records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return any(record["step"] == self.step and "knn" in record for record in records)

    def _interruptible(self, done: int, total: int) -> None:
        """Told of each batch of an evaluation, which may take minutes; its checkpoint is saved already."""
        if self.signal:
            raise _Interrupted

    def _report(self, screen: Screen, *, final: bool) -> None:
        self.watchdog.beat("report")
        backbone = self.engine.evaluated_backbone() if self.config.run.report else None
        if backbone is not None and self.world.main:
            try:
                bank = spread(self.manifest.paths, MOST)
                pictures = self.monitor.pictures(8)
                path = write_report(self.output, backbone=backbone, image_paths=pictures, bank_paths=bank)
                screen.say(f"report: {path}")
            except Exception:
                if final:
                    raise
                screen.say("the report could not be written; training goes on\n" + traceback.format_exc())
        parallel.after_main()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


@contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an orderly stop at the end of the step."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = [signal.signal(n, handler) for n in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, previous, strict=True):
            signal.signal(number, old)


class _Window:
    """Means since the last log line."""

    def __init__(self, images_per_step: int):
        self.images, self.since = images_per_step, time.perf_counter()
        self.results: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        self.results.append(result)

    def take(self) -> dict[str, float]:
        now, n = time.perf_counter(), len(self.results)
        good = [r for r in self.results if not r.skipped] or self.results
        out = {"loss": sum(r.loss for r in good) / len(good)}
        out |= {k: sum(r.signs[k] for r in good) / len(good) for k in good[0].signs}
        out["img_s"] = self.images * n / (now - self.since)
        out |= {f"t_{p}": sum(r.seconds.get(p, 0.0) for r in self.results) / n for p in _PHASES}
        self.results, self.since = [], now
        return out


def _line(record: dict[str, Any]) -> str:
    named = {"teacher_entropy": "entropy", "kl": "KL", "spread": "spread", "accuracy": "accuracy"}
    signs = " ".join(f"{name} {record[key]:.3f}" for key, name in named.items() if key in record)
    step = sum(record[f"t_{phase}"] for phase in _PHASES)
    wait = 100 * record["t_data"] / step if step > 0 else 0.0
    speed = f"{record['img_s']:.0f} img/s data-wait {wait:.0f} %"
    return f"loss {record['loss']:.4f} lr {record['lr']:.2e} {signs} {speed}"
