"""Before step 1: say what is trained and what memory it takes, and refuse what cannot learn."""
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from llama.checkpoint import read_params
from llama.layout import SHORT_CONTEXT

from .batches import example_indices
from .dataset import count_answer
from .errors import GAVE_UP, exit_with_line, short_path, short_paths
from .evaluate import class_answers
from .loss import CHUNK
from .ranks import sum_over_ranks

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


def check_data(train_set, val_set, max_seq_len: int, names: tuple, folders: tuple):
    """Raise ValueError if eos is no target, or a row is longer than a model's context.

    Without eos the model would not learn to stop.  Beyond the context of its base, generate.py
    takes no prompt, and the base has never seen such positions.  folders: of base and teacher,
    where there is one.
    """
    if train_set.n_with_eos == 0:
        raise ValueError(f"{short_paths(names)}: no answer ends within {max_seq_len} tokens, so "
                         "eos is never a target and the model would not learn to stop; allow "
                         "longer rows with --max-seq-len")
    rows = train_set.rows + (val_set.rows if val_set else [])
    longest = max(len(tokens) for tokens, _ in rows)
    for folder in filter(None, folders):
        model_args, _ = read_params(folder)
        context = model_args.max_seq_len
        if longest > context:
            raise ValueError(f"the longest row has {longest:,} tokens, and {folder} looks back at "
                             f"most {context:,}; give --max-seq-len {context}, which truncates "
                             "such rows")


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


def check_gradients(model, adapter_paths, loss: Callable):
    """Back-propagate loss() once.  Raises ValueError if it is not finite or does not reach a part.

    Each adapter in adapter_paths must get a gradient in at least one tensor; without any, every
    trainable parameter must.  Gradients and train/eval mode are restored, and dropout is off, so
    nothing is drawn from torch's random state.  On the meta device values are not checked.
    """
    saved_grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    was_training = model.training
    parts = {path: list(model.get_submodule(path).parameters()) for path in adapter_paths}
    if not adapter_paths:
        trainable = [item for item in model.named_parameters() if item[1].requires_grad]
        parts = {name: [parameter] for name, parameter in trainable}
    try:
        model.zero_grad(set_to_none=True)
        model.eval()
        value = loss()
        if not value.is_meta and not value.isfinite():
            raise ValueError(f"the loss is {value.item()} before the first step: are the weight "
                             "files complete, and do they support this --precision?")
        value.backward()
        unreached = [path for path, tensors in parts.items() if not any(map(has_grad, tensors))]
        if unreached:
            others = " and others" if len(unreached) > 4 else ""
            raise ValueError(f"no gradient reaches {', '.join(unreached[:4])}{others}")
        if not value.is_meta and not any_gradient(model):
            raise ValueError("every gradient is zero before the first step: are the weight files "
                             "complete?")
        counted = plural(len(parts), "adapter" if adapter_paths else "parameter")
        print(f"checked   one backward pass: {counted}, each with a gradient (without one it would "
              "not learn)")
    finally:
        model.train(was_training)
        for parameter, grad in saved_grads:
            parameter.grad = grad


def has_grad(parameter) -> bool:
    return parameter.grad is not None


def any_gradient(model) -> bool:
    """Return whether any gradient on any rank has a value other than 0.

    With --shard, `any` of a cut gradient is that of this rank's part.
    """
    has_value = any(has_grad(p) and p.grad.any() for p in model.parameters())
    return sum_over_ranks(torch.tensor(float(has_value))).item() > 0


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


def estimate_memory(model, adapter_paths, size: Size, precision, world_size: int = 1,
                    state_bytes: float = 8):
    """Return (bytes by kind at the peak of a step, where that peak is), without any weights.

    Computed from shapes alone: model may be on the meta device.  size: of the largest micro-batch.
    state_bytes: of the optimizer, per trained number (8 for AdamW's two moments).

    The peak is at the logits or in a block.  At the logits backward holds them, their gradient and
    three fp32 tensors of a chunk's size (logits, log-softmax, its gradient).  In a block it holds
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
    if options.tokens_per_batch:
        candidates.append({"tokens_per_batch": max(1, options.tokens_per_batch // 2)})
    elif options.batch_size > 1:                     # The same examples per step, in smaller parts.
        smaller = max(n for n in range(1, options.batch_size) if options.batch_size % n == 0)
        micro_batches = options.accumulation_steps * options.batch_size // smaller
        candidates.append({"batch_size": smaller, "accumulation_steps": micro_batches})
    is_recurrent = hasattr(job.model, "block_bytes")
    if job.ranks.size > 1 and job.sharding.size == 1 and not is_recurrent:
        candidates.append({"shard": job.ranks.size})
    if not job.lora:
        candidates.append({"method": "lora"})
    elif job.quantize == "none" and job.lora.method != "delta-lora":
        candidates.append({"quantize": "nf4"})
    now = estimate(job)
    advice = [(as_flags(changes), now - estimate(job, **changes)) for changes in candidates]
    helpful = [item for item in advice if item[1] > 0]
    return sorted(helpful, key=lambda item: -item[1])


def as_flags(changes: dict) -> str:
    """Return changed options as they would stand on the command line."""
    words = []
    for name, value in changes.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return " ".join(words)


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


def is_out_of_memory(error) -> bool:
    """Return whether this is an out-of-memory error; torch often raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = "out of memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, RuntimeError) and bool(re.search(words, str(error).split("\n")[0]))


def mib(size) -> str:
    digits = 0 if size >= 100 * MIB else 1
    return f"{size / MIB:,.{digits}f}"


def plural(n: int, noun: str) -> str:
    """Return "1 layer", "2 layers" or "2 batches"."""
    if n != 1:
        noun += "es" if noun.endswith(("ch", "ss")) else "s"
    return f"{n:,} {noun}"


def describe(job):
    """Print the few lines that say what is trained, on what, and what memory it takes."""
    print(f"base      {base_line(job)}")
    print(f"data      {data_line(job)}")
    if job.tokenizer.eos_note:
        print(f"eos       {job.tokenizer.eos_note}")
    if job.val_set:
        print(f"held out  {held_out_line(job)}")
    print(f"{job.options.method if not job.lora else job.lora.method:<9} {method_line(job)}")
    print(f"steps     {steps_line(job)}")
    if job.distillation:
        print(f"teacher   {teacher_line(job)}")
        warn_of_template(job.distillation.adapter_template, job.template)
    if job.sharding.size > 1:
        print("shard    ", job.sharding.line(job.model, job.optimizer_bytes_per_parameter))
    bytes_by_kind, where = memory_of_a_step(job)
    per_rank = " per rank" if job.ranks.size > 1 else ""
    listed = ", ".join(f"{kind} {mib(size)}" for kind, size in bytes_by_kind.items())
    more = ""
    if job.precision.device.type != "cuda":
        more = "; the MiB in the lines below also count Python and torch themselves"
    print(f"memory    about {mib(sum(bytes_by_kind.values()))} MiB of tensors{per_rank}, "
          f"peak {where}: {listed}{more}", flush=True)


def base_line(job) -> str:
    options = job.options
    random = ", random" if options.init == "random" else ""
    number_format = job.precision.name
    if job.quantize != "none":
        number_format += f" and {job.quantize}"
    n_layers = plural(job.model.args.n_layers, "layer")
    return (f"{short_path(options.checkpoint)}: {n_layers}{random}, {number_format} on "
            f"{job.precision.device}")


def data_line(job) -> str:
    train_set = job.train_set
    longest = max(len(tokens) for tokens, _ in train_set.rows)
    n_examples = plural(len(train_set), "example")
    return (f"{short_paths(job.options.data)}: {n_examples}, the longest has {longest} tokens; "
            f"{fit_line(train_set, job.options.max_seq_len)}{empty_outputs(train_set)}")


def fit_line(dataset, max_seq_len: int) -> str:
    """Return how many examples were too long, and what became of them."""
    notes = []
    if dataset.cut_answers:
        notes.append(f"{plural(dataset.cut_answers, 'answer')} cut off at --max-seq-len "
                     f"{max_seq_len}, without the end that teaches the model to stop")
    if dataset.lost_turns:
        notes.append(f"{plural(dataset.lost_turns, 'turn')} left out, beyond --max-seq-len "
                     f"{max_seq_len}")
    if dataset.dropped:
        notes.append(f"{plural(dataset.dropped, 'example')} left out, because the prompt alone "
                     f"fills --max-seq-len {max_seq_len}")
    return "; ".join(notes) or f"every answer ends within --max-seq-len {max_seq_len}"


def held_out_line(job) -> str:
    val_set = job.val_set
    line = (f"{short_paths(job.options.val_data or job.options.data)}: "
            f"{plural(len(val_set), 'example')}; {fit_line(val_set, job.options.max_seq_len)}"
            f"{empty_outputs(val_set)}")
    choices = class_answers(val_set, job.options.max_seq_len)
    if choices:
        line += f"; answers of {len(choices)} classes"
    return line


def empty_outputs(dataset) -> str:
    """Return the number of empty outputs for the end of a line, if there are any."""
    if not dataset.n_empty:
        return ""
    return f"; {plural(dataset.n_empty, 'output')} empty"


def method_line(job) -> str:
    parameters = list(job.model.parameters())
    quantised = [m for m in job.model.modules() if hasattr(m, "dequantize")]
    total = sum(p.numel() for p in parameters)
    total += sum(layer.in_features * layer.out_features for layer in quantised)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    answers = sum(count_answer(labels) for _, labels in job.train_set.rows)
    line = (f"{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %), "
            f"which is {trained / answers:,.2f} per answer token")
    if not job.lora:
        return line
    lora = job.lora
    settings = "".join(f", {name} {value}" for name, value in lora.options.items())
    return (f"r {lora.r}, alpha {lora.alpha:g}{settings} on {','.join(lora.targets)}: "
            f"{plural(len(job.adapter_paths), 'adapter')}, {line}")


def teacher_line(job) -> str:
    options = job.options
    distillation = job.distillation
    folder = str(short_path(options.teacher))
    if options.teacher_adapter:
        folder += f" with {options.teacher_adapter}"
    n_layers = plural(distillation.teacher.args.n_layers, "layer")
    return (f"{folder}: {n_layers}, {job.precision.name}; temperature "
            f"{distillation.temperature:g}, {100 * distillation.weight:g} % of the loss")


def warn_of_template(adapter_template: str | None, template: str):
    """Warn if the teacher's adapter learnt another prompt format than the one it will read here."""
    if adapter_template not in (None, template):
        print("warning   the teacher's adapter was trained with the template "
              f"{adapter_template!r}, and this run has {template!r}")


def steps_line(job) -> str:
    options = job.options
    n_ranks = job.ranks.begun_with or job.ranks.size
    now = "" if n_ranks == job.ranks.size else f" (now {job.ranks.size})"
    shape = f"{plural(options.accumulation_steps, 'micro-batch')} x {plural(n_ranks, 'rank')}{now}"
    if options.tokens_per_batch:
        n_batches = sum(sum(map(len, by_rank)) for _, by_rank in job.plan)
        n_tokens = 0
        for step in job.plan:
            n_tokens += sum(len(job.train_set[i][0]) for i in example_indices(step))
        filled = n_tokens / (n_batches * options.tokens_per_batch)
        per_step = f"{options.tokens_per_batch:,} tokens ({filled:.0%} filled) x {shape} per step"
    else:
        total = options.batch_size * options.accumulation_steps * n_ranks
        per_step = (f"{plural(options.batch_size, 'example')} x {shape} = "
                    f"{plural(total, 'example')} per step")
    epochs, _ = job.plan[-1]
    noun = "epoch" if epochs == 1 else "epochs"
    return f"{per_step}; {plural(len(job.plan), 'step')}, {epochs:.3g} {noun}"
