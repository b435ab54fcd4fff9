"""The official repository's own code as a rival, on the same tensors: models, loss, clipping and optimizer
of a checkout of github.com/facebookresearch/dino, which is not part of this one (`--official PATH`).

Only the body of its training loop is written here, because the original also reads the data set, logs and
needs a GPU. Left out is what one process does not need, all of which would slow it down:
DistributedDataParallel, the all-reduce of the center, the log's meters.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.config import Config, ModelConfig, backbone_shape
from fastdino.data.loader import Crops
from fastdino.engine.schedules import Hyper
from fastdino.methods.dino import DINO

MODULES = ("utils", "vision_transformer", "main_dino")


def load(path: Path) -> SimpleNamespace:
    """The modules of a checkout, as attributes ``utils``, ``vision_transformer`` and ``main_dino``.

    SystemExit when ``path`` is no such checkout.
    """
    missing = [name for name in MODULES if not (path / f"{name}.py").is_file()]
    if missing:
        raise SystemExit(
            f"--official {path}: expected a checkout of facebookresearch/dino, found no {missing[0]}.py"
        )
    # main_dino imports torchvision for the data set and the ResNets, neither of which is needed here, and
    # torchvision cannot be imported beside a CPU build of torch. The checkout's own module names are so
    # common that they must not stay either.
    stand_in = ModuleType("torchvision")
    for name in ("datasets", "transforms", "models"):
        setattr(stand_in, name, ModuleType(name))
    names = (*MODULES, "torchvision")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules["torchvision"] = stand_in
    sys.path.insert(0, str(path))
    try:
        found = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(path))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    # A group of one process, in which an all-reduce changes nothing.
    found.main_dino.dist = SimpleNamespace(all_reduce=lambda tensor: None, get_world_size=lambda: 1)
    return found


def backbone(code: Any, model: ModelConfig, image_size: int) -> nn.Module:
    """Its ViT, with the arguments that its ``vit_small`` and the others pass, in the configured size."""
    width, depth, heads = backbone_shape(model)
    return code.vision_transformer.VisionTransformer(
        img_size=[image_size],
        patch_size=model.patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        drop_path_rate=model.drop_path_rate,
    )


def network(code: Any, config: Config) -> nn.Module:
    """Its ViT and head, initialised by it, as student or teacher."""
    model = config.model
    vit = backbone(code, model, config.crops.global_crops_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its weight_norm
        head = code.vision_transformer.DINOHead(
            vit.embed_dim,
            model.out_dim,
            use_bn=model.use_bn_in_head,
            norm_last_layer=model.norm_last_layer,
            nlayers=model.head_layers,
            hidden_dim=model.head_hidden_dim,
            bottleneck_dim=model.bottleneck_dim,
        )
    return code.utils.MultiCropWrapper(vit, head)


class OfficialStep:
    """Starts from the weights of ``method``, whose parameter names are the same and which it does not keep;
    fp32, or with ``use_fp16`` as its flag does it: autocast to fp16 with a GradScaler, which needs a GPU.
    """

    def __init__(
        self,
        code: Any,
        config: Config,
        method: DINO,
        hyper: Hyper,
        device: torch.device,
        *,
        use_fp16: bool,
    ):
        self.code, self.hyper, self.device = code, hyper, device
        if use_fp16 and self.device.type != "cuda":
            raise ValueError(f"use_fp16: expected a GPU, as its GradScaler does, got {self.device}")
        self.clip = config.optim.clip_grad
        self.student, self.teacher = (network(code, config).to(self.device) for _ in range(2))
        self.student.load_state_dict(method.student.state_dict())
        self.teacher.load_state_dict(method.teacher.state_dict())
        for p in self.teacher.parameters():
            p.requires_grad = False
        self.loss = code.main_dino.DINOLoss(
            config.model.out_dim,
            config.crops.local_crops_number + 2,
            hyper.teacher_temp,
            hyper.teacher_temp,
            0,
            config.optim.epochs,
            student_temp=config.loss.student_temp,
            center_momentum=config.loss.center_momentum,
        ).to(self.device)
        self.optimizer = torch.optim.AdamW(code.utils.get_params_groups(self.student))
        self.scaler = torch.amp.GradScaler("cuda") if use_fp16 else None
        torch.backends.cudnn.benchmark = True  # as its main function does

    def views(self, crops: Crops) -> list[Tensor]:
        """One batch per view, the form its loader has."""
        batch = len(crops.global_) // 2
        return [view for x in (crops.global_, crops.local) if x is not None for view in x.split(batch)]

    def __call__(self, crops: Crops) -> float:
        """The body of its ``train_one_epoch``; the loss, for which it waits."""
        utils, hyper, epoch = self.code.utils, self.hyper, 1  # the last layer is not frozen any more
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = hyper.lr
            if i == 0:
                group["weight_decay"] = hyper.weight_decay
        images = self.views(crops)
        with torch.autocast(self.device.type, torch.float16, enabled=self.scaler is not None):
            teacher_output = self.teacher(images[:2])
            student_output = self.student(images)
            loss = self.loss(student_output, teacher_output, epoch)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the official step's loss is {loss.item()}")
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            utils.clip_gradients(self.student, self.clip)
            utils.cancel_gradients_last_layer(epoch, self.student, 1)
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            utils.clip_gradients(self.student, self.clip)
            utils.cancel_gradients_last_layer(epoch, self.student, 1)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            m = hyper.momentum
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.data.mul_(m).add_((1 - m) * q.detach().data)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()
