"""Device and precision: which there are, and what memory they have taken."""
import sys

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_hardware(device, precision, local_rank=0, fast_matmul=False):
    """(torch.device, "fp32" | "bf16" | "fp16") from the two flags; each rank of a machine takes a GPU of its own.

    fast_matmul: products of fp32 matrices may round what they read, to bf16 on a CPU, to TF32 on CUDA, and add up in fp32.
    It is leave, no order: on a CPU without matrix units oneDNN's kernels, which then do them, round nothing.
    Raises ValueError for a device that is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = f"cuda:{local_rank}" if device == "cuda" else device
    if device.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device} cannot be used here: there is cpu, cuda, cuda:N and mps")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    device = torch.device(device)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if fast_matmul else "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if fast_matmul else "ieee"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        precision = precision or ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    return device, precision or "fp32"


def peak_memory_mb(device):
    """Peak of the GPU's allocations, or of the process's memory on a CPU, in MiB; None where nobody counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
