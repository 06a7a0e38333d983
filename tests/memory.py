"""How many bytes of tensors are alive, counted as CUDA's allocator does, on any device.

    python -m tests.memory --max-steps 1 --out out/measured     train.py with these flags, then the peak it really had
"""
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within the block `live` counts the bytes of `held` and of what operations make, `peak` their maximum."""

    def __init__(self, held=()):
        super().__init__()
        self.live = self.peak = 0
        self.storages = {}
        self.count(held)

    def count(self, tree):
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.storages:
                    self.storages[key] = weakref.ref(storage, lambda _, key=key, size=size: self.gone(key, size))
                    self.live += size
                    self.peak = max(self.peak, self.live)

    def gone(self, key, size):
        del self.storages[key]
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(out)
        return out


def saved_bytes(model, loss):
    """(loss(), bytes that autograd keeps for its backward pass, the model's own tensors apart)."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage                           # held, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    return value, sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    import train
    with LiveBytes() as memory:
        train.main(sys.argv[1:])
    print(f"measured  {memory.peak / 2 ** 20:,.1f} MiB of tensors at the peak")
