"""The loader's path on a GPU, with streams, events and the decoder replaced by ones that keep a record.

What runs there in earnest needs a GPU; here it is the order of things, and what goes where.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdino_kernels import backend
from fastdino_kernels.multicrop import multicrop as finish
from PIL import Image

from fastdino.config import CropConfig
from fastdino.data import buffers, decoding
from fastdino.data import loader as module
from fastdino.data.buffers import Crops, DeviceBuffer
from fastdino.data.decoding import ImageSource, Replacements
from fastdino.data.loader import MultiCropLoader, Schedule, _Producer, finishes_on_gpu
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.data.prescan import decode

CROPS = CropConfig(global_crops_size=16, local_crops_size=8, local_crops_number=2)
CUDA = torch.device("cuda", 0)
N, BATCH = 12, 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(N):
        noise = rng.integers(0, 256, (*rng.integers(12, 40, 2), 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{i:02}.png")
    return build_manifest(root)


@pytest.fixture
def cuda(monkeypatch) -> list[tuple]:
    """torch.cuda as far as the loader uses it; returns the record of what was queued, waited for and read."""
    log: list[tuple] = []
    local = threading.local()

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_event(self, event):
            log.append(("wait", self, event))

        def synchronize(self):
            log.append(("synchronize", self))

    class Event:
        def record(self, stream):
            log.append(("record", stream, self))

        def synchronize(self):
            log.append(("block", self))

    default = Stream()

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            local.stream = self.stream

        def __exit__(self, *error):
            local.stream = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: getattr(local, "stream", None) or default
    )

    def in_its_memory(crops, batch, options):
        if options.get("device") == CUDA:
            options = {"dtype": options["dtype"]}
        return allocate(crops, batch, options)

    allocate = buffers._allocate
    monkeypatch.setattr(buffers, "_allocate", in_its_memory)

    def uploaded(tensor, *args, **options):
        if args and args[0] == CUDA:
            log.append(("upload", torch.cuda.current_stream(), tensor.nbytes))
            return tensor
        return to(tensor, *args, **options)

    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", uploaded)

    def multicrop(images, params, *, out, num_threads):
        log.append(("fill", torch.cuda.current_stream(), out[0].data_ptr()))
        finish([np.asarray(image) for image in images], params, out=out, num_threads=1)

    monkeypatch.setattr(module, "multicrop", multicrop)
    return log


class Pipeline:
    """A DALI pipeline that decodes the batches it is given, two ahead, and fails on what is no image."""

    def __init__(self, source: ImageSource, first: int, log: list[tuple]):
        self.source, self.next, self.log = source, first, log
        self.ready: list[list[np.ndarray]] = []

    def run(self, stream):
        while len(self.ready) < 3:
            self.ready.append(self.source._encoded(self.next))
            self.next += 1
        self.log.append(("decode", stream))
        images = []
        for content in self.ready.pop(0):
            path = Path(self.source.manifest.root) / "decoding"
            path.write_bytes(content.tobytes())
            try:
                images.append(torch.from_numpy(decode(str(path)).copy()))
            except ValueError as error:
                raise RuntimeError("nvJPEG error") from error
            finally:
                path.unlink()
        return (images,)


@pytest.fixture
def injected(monkeypatch, cuda):
    def build(self, first):
        assert self._device == CUDA
        self._reader = decoding.ReadAhead(
            self.manifest.paths, lambda index: self.replacements.resolve(self._batches(index))
        )
        return Pipeline(self, first, cuda)

    real = ImageSource._build
    monkeypatch.setattr(
        ImageSource,
        "_build",
        lambda self, first: (build if self._device.type == "cuda" else real)(self, first),
    )


def on_gpu(manifest: Manifest, batches: int, monkeypatch, **options) -> list[Crops]:
    monkeypatch.setattr(module, "finishes_on_gpu", lambda choice, device: device.type == "cuda")
    with MultiCropLoader(
        manifest, CROPS, seed=3, global_batch=BATCH, micro_batch=BATCH, num_threads=1, device=CUDA, **options
    ) as loader:
        return [
            Crops(batch.global_.clone(), batch.local.clone(), batch.ids.clone())
            for batch in (next(loader) for _ in range(batches))
        ]


def on_cpu(manifest: Manifest, batches: int) -> list[Crops]:
    with MultiCropLoader(
        manifest, CROPS, seed=3, global_batch=BATCH, micro_batch=BATCH, num_threads=1
    ) as loader:
        return [
            Crops(batch.global_.clone(), batch.local.clone(), batch.ids.clone())
            for batch in (next(loader) for _ in range(batches))
        ]


def assert_same(got: list[Crops], expected: list[Crops]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.global_, b.global_) and torch.equal(a.local, b.local)


@pytest.fixture(scope="module")
def expected(manifest) -> list[Crops]:
    return on_cpu(manifest, 8)


@pytest.mark.parametrize("cache_decoded", [False, True])
def test_the_batches_are_those_of_the_cpu_path(manifest, expected, injected, monkeypatch, cache_decoded):
    assert_same(on_gpu(manifest, 8, monkeypatch, cache_decoded=cache_decoded), expected)
    assert_same(on_gpu(manifest, 3, monkeypatch, start_step=5, cache_decoded=cache_decoded), expected[5:])


def test_decoded_images_stay_on_the_gpu(manifest, expected, cuda, monkeypatch, triton_device):
    """Each is sent once, in one copy with others; then the kernels there, interpreted here, read it."""
    seen = []

    def multicrop(images, params, *, out, num_threads):
        seen.extend(images)
        with backend("triton" if len(seen) == BATCH else "auto"):  # the interpreter takes its time
            finish(images, params, out=out)

    monkeypatch.setattr(module, "multicrop", multicrop)
    assert_same(on_gpu(manifest, 2, monkeypatch, cache_decoded=True), expected[:2])
    sent = [entry for entry in cuda if entry[0] == "upload"]
    assert [size for *_, size in sent] == [sum(decode(path).nbytes for path in manifest.paths)]
    assert all(isinstance(image, torch.Tensor) for image in seen)
    assert len({image.untyped_storage().data_ptr() for image in seen}) == 1


def test_events_order_the_two_streams(manifest, cuda, injected, monkeypatch):
    """Each filling comes after the consumer's last use of the buffer, each use after the filling."""
    on_gpu(manifest, 8, monkeypatch)
    default = torch.cuda.current_stream()
    fills = [i for i, entry in enumerate(cuda) if entry[0] == "fill"]
    loader_stream = cuda[fills[0]][1]
    assert loader_stream is not default and {cuda[i][1] for i in fills} == {loader_stream}
    assert {entry[1] for entry in cuda if entry[0] == "decode"} == {loader_stream}
    recorded_by = {id(entry[2]): entry[1] for entry in cuda if entry[0] == "record"}
    for i in fills:
        mine = [e for e in cuda[:i] if len(e) > 1 and e[1] is loader_stream]
        waited = next(e for e in reversed(mine) if e[0] == "wait")
        assert recorded_by[id(waited[2])] is default  # what the consumer released
        released = cuda.index(("record", default, waited[2]))
        before = [j for j in fills if j < i and cuda[j][2] == cuda[i][2]]
        assert not before or released > before[-1]  # after it was filled the last time, not earlier
        after = next(e for e in cuda[i + 1 :] if e[0] == "record" and e[1] is loader_stream)
        if any(e[0] == "wait" and e[1] is default and e[2] is after[2] for e in cuda):
            continue
        assert i in fills[8:]  # filled ahead and never handed over
    assert cuda[-1] == ("synchronize", loader_stream)  # before the buffers are freed


def test_a_buffer_is_not_filled_while_the_consumer_has_it(manifest, cuda, injected, monkeypatch):
    monkeypatch.setattr(module, "finishes_on_gpu", lambda choice, device: device.type == "cuda")
    with MultiCropLoader(
        manifest, CROPS, seed=3, global_batch=BATCH, micro_batch=BATCH, device=CUDA, prefetch=2
    ) as loader:
        for _ in range(6):
            batch = next(loader)
            before = batch.global_.clone()
            time.sleep(0.05)
            assert torch.equal(batch.global_, before)
        assert len({entry[2] for entry in cuda if entry[0] == "fill"}) == 4  # prefetch + 2


def test_images_are_kept_until_they_have_been_read(cuda):
    buffer = DeviceBuffer(CROPS, 2, torch.float32, CUDA)
    images = [torch.zeros(2, 2, 3, dtype=torch.uint8)]
    buffer.wait()
    buffer.send(np.arange(2), images)
    assert buffer._images is images and buffer.hand_over().ids.tolist() == [0, 1]
    filled = buffer._filled
    buffer.release()
    buffer.wait()
    assert ("block", filled) in cuda and not buffer._images


def test_a_failing_batch_goes_through_the_same_replacement(
    manifest, expected, injected, monkeypatch, tmp_path
):
    paths = []
    for i, path in enumerate(manifest.paths):
        content = Path(path).read_bytes()
        # Without its end a PNG has no header either; cut inside the data it is the decoder that fails.
        paths.append(str(tmp_path / f"{i:02}.png"))
        Path(paths[-1]).write_bytes({3: b"", 7: content[:60] + bytes(9) + content[69:]}.get(i, content))
    damaged = Manifest(paths, None, [], str(tmp_path))
    batches = on_gpu(damaged, 8, monkeypatch)
    assert [b.ids.tolist() for b in batches] == [
        [{3: 4, 7: 8}.get(i, i) for i in b.ids.tolist()] for b in expected
    ]
    assert_same(batches, on_cpu(damaged, 8))


def test_what_only_the_gpu_cannot_decode_the_cpu_does(
    manifest, expected, cuda, injected, monkeypatch, caplog
):
    real, failing = Pipeline.run, []

    def run(self, stream):
        index = self.next if not self.ready else self.next - len(self.ready)
        if index == 2:
            failing.append(1)
            raise RuntimeError("nvJPEG error")
        return real(self, stream)

    monkeypatch.setattr(Pipeline, "run", run)
    assert_same(on_gpu(manifest, 8, monkeypatch), expected)
    assert len(failing) == 2 and caplog.text.count("the GPU fails to decode a batch") == 1


def test_the_graph_is_built_with_mixed_decoding(manifest, monkeypatch):
    """The operators and arguments, as DALI takes them; without a GPU the graph is made, not built."""
    made = {}
    dali = decoding.import_dali()
    real = dali.fn.decoders.image

    def image(*args, **options):
        made.update(options)
        return real(*args, **options)

    monkeypatch.setattr(dali.fn.decoders, "image", image)
    monkeypatch.setattr(dali.Pipeline, "build", lambda self: made.update(device_id=self.device_id))
    schedule = Schedule(N, 0, BATCH, BATCH, 0, 1, 0)
    source = ImageSource(manifest, schedule.ids, BATCH, 1, device=torch.device("cuda", 1))
    try:
        source._build(0)
    finally:
        source.close()
    assert made["device"] == "mixed" and made["device_id"] == 1 and not made["adjust_orientation"]
    assert made["jpeg_fancy_upsampling"] and made["hw_decoder_load"] == 0.65


@pytest.mark.parametrize(
    ("capability", "toolkit", "works"),
    [((9, 0), 13020, True), ((7, 5), 13020, True), ((7, 0), 13020, False), ((7, 0), 12090, True)],
)
def test_auto_takes_a_gpu_that_dali_has_code_for(monkeypatch, capability, toolkit, works):
    from nvidia.dali import backend

    monkeypatch.setattr(backend, "__cuda_version__", toolkit)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert finishes_on_gpu("auto", CUDA) is works
    assert not finishes_on_gpu("cpu", CUDA) and not finishes_on_gpu("auto", torch.device("cpu"))
    if works:
        assert finishes_on_gpu("gpu", CUDA)
    else:
        with pytest.raises(
            ValueError, match=r"--augment_on gpu: .* capability 7.0, DALI.* CUDA 13 needs 7.5"
        ):
            finishes_on_gpu("gpu", CUDA)


def test_a_gpu_asked_for_and_missing_is_an_error(manifest):
    with pytest.raises(ValueError, match="--augment_on gpu: .*, got the device cpu"):
        MultiCropLoader(manifest, CROPS, seed=0, global_batch=4, micro_batch=4, augment_on="gpu")


def test_a_device_without_a_number_is_the_current_one(manifest, injected, monkeypatch):
    """In the background thread the current device is another."""
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: asked.append(threading.current_thread()) or 0)
    monkeypatch.setattr(module, "finishes_on_gpu", lambda choice, device: device == CUDA)
    with MultiCropLoader(
        manifest, CROPS, seed=3, global_batch=BATCH, micro_batch=BATCH, num_threads=1, device="cuda"
    ) as loader:
        next(loader)
        assert loader._producer.device == CUDA
    assert asked == [threading.main_thread()]


def test_an_error_on_the_gpu_is_raised_and_the_stream_is_waited_for(manifest, cuda, monkeypatch):
    class Broken:
        def next(self):
            raise ZeroDivisionError("in the background")

        def close(self):
            cuda.append(("closed",))

    producer = _Producer(
        Broken(),
        False,
        Schedule(N, 0, 4, 4, 0, 1, 0),
        CROPS,
        CUDA,
        1,
        [DeviceBuffer(CROPS, 4, torch.float32, CUDA)],
    )
    producer.run()
    assert isinstance(producer.ready.get(), ZeroDivisionError)
    assert [entry[0] for entry in cuda][-2:] == ["synchronize", "closed"]


def test_replacements_choose_the_same_from_any_beginning(tmp_path):
    """3, then 4, which stood in for it, vanish; a resumed run finds both missing at once."""
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
    manifest = build_manifest(tmp_path)
    first, later = Replacements(manifest), Replacements(manifest)
    Path(manifest.paths[3]).unlink()
    assert first.replace(3, "gone") == 4
    Path(manifest.paths[4]).unlink()
    assert first.replace(4, "gone") == 5
    assert later.replace(3, "gone") == 5
    ids = np.array([2, 3, 4, 5])
    assert later.replace(4, "gone") == 5
    assert first.resolve(ids).tolist() == later.resolve(ids).tolist() == [2, 5, 5, 5]
