"""Before step 1: say what is about to be trained, what memory it will take, and stop what cannot learn."""
import re
from argparse import Namespace
from contextlib import contextmanager

import torch

from llama.layout import SHORT

from .dataset import count_answer
from .errors import end, shown
from .evaluate import class_answers
from .hardware import DTYPES
from .loss import CHUNK


def check_data(dataset, max_seq_len, name):
    """Raise ValueError if eos is a target in no row: the model would not learn to stop."""
    if dataset.cut == len(dataset):
        raise ValueError(f"{name}: no answer ends within {max_seq_len} tokens, so eos is never a target and the model "
                         "would not learn to stop; allow longer rows with --max-seq-len")


def largest(dataset, steps):
    """Of all micro-batches of `steps`: (indices of the one that takes most, most tokens, answer tokens, pairs of tokens)."""
    sizes = [(len(tokens), count_answer(labels), len(tokens) ** 2 * (len(tokens) <= SHORT)) for tokens, labels in dataset.rows]
    batches = {tuple(batch): [sum(size) for size in zip(*(sizes[i] for i in batch))]
               for _, ranks in steps for batches in ranks for batch in batches}
    return max(batches, key=lambda batch: sum(batches[batch][:2])), *map(max, zip(*batches.values()))


def trying_batch(dataset, collate, steps):
    """The micro-batch that takes most: if memory does not suffice, it should show now."""
    return collate([dataset[i] for i in largest(dataset, steps)[0]])


def check_gradients(model, wrapped, loss):
    """Back-propagate loss() once; raise ValueError if it is no number or does not reach what is to be trained.

    That is each adapter (wrapped: their paths) by one of its tensors at least, or without adapters each parameter.
    Gradients and mode are left as they were found, and nothing is drawn from torch's random state, since dropout is
    off.  On the meta device only what is connected can be seen.
    """
    held, training = [(parameter, parameter.grad) for parameter in model.parameters()], model.training
    parts = {path: list(model.get_submodule(path).parameters()) for path in wrapped} or {
        name: [parameter] for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        model.zero_grad(set_to_none=True)
        model.eval()
        value = loss()
        if not value.is_meta and not value.isfinite():
            raise ValueError(f"the loss is {value.item()} before the first step: are the weights whole, and is --precision "
                             "one that they were made for?")
        value.backward()
        if lacking := [path for path, tensors in parts.items() if all(tensor.grad is None for tensor in tensors)]:
            raise ValueError(f"no gradient reaches {', '.join(lacking[:4])}{' and others' * (len(lacking) > 4)}")
        if not value.is_meta and not any(p.grad is not None and p.grad.any() for p, _ in held):
            raise ValueError("every gradient is zero before the first step: are the weights whole?")
        print(f"checked   one batch backward: a gradient reaches each of {len(parts)} {'adapters' if wrapped else 'parameters'}")
    finally:
        model.train(training)
        for parameter, grad in held:
            parameter.grad = grad


def block_bytes(args, width, wrapped, dropout, on_cpu):
    """Bytes a token that one block keeps for its backward pass.

    width: bytes of a number in the compute dtype; wrapped: {name: adapter layer} of the block, None for full fine-tuning.
    """
    D, K, F = args.dim, args.dim // args.n_heads * args.n_kv_heads, args.hidden_dim
    norms = 2 * D * (4 if on_cpu else width)                     # what came in; torch's CPU norm keeps it in fp32
    attention = (2 * D + 2 * K) * width + 4 * args.n_heads       # q, k, v, the result; a log-sum for each head
    swiglu = 3 * F * width                                       # w1 x, silu(w1 x), w3 x
    normed, result, normed_h, product = ("normed", D), ("result", D), ("normed h", D), ("product", F)
    reads = dict(wq=normed, wk=normed, wv=normed, wo=result, w1=normed_h, w3=normed_h, w2=product)
    readers = reads if wrapped is None else [name for name, layer in wrapped.items() if layer.keeps_input]
    if dropout:                                                  # each adapter keeps its own: dropped, and the mask
        inputs = sum(width * reads[name][1] for name in readers) + sum(
            (width if on_cpu else 1) * reads[name][1] for name in wrapped)
    else:                                                        # several read one; attention's result is kept already
        inputs = sum(width * size for _, size in {reads[name] for name in readers} - {result})
    if wrapped is None:
        return norms + attention + swiglu + inputs + (2 * D * 4 if width < 4 else 0)   # autocast: norms' results in fp32 too
    return norms + attention + swiglu + inputs + sum(
        width * (layer.r + layer.keeps_results * layer.base.out_features) for layer in wrapped.values())


def estimate_memory(model, wrapped, tokens, answers, precision, device, world_size=1, pairs=0):
    """(bytes by kind at the peak of a step, where that peak is): sizes of tensors in closed form, without any weights.

    model may be on the meta device; tokens, answers: of the largest micro-batch; pairs: of query and key, where
    attention keeps them (packing.py, short examples on a CPU).  The peak is either at the head, where backward holds
    the logits, their gradient and three fp32 tensors of a chunk's size (logits, log-softmax, its gradient), or in a
    block, where it holds three gradients of SwiGLU's width and, with checkpointing, what that block has just computed
    again.  What the process itself takes, some 300 MiB on a CPU, is not in it.
    """
    args, width, full = model.args, DTYPES[precision].itemsize, not wrapped
    parameters = list(model.parameters())
    trained = [p.numel() for p in parameters if p.requires_grad]
    in_first = {path.rpartition(".")[2]: model.get_submodule(path) for path in wrapped if path.startswith("layers.0.")}
    dropout = any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    block = tokens * (model.block_bytes(width) if hasattr(model, "block_bytes")               # it is no transformer
                      else block_bytes(args, width, None if full else in_first, dropout, device.type == "cpu"))
    block += args.n_heads * pairs * width
    # What a method holds frozen in more than the compute dtype is copied at each use, and kept.
    block += sum(width * p.numel() for layer in in_first.values() for p in layer.parameters(recurse=False)
                 if not p.requires_grad and p.element_size() > width)
    kept, in_block = args.n_layers * block, 3 * tokens * args.hidden_dim * width
    if set(wrapped) == {"output"}:                               # nothing before it is trained, so nothing is kept:
        kept = 3 * tokens * args.dim * width                     # what passes is the stream, h and its norm
    elif model.checkpointing:
        kept, in_block = args.n_layers * tokens * args.dim * (4 if full else width), in_block + block
    # Of each logit itself and its gradient; of a chunk fp32 softmax and gradient too, and where it was 16 bit its fp32 copy.
    at_head = (2 * answers * width + min(answers, CHUNK) * (12 if width < 4 else 8)) * args.vocab_size
    copies = width * sum(p.numel() for p in parameters if p.dim() == 2) if full and width < 4 else 0   # autocast's, kept too
    # A quantised matrix is made whole, by way of 4 bytes a weight, for the moment of its product.
    made = max((m.in_features * m.out_features for m in model.modules() if hasattr(m, "dequantize")), default=0) * (width + 4)
    kinds = {"weights": sum(t.nbytes for t in (*parameters, *model.buffers())) + copies + made,
             # One more of the largest: a micro-batch's gradient, before it is added.  DDP's buckets are a second copy.
             "gradients": 4 * (sum(trained) * (2 if world_size > 1 else 1) + max(trained)),
             "optimizer": 8 * sum(trained),                                      # AdamW's two moments
             "activations": kept + (in_block if in_block > at_head else 0),
             "logits": 0 if in_block > at_head else at_head}
    return kinds, "in a block" if in_block > at_head else "at the logits"


def memory_of_a_step(model, wrapped, train_set, steps, precision, device, world_size, distillation=None):
    """What estimate_memory says of the largest micro-batches of a plan, and a teacher of itself."""
    _, tokens, answers, pairs = largest(train_set, steps)
    kinds, where = estimate_memory(model, wrapped, tokens, answers, precision, device, world_size, pairs if device.type == "cpu" else 0)
    if distillation:
        kinds |= distillation.memory(tokens, answers, DTYPES[precision].itemsize, kinds["activations"] + kinds["logits"])
    return kinds, where


def knobs(args, estimate):
    """[(flags, bytes less)]: what would lower estimate(args), a number of bytes, the most effective first."""
    tries = [dict(checkpointing=True)] * (not args.checkpointing) + [dict(precision="bf16")] * (args.precision == "fp32")
    if args.tokens_per_batch:
        tries.append(dict(tokens_per_batch=max(1, args.tokens_per_batch // 2)))
    elif args.batch_size > 1:                                    # the same examples a step
        smaller = max(n for n in range(1, args.batch_size) if args.batch_size % n == 0)
        tries.append(dict(batch_size=smaller, accumulation_steps=args.accumulation_steps * args.batch_size // smaller))
    if args.method == "full":
        tries.append(dict(method="lora"))
    elif args.quantize == "none" and args.method != "delta-lora":
        tries.append(dict(quantize="nf4"))
    now = estimate(args)
    less = {" ".join(f"--{name.replace('_', '-')}" + f" {value}" * (value is not True) for name, value in flags.items()):
            now - estimate(Namespace(**vars(args) | flags)) for flags in tries}
    return sorted(((flags, size) for flags, size in less.items() if size > 0), key=lambda knob: -knob[1])


@contextmanager
def out_of_memory_ends_in_one_line(args, estimate, then=""):
    """Turn out of memory into one line that names the knobs in order of effect, and exit 3."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:                 # torch's own name for it is a RuntimeError, and few say it by name
        said = [*str(error).splitlines(), "out of memory"][0].rpartition("err == 0. ")[2]
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not re.search("out of memory|allocate memory|ALLOC_FAILED", said):
            raise
        caught = ". ".join(said.split(". ")[:2])                 # what was asked for; then come addresses and advice
    else:
        return
    help = ", ".join(f"{flags} (by estimate {mib(less)} MiB less)" for flags, less in knobs(args, estimate))
    end(f"train.py: {caught}; try {help or 'a smaller base or a larger device'}{then}", 3)


def mib(size):
    return f"{size / 2 ** 20:,.{0 if size >= 100 * 2 ** 20 else 1}f}"


def describe(args, model, wrapped, train_set, val_set, steps, device, world_size, distillation=None):
    """Print the few lines that say what is about to be trained, on what, and what it takes."""
    total = sum(p.numel() for p in model.parameters()) + sum(
        module.in_features * module.out_features for module in model.modules() if hasattr(module, "dequantize"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"base      {shown(args.checkpoint)}: {model.args.n_layers} layers{', random' if args.init == 'random' else ''}, "
          f"{args.precision}{f' and {args.quantize}' * (args.quantize != 'none')} on {device}")
    longest = max(len(tokens) for tokens, _ in train_set.rows)
    print(f"data      {shown(args.data)}: {len(train_set)} examples, longest {longest} tokens, {train_set.cut} cut at "
          f"{args.max_seq_len}, {train_set.dropped} dropped; {len(train_set) - train_set.cut} end in eos")
    if val_set:
        print(f"held out  {shown(args.val_data or args.data)}: {len(val_set)} examples, {val_set.cut} cut, {val_set.dropped} dropped"
              + (f"; answers of {len(choices)} classes" if (choices := class_answers(val_set, args.max_seq_len)) else ""))
    own = "".join(f", {name} {value}" for name, value in args.method_options.items())
    adapter = f"r {args.r}, alpha {args.alpha:g}{own} on {','.join(args.targets)}: {len(wrapped)} layers wrapped, " * bool(wrapped)
    print(f"{args.method:<9} {adapter}{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %)")
    if args.tokens_per_batch:
        filled = sum(len(train_set[i][0]) for _, ranks in steps for batches in ranks for batch in batches for i in batch)
        filled /= sum(len(batches) for _, ranks in steps for batches in ranks) * args.tokens_per_batch
        a_step = f"{args.tokens_per_batch:,} tokens ({filled:.0%} filled) x {args.accumulation_steps} micro-batches x {world_size} ranks a step"
    else:
        a_step = (f"{args.batch_size} examples x {args.accumulation_steps} micro-batches x {world_size} ranks = "
                  f"{args.batch_size * args.accumulation_steps * world_size} examples a step")
    print(f"steps     {a_step}; {len(steps)} steps, {steps[-1][0]:.3g} epochs")
    if distillation:
        print(f"teacher   {distillation.told(args)}")
    kinds, where = memory_of_a_step(model, wrapped, train_set, steps, args.precision, device, world_size, distillation)
    print(f"memory    about {mib(sum(kinds.values()))} MiB of tensors{' a rank' * (world_size > 1)}, the most {where}: "
          + ", ".join(f"{kind} {mib(size)}" for kind, size in kinds.items()), flush=True)
