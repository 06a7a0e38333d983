"""Count what a run takes: memory by phase, bytes and FLOP by kind, the fastest matrix product."""
import statistics
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from finetune.hardware import peak_memory_mb
from finetune.loss import answer_loss

MIB = 2 ** 20
STATUS = Path("/proc/self/status")
RESET_MARK = Path("/proc/self/clear_refs")


class Peaks:
    """The peak of memory in each phase of a run; call `end` where a phase ends.

    mib: {phase: MiB}, and the peak of all phases as "process".  On CUDA these are allocations.
    Elsewhere they are the whole process, whose high-water mark Linux can reset; where it cannot,
    "process" is the only entry.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.mib = {}
        self.has_phases = device.type == "cuda" or reset_mark()
        self.end(None)

    def end(self, phase: str | None):
        """Note the peak since the last call for this phase; for no phase if None."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / MIB
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.has_phases:
            peak = high_water_mark()
            reset_mark()
        else:
            peak = peak_memory_mb(self.device) or 0.0
            phase = None
        names = ["process"] if phase is None else ["process", phase]
        for name in names:
            self.mib[name] = max(peak, self.mib.get(name, 0.0))


def reset_mark() -> bool:
    """Reset the process's high-water mark; return whether that is possible here."""
    try:
        RESET_MARK.write_text("5")                   # 5 stands for the mark, see man 5 proc.
    except OSError:
        return False
    return True


def high_water_mark() -> float:
    """Return the most memory that the process has had since the mark was reset, in MiB."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2 ** 10
    raise ValueError(f"{STATUS} has no line VmHWM")


class SavedForBackward(TorchDispatchMode):
    """Within the block, collect what autograd keeps for the backward pass.

    The model's own parameters do not count; copies of them in another dtype do, as copies.
    """

    def __init__(self, model):
        super().__init__()
        self.parameters = {storage_key(parameter) for parameter in model.parameters()}
        self.copies = {}                             # {key: weak reference to a copy's storage}
        self.saved = {}                              # {key: (storage, whether it is a copy)}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and storage_key(args[0]) in self.parameters:
            # Weak, because the address is used again once this storage is gone.
            self.copies[storage_key(out)] = weakref.ref(out.untyped_storage())
        return out

    def pack(self, tensor):
        key = storage_key(tensor)
        if key not in self.parameters:
            is_copy = key in self.copies and self.copies[key]() is not None
            # Keep the storage alive: no other may get its address within the block.
            self.saved[key] = (tensor.untyped_storage(), is_copy)
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def n_bytes(self, copies: bool) -> int:
        """Return the bytes of copies of parameters, or of all else."""
        sizes = [storage.nbytes() for storage, is_copy in self.saved.values() if is_copy is copies]
        return sum(sizes)


def storage_key(tensor) -> int:
    """Return a number that tells a tensor's storage from all others that are alive."""
    return tensor.untyped_storage()._cdata


def count_work(model, batches: list, autocast) -> dict:
    """Return {copies, activations, forward, flop} of forward and backward over the micro-batches.

    copies, activations: bytes kept for backward, the most of any micro-batch; copies are of
    parameters in another dtype.  forward, flop: FLOP of all micro-batches, the latter with
    backward; matrix products alone, and on a CPU without those inside torch's attention kernel.
    Gradients are thrown away.
    """
    work = {"copies": 0, "activations": 0, "forward": 0, "flop": 0}
    model.train()
    for batch in batches:
        both_passes = FlopCounterMode(display=False)
        forward = FlopCounterMode(display=False)
        saved = SavedForBackward(model)
        with both_passes:
            with forward, saved, autocast:
                loss, _ = answer_loss(model, batch)
            work["copies"] = max(work["copies"], saved.n_bytes(copies=True))
            work["activations"] = max(work["activations"], saved.n_bytes(copies=False))
            saved.saved.clear()
            loss.backward()
        work["forward"] += forward.get_total_flops()
        work["flop"] += both_passes.get_total_flops()
    model.zero_grad(set_to_none=True)
    return work


def multiplied_weights(args, answer_share: float) -> int:
    """Return P: the number of weights that a token is multiplied with, by ModelArgs.

    Those are the weights of the blocks, and of the output matrix the share of tokens that predict
    an answer token.  Embedding and norms are no matrix products.
    """
    D = args.dim
    K = args.dim // args.n_heads * args.n_kv_heads
    per_block = 2 * D * D + 2 * D * K + 3 * D * args.hidden_dim
    return args.n_layers * per_block + round(answer_share * D * args.vocab_size)


def flop_per_token(n_weights: int, full: bool = False, checkpointing: bool = False) -> int:
    """Return the FLOP of forward and backward for each token, by rule of thumb.

    2 P forward and 2 P back to the activations; 2 P more to the weights where they are trained
    (full), and 2 P more for the second forward pass of checkpointing.  Left out: a LoRA's own
    products, r wide, and attention's.  With checkpointing torch computes a little less than this:
    it never repeats a block's w2, whose result nothing needs, nor the head.
    """
    products = 2
    if full:
        products += 1
    if checkpointing:
        products += 1
    return 2 * products * n_weights


def matmul_peak(dtype: torch.dtype, device: torch.device, sizes=None, repeats: int = 5) -> float:
    """Return the FLOP/s of the fastest of a few square products of random matrices.

    Each is the median of `repeats` after one to warm up.
    """
    if sizes is None:
        sizes = (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384)
    fastest = 0.0
    for n in sizes:
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        seconds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            product = a @ b
            product[0, 0].item()                     # This waits for a GPU to finish.
            seconds.append(time.perf_counter() - began)
        fastest = max(fastest, 2 * n ** 3 / statistics.median(seconds[1:]))
    return fastest
