"""What a run takes: memory by phase, bytes and FLOP by kind, and how fast this machine multiplies at best."""
import statistics
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from finetune.hardware import peak_memory_mb
from finetune.loss import answer_loss

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peaks:
    """The peak of memory in each phase of a run: mb {phase: MiB}.  Call it with a phase's name where that phase ends.

    Of the GPU's allocations, or of the whole process on Linux, whose high-water mark can be set back; "process" is the
    peak of all, between the phases too, and where nobody can set it back mb holds that alone.
    """

    def __init__(self, device):
        self.device, self.mb = device, {}
        try:
            self.by_phase = device.type == "cuda" or CLEAR.write_text("5") > 0
        except OSError:
            self.by_phase = False
        self(None)

    def __call__(self, phase):
        """phase None: what was since the last call belongs to none."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2 ** 20
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.by_phase:
            peak = int(next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 2 ** 10
            CLEAR.write_text("5")
        else:
            phase, peak = None, peak_memory_mb(self.device) or 0.0
        for name in {phase, "process"} - {None}:
            self.mb[name] = max(peak, self.mb.get(name, 0.0))


class Kept(TorchDispatchMode):
    """Within the block, what autograd keeps for the backward pass, the model's own tensors apart.

    bytes() -> (of copies of parameters in another dtype, of all else).
    """

    def __init__(self, model):
        super().__init__()
        self.own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.casts, self.kept = {}, {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.own:
            storage = out.untyped_storage()
            self.casts[storage._cdata] = weakref.ref(storage)            # an address may come again, when this one is gone
        return out

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            cast = self.casts.get(storage._cdata, lambda: None)() is not None
            self.kept[storage._cdata] = storage, cast                    # held, so that no address comes twice
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def bytes(self):
        return tuple(sum(storage.nbytes() for storage, cast in self.kept.values() if cast is kind) for kind in (True, False))


def counted(model, batches, autocast):
    """{copies, activations: bytes kept for backward, the most of a micro-batch; forward, flop: FLOP, of all micro-batches}.

    copies: of parameters in another dtype.  flop: of forward and backward, matrix products alone, which on a CPU leaves
    attention out where torch's own kernel does it.  Gradients are thrown away.
    """
    copies = activations = forward = flop = 0
    for batch in batches:
        with FlopCounterMode(display=False) as all_of_it:
            with FlopCounterMode(display=False) as first, Kept(model) as kept, autocast:
                loss = answer_loss(model.train(), batch)[0]
            held = kept.bytes()
            kept.kept.clear()
            loss.backward()
        copies, activations = max(copies, held[0]), max(activations, held[1])
        forward, flop = forward + first.get_total_flops(), flop + all_of_it.get_total_flops()
    model.zero_grad(set_to_none=True)
    return dict(copies=copies, activations=activations, forward=forward, flop=flop)


def multiplied(args, answer_share):
    """P: the weights that a token multiplies on its way, of a model of these ModelArgs.

    Those of the blocks, and of the output matrix the share of tokens that predict an answer's; embedding and norms
    multiply no matrix.
    """
    D, K = args.dim, args.dim // args.n_heads * args.n_kv_heads
    return args.n_layers * (2 * D * D + 2 * D * K + 3 * D * args.hidden_dim) + round(answer_share * D * args.vocab_size)


def flop_a_token(P, full=False, checkpointing=False):
    """2 P forward, 2 P back to the activations, 2 P to the weights where they are trained, 2 P for the forward again.

    A rule of thumb: a LoRA's own products, r wide, and attention's are left out, and with checkpointing torch stops the
    second forward of a block before w2's product, which nothing needs, and that of the head is never made again.
    """
    return (4 + 2 * full + 2 * checkpointing) * P


def matmul_peak(dtype, device, sizes=None, repeats=5):
    """FLOP/s of the fastest of a few square products of random matrices, each the median of `repeats` after one more."""
    best = 0.0
    for n in sizes or ((1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384)):
        a, b, seconds = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype), []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            c = a @ b
            c[0, 0].item()                                               # waits for the GPU
            seconds.append(time.perf_counter() - began)
        best = max(best, 2 * n ** 3 / statistics.median(seconds[1:]))
    return best
