"""``python -m fastdino_kernels``: which backend answers each operation on this machine, and why."""

from __future__ import annotations

import warnings

import torch

from . import csrc

OPERATIONS = {  # name -> the C function behind its `cpu` backend
    "prototype_loss": "fdk_dino_statistics",
    "dino_loss": "fdk_dino_statistics",
    "normalize_weight": "fdk_normalize_weight",
    "AdamWEMA": "fdk_adamw_ema",
    "ema_update_": "fdk_ema",
    "clip_grad_per_tensor_": "fdk_sums_of_squares",
    "multicrop": "fdk_multicrop",
}


def main() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library = csrc.library()
    print(f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}")
    if library is not None:
        print(f"C++ kernels: {csrc.PATH}, {csrc.num_threads()} threads")
    for warning in caught:
        print(f"C++ kernels: {warning.message}")
    print(f"\n{'operation':<24}{'CPU tensors':<14}{'CUDA tensors'}")
    for operation, function in OPERATIONS.items():
        cpu = "cpu" if library is not None and hasattr(library, function) else "reference"
        print(f"{operation:<24}{cpu:<14}{'host only' if operation == 'multicrop' else 'reference'}")
    print("\ncpu: compiled C++ kernels; reference: eager PyTorch, also for dtypes the kernels do not take.")
    print("There are no CUDA kernels in this version: CUDA tensors take the reference.")


if __name__ == "__main__":
    main()
