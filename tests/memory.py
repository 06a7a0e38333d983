"""How many bytes of tensors are alive, counted as CUDA's allocator does, on any device.

python -m tests.memory --max-steps 1 --out out/measured     train.py with these flags, and its peak
"""
import functools
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train


class LiveBytes(TorchDispatchMode):
    """Count the bytes of `tensors` and of what operations make in the block.

    live: those that are alive now.  peak: their maximum.
    """

    def __init__(self, tensors=()):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.storages = {}
        self.count(tensors)

    def count(self, tree):
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.storages:
                forget = functools.partial(self.forget, key, storage.nbytes())
                self.storages[key] = weakref.ref(storage, forget)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)

    def forget(self, key, n_bytes, _):
        del self.storages[key]
        self.live -= n_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(out)
        return out


def saved_bytes(model, loss):
    """Return (loss(), bytes that autograd keeps for backward, the model's own tensors apart)."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage       # It stays alive, so no address comes twice.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    return value, sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    with LiveBytes() as memory:
        train.main(sys.argv[1:])
    print(f"measured  {memory.peak / 2 ** 20:,.1f} MiB of tensors at the peak")
