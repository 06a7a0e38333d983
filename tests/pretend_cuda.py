"""A CUDA device that is not there: what our programs would ask of it, on a machine without a GPU.

    python -m tests.pretend_cuda train --layers 1 --max-steps 2 -- generate --instruction Say

Runs each command line (they are separated by --) and prints one line of JSON for each: {exit,
error, waits, other_waits, bytes, products, kernels, text}.  The CPU's tensors are real.  Those on
"cuda" are shapes, dtypes and devices alone (torch's FakeTensor), so a 7B needs no memory, and no
number that comes back from the device means anything.

A torch built for CPUs lacks two things for that: a current device, and someone who says that it is
there.  They are 30 lines of C++, which are compiled once, in some seconds, and must be loaded
before torch is; hence a process of its own.  PRETEND_CUDA names the file to keep them in.
"""
import contextlib
import ctypes
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

STUB = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct Guard : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream getNewStream(Device d, int) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def load_stub():
    """Compile STUB, unless PRETEND_CUDA names a file that exists, and load it."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(os.environ.get("PRETEND_CUDA", f"{folder}/stub.so"))
        if not library.exists():
            source = Path(folder, "stub.cpp")
            source.write_text(STUB)
            compiler = [os.environ.get("CXX", "g++"), "-O0", "-shared", "-fPIC", "-std=c++20"]
            links = [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
                     f"-Wl,-rpath,{torch_folder}/lib"]
            include = f"-I{torch_folder}/include"
            subprocess.run([*compiler, include, source, "-o", library, *links], check=True)
        ctypes.CDLL(str(library))


if __name__ == "__main__":
    load_stub()                                      # before torch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import generate
import train
from benchmarks import on_gpu, runs

from .helpers import ROOT

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
HOST_NEEDS_THE_SIZE = (aten.nonzero, aten.equal, aten.masked_select, aten._unique2)
# The fused operations have no fake form, and no shapes to check.
WITHOUT_A_RESULT = (aten._fused_adamw_, aten._amp_foreach_non_finite_check_and_unscale_)
NO_KERNEL = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view,
             aten.new_empty_strided, aten.lift_fresh, aten.is_pinned)
BACKWARD_OF_ATTENTION = 3                            # kernels: flash's, and the efficient one's


def is_on(kind, *things):
    return any(isinstance(thing, torch.Tensor) and thing.device.type == kind for thing in things)


def n_kernels(func):
    """Return how many kernels an operation launches, about: none for a view."""
    returns = func._schema.returns
    views = [each.alias_info is not None and not each.alias_info.is_write for each in returns]
    if func.namespace == "prim" or func.overloadpacket in NO_KERNEL or any(views):
        return 0
    is_attention = "attention_backward" in str(func) or "attn_backward" in str(func)
    return BACKWARD_OF_ATTENTION if is_attention else 1


def place():
    """Return the innermost line of our code that is running."""
    for frame in reversed(traceback.extract_stack()):
        is_ours = frame.filename.startswith(str(ROOT))
        if is_ours and not frame.filename.startswith(str(ROOT / "tests")):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "?"


class Pretended(TorchDispatchMode):
    """Every operation on the pretended device passes here.

    waits: what made the host wait for the device within `micro_batches`.  other_waits: elsewhere.
    products: {dtype: number} of products in micro-batches.  kernels: of each micro-batch.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.is_busy = False                         # in a micro-batch
        self.pinned = set()                          # addresses
        self.reset()

    def reset(self):
        self.waits = Counter()
        self.other_waits = Counter()
        self.products = Counter()
        self.kernels = []
        self.n_kernels = 0
        self.n_bytes = 0                             # copied to the CPU

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def wait(self, what):
        waits = self.waits if self.is_busy else self.other_waits
        waits[f"{what} at {place()}"] += 1

    def micro_batches(self, accumulate):
        """Return train.accumulate_gradients, watched."""
        def watched(model, loss_fn, window, precision, ranks):
            self.is_busy = True
            before = self.n_kernels
            try:
                return accumulate(model, loss_fn, window, precision, ranks)
            finally:
                self.is_busy = False
                self.kernels.append((self.n_kernels - before) // len(window.batches))
        return watched

    def pin(self, tensor):
        self.pinned.add(tensor.data_ptr())
        return tensor

    def fused(self, function, **_):
        """Return a function whose kernels count as one, as after torch.compile."""
        def run(*args):
            before = self.n_kernels
            result = function(*args)
            self.n_kernels = before + 1
            return result
        return run

    def count(self, func, args):
        self.n_kernels += n_kernels(func)
        if func.overloadpacket in PRODUCTS and self.is_busy:
            self.products[str(args[-1].dtype).removeprefix("torch.")] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        packet = func.overloadpacket
        is_here = is_on("cuda", *leaves)
        target = kwargs.get("device")
        if not is_here and (target is None or torch.device(target).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)         # The CPU's own work is done.
        if packet in (aten._local_scalar_dense, aten.item, aten.is_nonzero):
            self.wait("item")
            if args[0].dtype == torch.bool or packet is aten.is_nonzero:
                return True
            return 0.0 if args[0].is_floating_point() else 0
        if packet in HOST_NEEDS_THE_SIZE:
            self.wait(str(packet))
            if packet is aten.equal:
                return True
        if packet is aten.index and is_on("cpu", *leaves):
            self.wait("an index on the CPU")         # torch takes it, and copies it.
        if packet in WITHOUT_A_RESULT:
            return None
        if packet is aten._amp_update_scale_:
            return args[0]
        if packet is aten.copy_ and not is_on("cuda", args[0]):
            self.wait("a copy to the CPU")
            return args[0]
        if packet is aten.copy_ and not is_on("cuda", args[1]):
            self.count(func, args)
            return args[0]
        if not is_here:                              # from the CPU to the device
            if packet is aten._to_copy and args[0].data_ptr() not in self.pinned:
                self.wait("a copy from memory that is not pinned")
            args = tree_map(self.arrived, args)
        out = func(*args, **kwargs)
        self.count(func, args)
        if is_on("cpu", out):
            self.wait("a copy to the CPU")
            self.n_bytes += out.nbytes
            return real(out)
        return out

    def arrived(self, thing):
        return self.fake.from_tensor(thing) if isinstance(thing, torch.Tensor) else thing


def real(thing):
    """Return numbers in place of a tensor on the pretended device; all else as it is."""
    if not isinstance(thing, FakeTensor):
        return thing
    # Probabilities of tokens must not be 0.  Of two numbers, beside a loss, 1 is a stop signal.
    value = 1 if thing.is_floating_point() and thing.numel() > 2 else 0
    with unset_fake_temporarily():
        return torch.full(thing.shape, value, dtype=thing.dtype)


def attention(sdpa):
    """Return scaled_dot_product_attention with the kernels that CUDA takes without cuDNN."""
    def pretended(q, k, v, mask=None, dropout=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not is_on("cuda", q):
            return sdpa(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa)
        assert q.dtype == k.dtype == v.dtype, "attention of two dtypes"
        assert is_on("cuda", k) and is_on("cuda", v), "attention on two devices"
        if torch.backends.cuda.cudnn_sdp_enabled():
            raise RuntimeError(f"cuDNN plans attention anew for {q.shape[2]} x {k.shape[2]}")
        if mask is None and q.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        if mask is not None:
            assert is_on("cuda", mask), "a mask on another device"
            assert mask.shape[-2:] == (q.shape[2], k.shape[2])
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            assert mask.dtype == q.dtype, "a mask of another dtype"
            mask = mask.expand(q.shape[0], q.shape[1], *mask.shape[-2:])
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal)[0]
    return pretended


def rms_norm(function):
    """Return F.rms_norm with CUDA's one kernel, which a torch for CPUs takes apart."""
    def pretended(x, shape, weight=None, eps=None):
        is_fused = is_on("cuda", x) and not torch.is_autocast_enabled("cuda")
        if is_fused and weight is not None and x.dtype == weight.dtype:
            return x * weight                        # of the same shape, in one kernel
        return function(x, shape, weight, eps)
    return pretended


def outside(function):
    """Return a function of the CPU's alone, which torch would otherwise pretend too."""
    def run(*args, **kwargs):
        args = tree_map(real, args)
        with unset_fake_temporarily():
            return function(*args, **kwargs)
    return run


def pretend(mode):
    """Let torch find the device.  In a process of its own, so nothing is set back."""
    numpy = torch.Tensor.numpy

    def as_numpy(tensor, *, force=False):
        return numpy(real(tensor.detach()), force=force)

    def nothing(*_, **__):
        return None

    patches = {
        torch.cuda: {
            "is_available": lambda: True,
            "set_device": nothing,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "synchronize": nothing,
            "get_device_name": lambda *_: "a pretended GPU",
            "get_device_capability": lambda *_: (9, 0),
            "is_bf16_supported": lambda *_, **__: True,
            "max_memory_allocated": lambda *_: 0,
            "reset_peak_memory_stats": nothing,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": nothing,
        },
        torch.cuda.amp.common: {"amp_definitely_not_available": lambda: False},
        torch.Tensor: {
            "pin_memory": lambda tensor, *_: mode.pin(tensor),
            "numpy": as_numpy,
            "__format__": lambda tensor, form: format(tensor.item(), form),
        },
        FakeTensorMode: {"avoid_device_init": True},
        FakeTensor: {"tolist": lambda tensor: tensor.cpu().tolist()},
        torch: {"save": outside(torch.save), "load": outside(torch.load), "compile": mode.fused},
        F: {"scaled_dot_product_attention": attention(F.scaled_dot_product_attention),
            "rms_norm": rms_norm(F.rms_norm)},
    }
    for owner, values in patches.items():
        for name, value in values.items():
            setattr(owner, name, value)


def shape_7b(flags):
    """Train 32 examples as long as Alpaca's per micro-batch, with random weights in 7B's shape."""
    with tempfile.TemporaryDirectory() as folder:
        shape = runs.shape_folder("7b", Path(folder))
        common = ["--checkpoint", shape, "--init", "random", "--batch-size", "32",
                  "--accumulation-steps", "1", "--device", "cuda"]
        workload = runs.Workload([*common, *flags], None, warm=0, steps=1, repeats=1)
        print(runs.measure_run(workload)["tokens_per_second"])


def on_the_device(main):
    return lambda flags: main(["--device", "cuda", *flags])


def answer(mode, function, flags):
    """Call function(flags) on the pretended device; return what was asked of it."""
    mode.reset()
    result = {"exit": 0, "error": ""}
    printed = io.StringIO()
    with mode, contextlib.redirect_stdout(printed):
        try:
            function(flags)
        except SystemExit as left:
            result["exit"] = left.code
        except Exception as error:
            lines = str(error).splitlines() or [""]
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames
                    if frame.filename.startswith(str(ROOT))]
            result["error"] = f"{type(error).__name__}: {lines[0]} at {' < '.join(ours[::-1][:6])}"
    return result | {"waits": mode.waits, "other_waits": mode.other_waits, "kernels": mode.kernels,
                     "products": mode.products, "bytes": mode.n_bytes,
                     "text": printed.getvalue()[-2000:]}


def command_lines(words):
    """Return the command lines of words that -- separates."""
    lines = [[]]
    for word in words:
        if word == "--":
            lines.append([])
        else:
            lines[-1].append(word)
    return lines


def main():
    mode = Pretended()
    pretend(mode)
    train.accumulate_gradients = mode.micro_batches(train.accumulate_gradients)
    programs = {"train": on_the_device(train.main), "generate": on_the_device(generate.main),
                "shape_7b": shape_7b, "cell": lambda words: on_gpu.main(words, on_gpu.PRETENDED)}
    for name, *flags in command_lines(sys.argv[1:]):
        print(json.dumps(answer(mode, programs[name], flags)), flush=True)
    os._exit(0)                                      # The device's threads never end.


if __name__ == "__main__":
    main()
