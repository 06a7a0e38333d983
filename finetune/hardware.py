"""Device and precision: choices, defaults, and peak memory."""
import os
import shutil
import sys
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Compute dtype and device of a run.

    name: "fp32", "bf16" or "fp16".  autocast, scaler: torch objects, disabled where not needed.
    """
    name: str
    device: torch.device
    autocast: torch.autocast
    scaler: torch.amp.GradScaler

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


def pick_hardware(device, precision, local_rank=0, fast_matmul=False):
    """Return (torch.device, "fp32" | "bf16" | "fp16") for the flags --device and --precision.

    Each rank of a machine takes a GPU of its own.  fast_matmul permits products of fp32 matrices to
    round their factors: to bf16 on a CPU, to TF32 on CUDA; sums stay in fp32.  A CPU without bf16
    matrix instructions only takes other kernels and does not round.
    Raises ValueError for a device that cannot be used here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    kind = device.partition(":")[0]
    is_available = {"cpu": True, "cuda": torch.cuda.is_available(),
                    "mps": torch.backends.mps.is_available()}
    if kind not in is_available:
        raise ValueError(f"--device {device} cannot be used here: use cpu, cuda, cuda:N or mps")
    if not is_available[kind]:
        raise ValueError(f"--device {device} cannot be used here: this machine has no {kind} "
                         f"device, or this torch is built without {kind}; use cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]   # The rest is about torch itself.
        raise ValueError(f"--device {device} cannot be used here: {reason}") from error
    device = torch.device(device)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if fast_matmul else "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if fast_matmul else "ieee"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, precision or default_precision(device)


def check_compiler(device):
    """Raise ValueError if torch.compile lacks the C++ compiler that it needs for a CPU."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile needs a C++ compiler (g++, or what CXX names) to compile for a "
                         "CPU")


def default_precision(device) -> str:
    """Return "bf16" on a GPU that computes in it, "fp16" on an older one, "fp32" elsewhere."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def peak_memory_mb(device) -> float | None:
    """Return the peak of a CUDA device's allocations, else of this process, in MiB.

    None on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource                              # Windows lacks this module.
    except ImportError:
        return None
    units_per_mib = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mib
