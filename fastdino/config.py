"""The whole configuration of a run: nested dataclasses whose fields are the command-line flags.

Field names, types and defaults are those of the official ``main_dino.py`` wherever it has the flag; everything else is an
addition. Groups become the sections of ``--help``. This module imports nothing heavier than the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelConfig:
    """Backbone and projection head."""

    arch: str = "vit_small"
    """Backbone: vit_tiny, vit_small, vit_base (deit_tiny, deit_small are aliases)."""
    patch_size: int = 16
    """Side of a square patch in pixels; smaller is better and slower."""
    num_heads: int | None = None
    """Attention heads; none keeps the architecture's own."""
    embed_dim: int | None = None
    """Width of the backbone; none keeps the architecture's own."""
    depth: int | None = None
    """Transformer blocks; none keeps the architecture's own."""
    in_chans: int = 3
    """Input channels."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student."""
    out_dim: int = 65536
    """K, the number of prototypes (head output)."""
    norm_last_layer: bool = True
    """Freeze the gain (weight_g) of the last layer at 1."""
    use_bn_in_head: bool = False
    """Batch normalisation in the projection head."""
    head_layers: int = 3
    """Linear layers before the last one, 1 to 4."""
    head_hidden_dim: int = 2048
    """Hidden width of the projection head."""
    bottleneck_dim: int = 256
    """Width of the l2-normalised bottleneck; 0 for a head without bottleneck."""
    head_act: Literal["gelu", "relu"] = "gelu"
    """Activation in the projection head."""


@dataclass
class LossConfig:
    """Teacher and loss."""

    momentum_teacher: float = 0.996
    """Base EMA momentum of the teacher, raised to 1 by a cosine schedule; 0.9995 is advised at batch 256."""
    warmup_teacher_temp: float = 0.04
    """Teacher temperature at the start."""
    teacher_temp: float = 0.04
    """Teacher temperature after the warm-up; lower it if the loss does not fall."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of linear teacher-temperature warm-up."""
    student_temp: float = 0.1
    """Student temperature."""
    center_momentum: float = 0.9
    """EMA momentum of the center."""


@dataclass
class OptimConfig:
    """Optimisation."""

    use_fp16: bool = True
    """Official switch: false forces fp32, true leaves the choice to --precision."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute type; auto takes bf16 where the hardware has it, fp16 on V100, else fp32."""
    weight_decay: float = 0.04
    """Weight decay at the start."""
    weight_decay_end: float = 0.4
    """Weight decay at the end (cosine schedule)."""
    clip_grad: float = 3.0
    """Largest norm of each parameter tensor's gradient; 0 switches clipping off."""
    batch_size_per_gpu: int = 64
    """Images per process and forward pass."""
    batch_size: int | None = None
    """Global batch; more than all processes hold at once means gradient accumulation. None: processes x batch_size_per_gpu."""
    epochs: int = 100
    """Epochs of training."""
    max_steps: int | None = None
    """Stop after this many optimizer steps (the schedules still span --epochs)."""
    freeze_last_layer: int = 1
    """Epochs during which the last layer is not trained."""
    lr: float = 0.0005
    """Learning rate after warm-up for a batch of 256; scaled by global batch / 256."""
    warmup_epochs: int = 10
    """Epochs of linear learning-rate warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end (not scaled)."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimizer."""
    max_bad_steps: int = 10
    """Steps with a NaN or infinite loss or gradient in a row before the run stops; such steps change nothing."""


@dataclass
class CropConfig:
    """Multi-crop augmentation."""

    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Area range of the two global crops, relative to the image."""
    local_crops_number: int = 8
    """Local crops per image; 0 switches multi-crop off."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Area range of the local crops, relative to the image."""
    global_crops_size: int = 224
    """Side of the global crops in pixels."""
    local_crops_size: int = 96
    """Side of the local crops in pixels."""


@dataclass
class DataConfig:
    """Data."""

    data_path: str = "/path/to/imagenet/train/"
    """Folder of class folders (searched recursively), flat folder of images, or text file with one path per line."""
    num_workers: int = 10
    """Data threads per process."""
    prescan: Literal["auto", "on", "off"] = "auto"
    """Decode every file once beforehand and drop bad ones (cached); auto scans up to 200,000 files."""
    cache_decoded: Literal["auto", "on", "off"] = "auto"
    """Keep decoded images in memory; auto does so when they fit into a quarter of the free memory and 2 GiB."""


@dataclass
class EvalConfig:
    """Evaluation during training and in the report."""

    eval_every: int = 0
    """Epochs between k-NN evaluations of the teacher; 0 evaluates only at the end, and only with --eval_data_path."""
    eval_data_path: str | None = None
    """Class folders with held-out images; the training images are the k-NN memory bank (a train/ + val/ pair inside wins)."""
    nb_knn: tuple[int, ...] = (10, 20)
    """Numbers of neighbours."""
    eval_bank_size: int = 20000
    """Largest number of memory-bank images used during training."""
    eval_image_size: int | None = None
    """Side of the evaluation images; none takes global_crops_size."""


@dataclass
class RunConfig:
    """Run, output and hardware."""

    output_dir: str = "."
    """Where logs, checkpoints and the report go."""
    saveckp_freq: int = 20
    """Epochs between checkpoints that are kept."""
    save_every: int = 0
    """Steps between resume points; 0 saves at the end of each epoch."""
    resume: str = "auto"
    """auto continues from the newest valid checkpoint of output_dir, none starts afresh, a path continues from that checkpoint."""
    seed: int = 0
    """Seed of weights, data order, crops and stochastic depth."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is a GPU."""
    log: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Curves besides log.txt and report.html."""
    log_every: int = 10
    """Steps between log lines."""
    report: bool = True
    """Write report.html at the end and after every evaluation."""
    dist_url: str = "env://"
    """Accepted for compatibility; torchrun's environment is used."""
    local_rank: int = 0
    """Accepted for compatibility; ignored."""


@dataclass
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
