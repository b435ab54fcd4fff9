"""What is timed: passes after the warm-up, without gradients, in evaluation mode and the type asked for."""

from __future__ import annotations

import json

import pytest
import torch

from fastdino.evaluation import throughput
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.throughput import images_per_second


class Slow(torch.nn.Module):
    """A network whose passes take 2 seconds of a clock of its own, the first ones 100."""

    def __init__(self, slow_passes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.now, self.slow_passes, self.seen = 0.0, slow_passes, []

    def forward(self, x):
        self.seen.append((tuple(x.shape), x.dtype, self.weight.dtype, self.training, torch.is_grad_enabled()))
        self.now += 100 if len(self.seen) <= self.slow_passes else 2
        return x.mean() * self.weight


def test_rate_by_a_clock_of_its_own(monkeypatch):
    network = Slow(slow_passes=3).train()
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: network.now)
    rate = images_per_second(network, batch_size=6, image_size=8, dtype=torch.bfloat16, warmup=3, passes=4)
    assert rate == pytest.approx(3.0)
    assert network.seen == [((6, 3, 8, 8), torch.bfloat16, torch.bfloat16, False, False)] * 7
    assert network.training and network.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="a pass or more"):
        images_per_second(network, passes=0)


def test_fp32_is_not_tf32():
    class Look(torch.nn.Module):
        def forward(self, x):
            self.seen = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            return x

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        network = Look()
        images_per_second(network, batch_size=1, image_size=8, warmup=0, passes=1)
        assert network.seen == ("highest", False)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_command_beside_the_paper(tmp_path, capsys):
    line = ["throughput", "--device", "cpu", "--batch_size_per_gpu", "1", "--warmup", "1", "--passes", "1"]
    assert main([*line, "--arch", "vit_small", "--output_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "vit_small/16, fp32: " in shown and "1007 img/s are one V100's, 128 images per pass" in shown
    assert "bf16" in shown
    record = json.loads((tmp_path / "throughput.json").read_text())
    assert record["figures"]["img_s_fp32"] > 0 and record["settings"]["passes"] == 1
    assert main([*line, "--arch", "vit_tiny", "--image_size", "32"]) == 0
    assert "V100" not in capsys.readouterr().out
