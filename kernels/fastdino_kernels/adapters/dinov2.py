"""DINOv2's losses: ``from fastdino_kernels.adapters.dinov2 import DINOLoss, iBOTPatchLoss``.

Their interface hands the teacher's probabilities from one method to another. A cross-entropy is linear in its
target, so the targets that a student tensor meets are added up first; each student tensor is then read once
forward and once backward, in its own precision, with fp32 statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..centered_softmax import centered_softmax
from ..sinkhorn import sinkhorn_knopp
from ..soft_cross_entropy import soft_cross_entropy
from ..validate import check_tensor


class _CenteredLoss(nn.Module):
    """Teacher side of both losses: targets, and a center whose sum over the processes runs in the background.

    ``update_center`` (or ``reduce_center_update``) starts that sum; the next ``softmax_center_teacher`` (or
    ``apply_center_update``) waits for it and moves the center.
    """

    center: Tensor

    def __init__(self, center: Tensor, student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", center)
        self.updated = True
        self.reduce_handle: Any = None
        self.async_batch_center: Tensor | None = None

    def _softmax_center(self, name: str, logits: Tensor, teacher_temp: float | Tensor) -> Tensor:
        self.apply_center_update()
        rows, center = logits.flatten(0, -2), self.center.flatten()  # [R, K], [K]
        check_tensor(name, rows, ("...", len(center)), like=center)
        # Leading dimensions of size 1 that the center has and the logits lack are added, as by subtraction.
        shape = torch.broadcast_shapes(logits.shape, self.center.shape)
        return centered_softmax(rows, center, temp=teacher_temp).view(shape)

    def _reduce(self, batch_sum: Tensor) -> None:
        self.updated = False
        self.async_batch_center = batch_sum
        self.reduce_handle = dist.all_reduce(batch_sum, async_op=True) if _processes() > 1 else None

    def _rows_in_sum(self) -> int:
        raise NotImplementedError

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Move the center by the sum under way, if any."""
        if self.updated:
            return
        assert self.async_batch_center is not None
        if self.reduce_handle is not None:
            self.reduce_handle.wait()
        m = self.center_momentum
        mean = self.async_batch_center / (self._rows_in_sum() * _processes())
        self.center = self.center * m + mean.to(self.center.dtype) * (1 - m)
        self.updated = True


class DINOLoss(_CenteredLoss):
    """``dinov2.loss.DINOLoss``: same constructor, methods and state dict (center [1, K]).

    ``forward(student_output_list, teacher_out_softmaxed_centered_list)`` takes student logits [B, K] per view
    and teacher probabilities [B, K] per view (a list, or a tensor [G, B, K]) and returns the sum over all
    pairs of their mean cross-entropy. The probabilities come from ``softmax_center_teacher(teacher_output,
    teacher_temp)`` or ``sinkhorn_knopp_teacher(teacher_output, teacher_temp, n_iterations=3)``.

    Raises: TypeError, ValueError naming the argument, for shapes that do not fit each other or the center.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__(torch.zeros(1, out_dim), student_temp, center_momentum)
        self.len_teacher_output: int | None = None

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float | Tensor) -> Tensor:
        """``softmax((teacher_output - center) / teacher_temp)`` in fp32, after the pending center update."""
        return self._softmax_center("teacher_output", teacher_output, teacher_temp)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float | Tensor, n_iterations: int = 3
    ) -> Tensor:
        """Assignments of the rows [rows, K] in which, over all processes, prototypes are used alike."""
        return sinkhorn_knopp(teacher_output, temp=teacher_temp, n_iters=n_iterations)

    def forward(
        self,
        student_output_list: Sequence[Tensor],
        teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor,
    ) -> Tensor:
        targets = teacher_out_softmaxed_centered_list
        for name, tensors in (
            ("student_output_list", student_output_list),
            ("teacher_out_softmaxed_centered_list", targets),
        ):
            if len(tensors) == 0:
                raise ValueError(f"{name}: expected at least one tensor, got none")
        with torch.no_grad():
            target = targets[0] if len(targets) == 1 else sum(targets[1:], start=targets[0])  # [B, K]
        losses = []
        for i, x in enumerate(student_output_list):
            check_tensor(f"student_output_list[{i}]", x, tuple(target.shape), like=target)
            losses.append(soft_cross_entropy(x, target, temp=self.student_temp).mean())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Start the center's update by the teacher's logits [rows, K]."""
        self.reduce_center_update(teacher_output)

    @torch.no_grad()
    def reduce_center_update(self, teacher_output: Tensor) -> None:
        """As ``update_center``."""
        check_tensor("teacher_output", teacher_output, ("rows", self.center.shape[-1]), like=self.center)
        self.len_teacher_output = len(teacher_output)
        self._reduce(teacher_output.sum(0, keepdim=True, dtype=_wide(teacher_output)))

    def _rows_in_sum(self) -> int:
        assert self.len_teacher_output is not None
        return self.len_teacher_output


class iBOTPatchLoss(_CenteredLoss):
    """``dinov2.loss.iBOTPatchLoss``: same constructor, methods and state dict (center [1, 1, K]).

    ``forward`` takes all patches [B, N, K] and their masks [B, N]; ``forward_masked`` the M masked ones [M,
    K] alone. Both weigh a patch by 1 / (masked patches of its image), and take the mean over the images.

    Raises: TypeError, ValueError naming the argument, for shapes that do not fit each other or the center.
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__(torch.zeros(1, 1, patch_out_dim), student_temp, center_momentum)
        self.len_teacher_patch_tokens: int | None = None

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_patch_tokens: Tensor, teacher_temp: float | Tensor) -> Tensor:
        """``softmax((tokens - center) / teacher_temp)`` of tokens [..., K], after the pending center update.

        The result is fp32 and has at least three dimensions: [M, K] becomes [1, M, K].
        """
        return self._softmax_center("teacher_patch_tokens", teacher_patch_tokens, teacher_temp)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float | Tensor,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """Assignments of the masked patches [M, K] in which, over all processes, prototypes are used alike.

        ``n_masked_patches_tensor`` is accepted and left as it is: the number of patches is a common factor
        that the last normalisation removes.
        """
        return sinkhorn_knopp(teacher_output, temp=teacher_temp, n_iters=n_iterations)

    def forward(
        self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor
    ) -> Tensor:
        """Logits [B, N, K], probabilities [B, N, K], masks [B, N] -> loss []."""
        check_tensor("student_patch_tokens", student_patch_tokens, ("B", "N", self.center.shape[-1]))
        shape = tuple(student_patch_tokens.shape)
        check_tensor("teacher_patch_tokens", teacher_patch_tokens, shape, like=student_patch_tokens)
        if student_masks_flat.shape != shape[:2]:
            raise ValueError(
                f"student_masks_flat: expected shape {list(shape[:2])}, got {list(student_masks_flat.shape)}"
            )
        losses = soft_cross_entropy(
            student_patch_tokens.flatten(0, 1), teacher_patch_tokens.flatten(0, 1), temp=self.student_temp
        ).view(shape[:2])  # [B, N]
        mask = student_masks_flat.to(losses.dtype)
        return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Logits [M, K], probabilities [M, K], masks [B, N] -> loss [].

        Rows beyond ``n_masked_patches`` are padding. ``masks_weight`` [M] replaces the weights 1 / (masked
        patches of the image), which are in the order of the masks; without it a GPU waits for their number.
        """
        x, t = (y.flatten(0, -2) for y in (student_patch_tokens_masked, teacher_patch_tokens_masked))
        check_tensor("student_patch_tokens_masked", x, ("M", self.center.shape[-1]))
        check_tensor("teacher_patch_tokens_masked", t, tuple(x.shape), like=x)
        if n_masked_patches is not None:
            x, t = x[:n_masked_patches], t[:n_masked_patches]
        if masks_weight is None:
            mask = student_masks_flat.bool()
            masks_weight = (1 / mask.sum(-1, keepdim=True).clamp(min=1.0)).expand_as(mask)[mask]
        if len(masks_weight) != len(x):
            raise ValueError(
                f"masks_weight: expected {len(x)} weights, one per masked patch, got {len(masks_weight)}"
            )
        losses = soft_cross_entropy(x, t, temp=self.student_temp)
        return (losses * masks_weight).sum() / len(student_masks_flat)

    @torch.no_grad()
    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        """Start the center's update by the teacher's logits [images, patches, K]."""
        self.reduce_center_update(teacher_patch_tokens)

    @torch.no_grad()
    def reduce_center_update(self, teacher_patch_tokens: Tensor) -> None:
        """As ``update_center``."""
        self.len_teacher_patch_tokens = len(teacher_patch_tokens)
        check_tensor(
            "teacher_patch_tokens", teacher_patch_tokens, ("images", "patches", self.center.shape[-1]),
            like=self.center,
        )  # fmt: skip
        dtype = _wide(teacher_patch_tokens)
        self._reduce(teacher_patch_tokens.mean(1, dtype=dtype).sum(0, keepdim=True))

    def _rows_in_sum(self) -> int:
        assert self.len_teacher_patch_tokens is not None
        return self.len_teacher_patch_tokens


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
