"""The attention of all examples of a packed row in one call, on GPUs that have it.

Layout.attend's own way is a call per segment and block.  On a GPU their launches take longer than
their work: of a 7B's 7,000 kernels for 32 examples they are 4,000.
"""
import inspect
from typing import NamedTuple

import torch

try:
    from torch.nn.attention.varlen import varlen_attn
    OPTIONS = tuple(inspect.signature(varlen_attn).parameters)
except ImportError:
    OPTIONS = ()             # torch is older than 2.10.

WIDEST_HEAD = 256


def takes_one_call(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Return whether varlen_attn computes q (1, N, H, hd) and k.

    It does in 16 bits, from Ampere on, for heads as wide as FlashAttention 2 takes.
    """
    head_dim = q.shape[3]
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if head_dim % 8 or head_dim > WIDEST_HEAD:
        return False
    needed = {"window_size"}                         # torch 2.11 has it.
    if q.shape[2] > k.shape[2]:
        needed.add("enable_gqa")                     # torch 2.12 has it.
    return needed <= set(OPTIONS) and torch.cuda.get_device_capability(q.device) >= (8, 0)


class OneCall(NamedTuple):
    """What varlen_attn asks for.

    keys: the places in the row of the keys that the segments read, one segment after another.
    query_bounds, key_bounds (segments + 1,) int32: where the queries and the keys of each begin,
    and the end.  most_queries, most_keys: of a segment.
    """
    keys: torch.Tensor
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, segments: list) -> "OneCall":
        """Return the call of these segments, (length, context), as Layout has them."""
        lengths = [length for length, _ in segments]
        places = torch.arange(sum(lengths)).split(lengths)
        keys = []
        for i, (_, context) in enumerate(segments):
            keys.append(torch.cat([places[j] for j in (*context, i)]))
        n_keys = [len(part) for part in keys]
        return cls(torch.cat(keys), bounds(lengths), bounds(n_keys), max(lengths), max(n_keys))

    def copied(self, copy_of) -> "OneCall":
        """Return a copy with copy_of(tensor) in place of each tensor."""
        return self._replace(keys=copy_of(self.keys), query_bounds=copy_of(self.query_bounds),
                             key_bounds=copy_of(self.key_bounds))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return what Layout.attend does.

        varlen_attn's last query sees the last key, so a segment sees its context as a whole.
        """
        keys, *bounds_and_sizes = self
        if len(keys) > q.shape[1]:                   # Some beginning is read more than once.
            k, v = (z[:, keys] for z in (k, v))
        gqa = {"enable_gqa": True} if q.shape[2] > k.shape[2] else {}
        y = varlen_attn(q[0], k[0], v[0], *bounds_and_sizes, window_size=(-1, 0), **gqa)
        return y[None]


def bounds(lengths: list) -> torch.Tensor:
    """Return where each of these parts begins when they stand in a row, and the end: int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
