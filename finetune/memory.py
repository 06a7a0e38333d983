"""How much memory a step takes, by arithmetic on shapes; and what helps when it is not enough."""
from collections.abc import Callable
from typing import NamedTuple

import torch

from llama.layout import SHORT_CONTEXT

from .arguments import as_flag
from .dataset import count_answer
from .errors import GAVE_UP, exit_with_line, is_out_of_memory
from .loss import CHUNK

MIB = 2 ** 20
FP32 = 4                                             # bytes
RESUME_HINT = ("; --resume continues from the last save, if any, also with another --batch-size or "
               "--checkpointing")


class Size(NamedTuple):
    """Size of a micro-batch.

    pairs: number of (query, key) pairs; a CPU keeps their scores for short examples
    (llama/layout.py).
    """
    tokens: int
    answers: int
    pairs: int


def micro_batch_sizes(dataset, plan) -> dict:
    """Return {micro-batch of the plan, as a tuple of indices: Size}."""
    rows = []
    for tokens, labels in dataset.rows:
        pairs = len(tokens) ** 2 if len(tokens) <= SHORT_CONTEXT else 0
        rows.append(Size(len(tokens), count_answer(labels), pairs))
    sizes = {}
    for _, ranks in plan:
        for batches in ranks:
            for batch in batches:
                sizes[tuple(batch)] = total_size([rows[i] for i in batch])
    return sizes


def total_size(rows: list) -> Size:
    """Return the size of a micro-batch with these rows, each given by its own Size."""
    return Size(sum(row.tokens for row in rows), sum(row.answers for row in rows),
                sum(row.pairs for row in rows))


def largest_batch_rows(dataset, plan) -> list:
    """Return the rows of the largest micro-batch, the first to run out of memory."""
    sizes = micro_batch_sizes(dataset, plan)
    indices = max(sizes, key=lambda batch: sizes[batch].tokens + sizes[batch].answers)
    return [dataset[i] for i in indices]


def largest_size(dataset, plan) -> Size:
    """Return the maximum of each size over the plan's micro-batches.

    The three maxima may come from different micro-batches.
    """
    sizes = micro_batch_sizes(dataset, plan).values()
    return Size(max(size.tokens for size in sizes), max(size.answers for size in sizes),
                max(size.pairs for size in sizes))


def memory_of_a_step(job):
    """Return a rank's estimate for the plan's largest micro-batch, plus the teacher's part."""
    size = largest_size(job.train_set, job.plan)
    bytes_by_kind, where = estimate_memory(job.model, job.adapter_paths, size, job.precision,
                                           job.ranks.size, job.optimizer_bytes_per_parameter)
    bytes_by_kind = job.sharding.bytes_of_rank(bytes_by_kind, job.model)
    if job.distillation:
        student = bytes_by_kind["activations"] + bytes_by_kind["logits"]
        itemsize = job.precision.dtype.itemsize
        teacher = job.distillation.memory(size.tokens, size.answers, itemsize, student)
        teacher = job.sharding.of_teacher().bytes_of_rank(teacher, job.distillation.teacher)
        if "gathered" in bytes_by_kind:              # One model at a time gathers its blocks.
            teacher["gathered"] = max(bytes_by_kind["gathered"], teacher["gathered"])
        bytes_by_kind |= teacher
    return bytes_by_kind, where


def estimate_memory(model, adapter_paths, size: Size, precision, world_size: int = 1,
                    state_bytes: float = 8):
    """Return (bytes by kind at the peak of a step, where that peak is), without any weights.

    Computed from shapes alone: model may be on the meta device.  size: of the largest micro-batch.
    state_bytes: of the optimizer, per trained number (8 for AdamW's two moments).

    The peak is at the logits or in a block.  At the logits backward holds them, their gradient and
    two fp32 tensors of a chunk's size (log-softmax, its gradient), and in 16 bit a third (the
    logits in fp32).  In a block it holds
    three gradients of SwiGLU's width and, with checkpointing, what that block has just computed
    again.  What the process itself takes, some 300 MiB on a CPU, is not counted.
    """
    itemsize = precision.dtype.itemsize
    parameters = list(model.parameters())
    trained = [p.numel() for p in parameters if p.requires_grad]
    kept, block_temporaries = activation_bytes(model, adapter_paths, size, precision)
    # Each logit and its gradient; per chunk also fp32 softmax, its gradient and, in 16 bit, an
    # fp32 copy.
    per_chunk_logit = 12 if itemsize < FP32 else 8
    logits_bytes = 2 * size.answers * itemsize + min(size.answers, CHUNK) * per_chunk_logit
    logits_bytes *= model.args.vocab_size
    weights = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))
    if not adapter_paths and itemsize < FP32:       # autocast's copies, kept until backward
        weights += itemsize * sum(p.numel() for p in parameters if p.dim() == 2)
    # A quantised matrix of a block is dequantised, through fp32, only during its multiplication.
    quantised = [m for m in model.modules() if hasattr(m, "dequantize")]
    sizes = [layer.in_features * layer.out_features for layer in quantised]
    dequantised = max(sizes, default=0) * (itemsize + FP32)
    copies = 2 if world_size > 1 else 1              # DDP's buckets are a second copy.
    peak_is_in_block = block_temporaries + dequantised > logits_bytes
    bytes_by_kind = {
        "weights": weights + (dequantised if peak_is_in_block else 0),
        # Plus the largest gradient once more: a micro-batch's, before it is added.
        "gradients": FP32 * (sum(trained) * copies + max(trained)),
        "optimizer": round(state_bytes * sum(trained)),
        "activations": kept + (block_temporaries if peak_is_in_block else 0),
        "logits": 0 if peak_is_in_block else logits_bytes,
    }
    return bytes_by_kind, "in a block" if peak_is_in_block else "at the logits"


def activation_bytes(model, adapter_paths, size: Size, precision):
    """Return (bytes that all blocks keep for backward, temporary bytes within one block)."""
    args = model.args
    itemsize = precision.dtype.itemsize
    on_cpu = precision.device.type == "cpu"
    first_block_adapters = {path.rpartition(".")[2]: model.get_submodule(path)
                            for path in adapter_paths if path.startswith("layers.0.")}
    dropout = any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    if hasattr(model, "block_bytes"):                # The model is recurrent and knows its own.
        per_token = model.block_bytes(itemsize)
    else:
        adapters = first_block_adapters if adapter_paths else None
        per_token = block_bytes(args, itemsize, adapters, dropout, on_cpu)
    block = size.tokens * per_token
    if on_cpu:
        block += args.n_heads * size.pairs * itemsize
    # Frozen tensors of a method that are wider than the compute dtype are cast at each use, and the
    # copy is kept.
    for layer in first_block_adapters.values():
        for parameter in layer.parameters(recurse=False):
            if not parameter.requires_grad and parameter.element_size() > itemsize:
                block += itemsize * parameter.numel()
    block_temporaries = 3 * size.tokens * args.hidden_dim * itemsize
    if set(adapter_paths) == {"output"}:
        # Nothing before it is trained, so no block keeps anything for backward.
        return 3 * size.tokens * args.dim * itemsize, block_temporaries
    if model.checkpointing:
        residual_bytes = FP32 if not adapter_paths else itemsize
        return args.n_layers * size.tokens * args.dim * residual_bytes, block_temporaries + block
    return args.n_layers * block, block_temporaries


def block_bytes(args, itemsize: int, adapters: dict | None, dropout: bool, on_cpu: bool) -> int:
    """Return the bytes per token that one transformer block keeps for its backward pass.

    itemsize: of the compute dtype.  adapters: {name: adapter layer} of the block; None for full
    fine-tuning.
    """
    D = args.dim
    K = args.dim // args.n_heads * args.n_kv_heads
    F = args.hidden_dim
    norms = 2 * D * (FP32 if on_cpu else itemsize)   # Their inputs; torch's CPU norm keeps fp32.
    attention = (2 * D + 2 * K) * itemsize + FP32 * args.n_heads  # q, k, v, result; log-sum-exps
    swiglu = 3 * F * itemsize                        # w1 x, silu(w1 x), w3 x
    # What each matrix reads, and how wide that is.
    input_of = {"wq": ("normed", D), "wk": ("normed", D), "wv": ("normed", D),
                "wo": ("result", D), "w1": ("normed h", D), "w3": ("normed h", D),
                "w2": ("product", F)}
    keeping_layers = list(input_of)
    if adapters is not None:
        keeping_layers = [name for name, layer in adapters.items() if layer.keeps_input]
    if dropout:                                      # Each adapter keeps its own input and a mask.
        mask = itemsize if on_cpu else 1
        inputs = sum(itemsize * input_of[name][1] for name in keeping_layers)
        inputs += sum(mask * input_of[name][1] for name in adapters)
    else:            # Layers that read the same tensor share it; attention's result is counted.
        different = {input_of[name] for name in keeping_layers} - {("result", D)}
        inputs = sum(itemsize * size for _, size in different)
    kept = norms + attention + swiglu + inputs
    if adapters is None:
        if itemsize < FP32:
            kept += 2 * D * FP32                     # With autocast norms also return fp32.
        return kept
    for layer in adapters.values():
        kept += itemsize * (layer.r + layer.keeps_results * layer.base.out_features)
    return kept


def optimizer_state_bytes(build: Callable) -> float:
    """Return the bytes of state per trained number of the optimizer that build(groups) makes.

    Measured on one step over a small matrix, so it holds for any optimizer whose state grows with
    the parameters.
    """
    stand_in = torch.zeros(64, 64, requires_grad=True)
    stand_in.grad = torch.zeros(64, 64)
    optimizer = build([{"params": [stand_in]}])
    optimizer.step()
    state = optimizer.state[stand_in].values()
    tensors = [value for value in state if torch.is_tensor(value) and value.dim() > 0]
    return sum(tensor.nbytes for tensor in tensors) / stand_in.numel()


class OutOfMemoryAdvice:
    """A context manager: on an out-of-memory error print one line of remedies and exit with 3.

    estimate(job, **changes): the bytes of a step with these options changed.
    """

    def __init__(self, job, estimate: Callable):
        self.job = job
        self.estimate = estimate

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not is_out_of_memory(error):
            return
        line = (str(error).splitlines() or ["out of memory"])[0]
        line = line.rpartition("err == 0. ")[2]      # without the source line that torch names
        cause = ". ".join(line.split(". ")[:2])      # What was asked for; addresses follow it.
        advice = [f"{flags} (by estimate {mib(less)} MiB less)"
                  for flags, less in memory_advice(self.job, self.estimate)]
        remedy = ", ".join(advice) or "a smaller base or a larger device"
        exit_with_line(f"train.py: {cause}; try {remedy}{RESUME_HINT}", GAVE_UP)


def memory_advice(job, estimate: Callable) -> list:
    """Return [(flags, bytes less)]: what would lower the estimate, the most effective first.

    estimate(job, **changes): the bytes of a step with these options changed.
    """
    options = job.options
    candidates = []
    if not options.checkpointing:
        candidates.append({"checkpointing": True})
    if job.precision.name == "fp32":
        candidates.append({"precision": "bf16"})
    # About the same examples per step, in smaller parts.
    largest = largest_batch_rows(job.train_set, job.plan)
    if options.tokens_per_batch:
        n_tokens = sum(len(tokens) for tokens, _ in largest)
        limit = options.tokens_per_batch
        if limit // 2 >= n_tokens:                   # Half of it holds the largest one too.
            limit = n_tokens
        candidates.append({"tokens_per_batch": max(1, limit // 2),
                           "accumulation_steps": 2 * options.accumulation_steps})
    elif len(largest) > 1:
        smaller = max(n for n in range(1, len(largest)) if options.batch_size % n == 0)
        micro_batches = options.accumulation_steps * options.batch_size // smaller
        candidates.append({"batch_size": smaller, "accumulation_steps": micro_batches})
    is_recurrent = hasattr(job.model, "block_bytes")
    if not is_recurrent:                             # An RNN can use none of these.
        if job.ranks.size > 1 and job.sharding.size == 1:
            candidates.append({"shard": job.ranks.size})
        if not job.lora:
            candidates.append({"method": "lora"})
        elif job.quantize == "none" and job.lora.method != "delta-lora":
            candidates.append({"quantize": "nf4"})
    now = estimate(job)
    advice = []
    for changes in candidates:
        flags = " ".join(as_flag(name, value) for name, value in changes.items())
        advice.append((flags, now - estimate(job, **changes)))
    helpful = [item for item in advice if item[1] > 0]
    return sorted(helpful, key=lambda item: -item[1])


def mib(size) -> str:
    digits = 0 if size >= 100 * MIB else 1
    return f"{size / MIB:,.{digits}f}"
