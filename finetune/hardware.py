"""Device and precision: choices, defaults, and peak memory."""
import os
import shutil
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_THREADS = torch.get_num_threads()
SMALL_MODEL = 2_000_000                  # parameters; a second thread gains nothing below this
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")     # oneDNN's, torch's
KERNELS_PER_MICRO_BATCH = 64             # of products by weights, generously
KERNELS_PER_EXAMPLE = 8                  # of attention, forward and backward


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

    Each rank of a machine takes a GPU of its own: a numbered GPU is refused where there are several
    ranks, because all would take that one.  fast_matmul permits products of fp32 matrices to round
    their factors: to bf16 on a CPU, to TF32 on CUDA; sums stay in fp32.  A CPU without bf16 matrix
    instructions only takes other kernels and does not round.
    Raises ValueError for a device that cannot be used here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(f"--device {device} puts all ranks on one GPU: use --device cuda, which "
                         "gives each a GPU of its own")
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
    # On Hopper and Blackwell torch takes cuDNN's attention first.  For each length that is new, and
    # in packed rows most are, cuDNN makes a plan, which takes up to a second.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, precision or default_precision(device)


def fit_to_cpu(model: torch.nn.Module, plan: list):
    """Limit what a training run on a CPU takes: threads for a small model, and kernels.

    plan: of train.py, per step (epoch, [rank][micro-batch][example]).
    """
    limit_threads(model)
    limit_kernel_caches(plan)


def limit_threads(model: torch.nn.Module):
    """Compute with one thread if the model is small, else with as many as torch would use.

    The threads of a product wait for each other in a busy loop.  A small model's products are so
    short that a second thread gains nothing on an idle machine, and on a busy one it makes the run
    several times as long.  The rule looks at the model alone, since other threads sum in another
    order: a command gives the same numbers whatever else runs.  OMP_NUM_THREADS goes first.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        is_small = count_parameters(model) < SMALL_MODEL
        torch.set_num_threads(1 if is_small else DEFAULT_THREADS)


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of the model's parameters, those of quantised matrices included."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if hasattr(module, "dequantize"):            # Its codes are no parameters.
            total += module.in_features * module.out_features
    return total


def limit_kernel_caches(plan: list):
    """Let oneDNN keep the kernels of one micro-batch; by default it keeps 1,024.

    oneDNN compiles a kernel for each shape of a product on a CPU.  Blocks share a micro-batch's
    kernels, but the next micro-batch has other lengths, so old kernels only take memory: about a
    MiB each.  oneDNN reads these variables at its first product.  A value that the environment
    already has stays.
    """
    n_examples = 0
    for _, ranks in plan:
        for batches in ranks:
            n_examples = max([n_examples, *map(len, batches)])
    n_kernels = KERNELS_PER_MICRO_BATCH + KERNELS_PER_EXAMPLE * n_examples
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(n_kernels))


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
