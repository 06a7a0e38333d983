"""--shard: a base larger than one GPU.  torch's FSDP2 cuts it over ranks, DDP keeps the adapter.

Each rank of a copy holds a part of each block.  Before a block computes, the ranks gather it, and
free it afterwards.  All ranks must call each forward and each `full_tensor()`: if one rank skips a
call, the others wait for ever.  docs/sharding.md has the whole picture.
"""
import itertools
import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llama.checkpoint import tie_output
from llama.files import whole
from llama.model import Transformer
from llama.rnn import RNNArgs
from lora.adapter import is_lora

from .ranks import SINGLE_PROCESS, Ranks

RANKS_OF_MACHINE = 0                                 # --shard without N: the ranks of a machine


@dataclass(frozen=True)
class Sharding:
    """How ranks share a base: `size` ranks hold one copy; 1 means that each rank holds it whole.

    ranks: the run's; in a dry run of a single process, the planned ones.
    trains_base: whether the base that is cut is trained (--method full).
    mesh: torch's arrangement of the ranks, (copies, size); None until `connected`.
    """
    ranks: Ranks
    size: int = 1
    trains_base: bool = False
    mesh: DeviceMesh | None = None

    @classmethod
    def planned(cls, size: int | None, ranks: Ranks, args, dry_run: bool = False,
                trains_base: bool = False) -> "Sharding":
        """Return the Sharding for --shard and these model sizes.

        size: RANKS_OF_MACHINE or the number that was given; None without --shard.  args: the
        model's sizes.  Raises ValueError if these ranks or this model cannot be sharded.
        """
        if size is None:
            return cls(ranks)
        if isinstance(args, RNNArgs):
            raise ValueError("--shard cuts the blocks of a transformer, and this model is "
                             "recurrent: leave --shard out")
        if size == RANKS_OF_MACHINE:
            size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if ranks.size == 1 and dry_run and size > 1:
            ranks = replace(ranks, size=size)        # A dry run needs no other process.
        if size == 1 and ranks.size > 1:
            raise ValueError("--shard cuts the base over the ranks of a machine, and each has one: "
                             f"give --shard {ranks.size} to cut it over all machines")
        if ranks.size == 1:
            raise ValueError("--shard cuts the base over several processes, and this is a single "
                             "one: start it with torchrun --nproc_per_node=N, or estimate with "
                             "train.py --dry-run --shard N")
        if ranks.size % size:
            raise ValueError(f"--shard {size} does not divide the {ranks.size} ranks: each copy of "
                             f"the base needs {size}")
        return cls(ranks, size, trains_base)

    @property
    def setting(self) -> int | None:
        """The number of ranks per copy, as args.json has it; None without --shard."""
        if self.size == 1:
            return None
        return self.size

    def connected(self, device: torch.device) -> "Sharding":
        """Return this Sharding with its mesh.  All ranks call this at the same point."""
        if self.size == 1:
            return self
        copies = self.ranks.size // self.size
        mesh = init_device_mesh(device.type, (copies, self.size),
                                mesh_dim_names=("copies", "shares"))
        return replace(self, mesh=mesh)

    def of_teacher(self) -> "Sharding":
        """Return how the teacher is shared: like a frozen base."""
        return replace(self, trains_base=False)

    def cut(self, block: nn.Module):
        """Keep this rank's part of a block that has been read; a frozen base is first frozen.

        FSDP cuts parameters only, so the codes and scales of a quantised layer become parameters.
        Those without dimensions cannot be cut.
        """
        if self.mesh is None:
            return
        if not self.trains_base:
            buffers_to_parameters(block)
            block.requires_grad_(False)
        uncut = {parameter for parameter in block.parameters() if parameter.dim() == 0}
        with codes_as_parameters():
            fully_shard(block, mesh=self.mesh_to_cut(), reshard_after_forward=True,
                        ignored_params=uncut)

    def cut_root(self, model: nn.Module):
        """Make a model the root of its blocks, when all of them are cut.

        Embedding, norm and output of a frozen base stay whole on each rank: distillation calls the
        output outside of forward.
        """
        if self.mesh is None:
            return
        rest = set()
        if not self.trains_base:
            for part in (model.tok_embeddings, model.norm, model.output):
                rest |= set(part.parameters())
        fully_shard(model, mesh=self.mesh_to_cut(), reshard_after_forward=True, ignored_params=rest)
        self.ranks.exchange()        # A rank that could not read a block ends all here.

    def mesh_to_cut(self) -> DeviceMesh:
        """Return the mesh for FSDP: gradients of a trained base are reduced over copies too."""
        if self.trains_base and self.size < self.ranks.size:
            return self.mesh
        return self.mesh["shares"]

    def wrapped(self, model: nn.Module) -> nn.Module:
        """Return the model to train with: its gradients are means over the ranks.

        DDP expects a gradient of every parameter that is trainable when it wraps the model, so the
        base must be frozen before.
        """
        if self.mesh is not None and self.trains_base:
            # FSDP reduces each micro-batch.  To wait for the last one, each rank would have to hold
            # the whole gradient.
            model.no_sync = nullcontext
            return model
        if self.ranks.size == 1:
            return model
        # init_sync would copy rank 0's tensors to all ranks, and cannot copy cut ones.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True,
                                       init_sync=self.mesh is None)

    def keep_in_step(self, model: nn.Module):
        """Let every forward return rank 0's result on all ranks, so that all choose the same token.

        Ranks that chose differently would run other forwards, and wait for ever.
        """
        if self.mesh is not None:
            model.register_forward_hook(lambda _model, _inputs, logits: from_rank_0(logits))

    def bytes_of_rank(self, bytes_by_kind: dict, model: nn.Module) -> dict:
        """Return one rank's bytes by kind, from those of a rank that holds the whole model.

        Of a trained base each rank also has a part of each gradient and of the optimizer's state.
        A gradient is whole until it is reduced, as long as its weight is gathered.
        """
        if self.size == 1:
            return bytes_by_kind
        of_base = cut_bytes(model, self.size, self.trains_base)
        bytes_by_kind = dict(bytes_by_kind)
        bytes_by_kind["gathered"] = of_base.gathered
        if self.trains_base:
            bytes_by_kind["gradients"] = of_base.share + of_base.gathered
            bytes_by_kind["optimizer"] = bytes_by_kind["optimizer"] * of_base.share // of_base.whole
        weights = "weights" if "weights" in bytes_by_kind else "teacher"
        bytes_by_kind[weights] += of_base.share - of_base.whole
        return bytes_by_kind

    def line(self, model: nn.Module, state_bytes: float) -> str:
        """Return how many copies of the base there are, and what rank 0 needs to save a whole one.

        state_bytes: of the optimizer, per trained number.
        """
        copies = self.ranks.size // self.size
        copy = "1 copy" if copies == 1 else f"{copies} copies"
        line = f"{copy} of the base, cut over {self.size} ranks"
        if self.trains_base:
            # Trained numbers are in fp32.
            n_bytes = (4 + state_bytes) * sum(p.numel() for p in model.parameters())
            line += ("; a save puts model and optimizer together in rank 0's main memory, "
                     f"{n_bytes / 2 ** 20:,.1f} MiB")
        return line

    def whole_model(self, model: nn.Module) -> nn.Module | None:
        """Return the model to write: a whole one on the CPU of rank 0, None on others.

        All ranks call this.  A model whose trained part is not cut is returned as it is, also on
        other ranks.
        """
        if self.mesh is None or not self.trains_base:
            return model
        state = whole_state(model.state_dict(), self.ranks.is_first)
        if not self.ranks.is_first:
            return None
        with torch.device("meta"):
            copy = Transformer(model.args)
        copy.load_state_dict(state, assign=True)
        tie_output(copy)
        return copy


UNSHARDED = Sharding(SINGLE_PROCESS)                 # one process, which holds the base whole


def from_rank_0(tensor: torch.Tensor) -> torch.Tensor:
    """Return rank 0's tensor.  All ranks call this."""
    tensor = tensor.contiguous()
    dist.broadcast(tensor, 0)
    return tensor


@contextmanager
def codes_as_parameters():
    """Let torch 2.11 cut codes too, within the block; later versions can by themselves.

    Its FSDP first makes a parameter that needs a gradient, which whole numbers cannot have.
    """
    if torch.__version__ >= "2.12":
        yield
        return
    new = nn.Parameter.__new__

    def without_gradient_of_codes(cls, data=None, requires_grad=True):
        return new(cls, data, requires_grad and data.is_floating_point())

    nn.Parameter.__new__ = without_gradient_of_codes
    try:
        yield
    finally:
        nn.Parameter.__new__ = new


def buffers_to_parameters(block: nn.Module):
    """Turn the buffers of a block that files store into frozen parameters, in their order."""
    for layer in block.modules():
        for name, buffer in list(layer.named_buffers(recurse=False)):
            if name not in layer._non_persistent_buffers_set:
                delattr(layer, name)
                layer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def clip_grad_norm_(parameters: list, max_norm: float) -> torch.Tensor:
    """Clip as torch's function does, and return the norm before it, over all ranks' parts."""
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm))


def whole_state(state, keeps: bool):
    """Return a state with whole tensors, on the CPU, in place of cut ones.  All ranks call this.

    keeps: whether this rank wants them; if not, it gets None in their place.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keeps else None
    if isinstance(state, dict):
        return {name: whole_state(value, keeps) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(value, keeps) for value in state)
    return state


def share_like(tensor: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a whole tensor, cut like `cut`, without communication."""
    if not isinstance(cut, DTensor) or tensor.shape != cut.shape:
        return tensor
    return distribute_tensor(tensor.to(cut.device), cut.device_mesh, cut.placements,
                             src_data_rank=None)


@dataclass(frozen=True)
class CutBytes:
    """What ranks hold of the tensors that are cut, in bytes.

    whole: all of them.  share: a rank's part.  gathered: the most that a rank holds whole at a
    time.  These are two blocks, one that computes and the next one on its way; with --method full
    embedding, norm and output too.
    """
    whole: int
    share: int
    gathered: int


def cut_bytes(model: nn.Module, size: int, trains_base: bool) -> CutBytes:
    """Return the CutBytes of a model cut over `size` ranks; it may be on the meta device."""
    tensors_by_part = [tensors_to_cut(block) for block in model.layers]
    gathered = max(map(total_bytes, tensors_by_part)) * min(2, len(tensors_by_part))
    if trains_base:
        in_blocks = set(model.layers.parameters())
        root = [parameter for parameter in model.parameters() if parameter not in in_blocks]
        tensors_by_part.append(root)
        gathered += total_bytes(root)
    tensors = list(itertools.chain.from_iterable(tensors_by_part))
    share = sum(share_bytes(tensor, size) for tensor in tensors)
    return CutBytes(total_bytes(tensors), share, gathered)


def tensors_to_cut(block: nn.Module) -> list[torch.Tensor]:
    """Return the tensors of a block that --shard cuts: those of the base."""
    return [tensor for name, tensor in block.state_dict().items()
            if tensor.dim() > 0 and not is_lora(name)]


def total_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def share_bytes(tensor: torch.Tensor, size: int) -> int:
    """Return the bytes of a rank's part of a tensor.  FSDP cuts rows and fills up the last part."""
    rows = len(tensor)
    return math.ceil(rows / size) * tensor.nbytes // rows
