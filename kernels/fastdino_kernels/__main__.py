"""``python -m fastdino_kernels``: which backend answers each operation on this machine, and why."""

from __future__ import annotations

import importlib.util
import warnings

import torch

from . import csrc

OPERATIONS = {  # name -> the C function behind its `cpu` backend
    "prototype_loss": "fdk_dino_statistics",
    "dino_loss": "fdk_dino_statistics",
    "region_loss": "fdk_matched_statistics",
    "patch_loss": "fdk_matched_statistics",
    "soft_cross_entropy": "fdk_soft_cross_entropy",
    "sinkhorn_knopp": "fdk_sinkhorn_step",
    "softmax_over_batch": "fdk_sinkhorn_step",
    "centered_softmax": "fdk_sinkhorn_step",
    "info_nce": "fdk_info_nce_fold",
    "normalize_weight": "fdk_normalize_weight",
    "AdamWEMA": "fdk_adamw_ema",
    "LARS": "fdk_lars",
    "LAMB": "fdk_lamb",
    "ema_update_": "fdk_ema",
    "clip_grad_per_tensor_": "fdk_sums_of_squares",
    "grad_square_sums": "fdk_sums_of_squares",
    "multicrop": "fdk_multicrop",
}


def main() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library = csrc.library()
    print(f"torch {torch.__version__}, {_gpu()}")
    if library is not None:
        print(f"C++ kernels: {csrc.PATH}, {csrc.num_threads()} threads")
    for warning in caught:
        print(f"C++ kernels: {warning.message}")
    triton = importlib.util.find_spec("triton") is not None
    if triton:
        from importlib.metadata import version

        print(f"Triton kernels: triton {version('triton')}")
    else:
        print("Triton kernels: triton is not installed (CUDA builds of PyTorch bring it)")
    print(f"\n{'operation':<26}{'CPU tensors':<14}{'CUDA tensors'}")
    for operation, function in OPERATIONS.items():
        cpu = "cpu" if library is not None and hasattr(library, function) else "reference"
        print(f"{operation:<26}{cpu:<14}{'triton' if triton else 'reference'}")
    print("\ncpu: compiled C++ kernels; triton: Triton kernels; reference: eager PyTorch, also for float64.")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


if __name__ == "__main__":
    main()
