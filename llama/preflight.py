"""Before step 1: say what is about to be trained, what memory it will take, and stop what cannot learn."""
import torch

from .cli import DTYPES, shown

MIB = 2 ** 20


def check_data(dataset, max_seq_len, name):
    """Raise ValueError if eos is a target in no row: the model would not learn to stop."""
    if dataset.cut == len(dataset):
        raise ValueError(f"{name}: no answer ends within {max_seq_len} tokens, so eos is never a target and the model "
                         "would not learn to stop; allow longer rows with --max-seq-len")


def largest_batch(dataset, collate, batch_size):
    """The micro-batch that takes the most memory: the longest rows."""
    return collate(sorted(dataset.rows, key=lambda row: len(row[0]))[-batch_size:])


def check_gradients(model, wrapped, loss):
    """Back-propagate loss() once; raise ValueError if it is no number or leaves an adapter (their paths: wrapped) without
    any gradient.

    Gradients and mode are left as they were found, and nothing is drawn from torch's random state, since dropout is
    off.  On the meta device only what is connected can be seen.
    """
    held, training = [(parameter, parameter.grad) for parameter in model.parameters()], model.training
    try:
        model.zero_grad(set_to_none=True)
        model.eval()
        value = loss()
        if not value.is_meta and not value.isfinite():
            raise ValueError(f"the loss is {value.item()} before the first step: are the weights whole, and is --precision "
                             "one that they were made for?")
        value.backward()
        reached = {path for path in wrapped for parameter in model.get_submodule(path).parameters()
                   if parameter.grad is not None and (parameter.is_meta or parameter.grad.any())}
        if lacking := [path for path in wrapped if path not in reached]:
            raise ValueError(f"no gradient reaches the adapter of {', '.join(lacking[:4])}{' and others' * (len(lacking) > 4)}")
        print(f"checked   one batch backward: a gradient reaches {f'each of {len(wrapped)} adapters' if wrapped else 'the weights'}")
    finally:
        model.train(training)
        for parameter, grad in held:
            parameter.grad = grad


def block_bytes(args, width, wrapped, dropout, full, upcast):
    """Bytes a token that one block keeps for its backward pass; width: of the compute dtype, in bytes."""
    D, K, F = args.dim, args.dim // args.n_heads * args.n_kv_heads, args.hidden_dim
    norms = 2 * D * (4 if upcast else width)                     # what came in; torch's CPU norm keeps it in fp32
    attention = (2 * D + 2 * K) * width + 4 * args.n_heads       # q, k, v, the result; a log-sum for each head
    swiglu = 3 * F * width                                       # w1 x, silu(w1 x), w3 x
    reads = dict(wq=("x", D), wk=("x", D), wv=("x", D), wo=("result", 0), w1=("h", D), w3=("h", D), w2=("product", F))
    if full:                                                     # each matrix needs what it multiplied
        inputs = sum(dict(reads.values()).values()) * width
        norms += 2 * D * 4 * (width < 4)                         # autocast: the norms' fp32 results as well
    elif dropout:                                                # each adapter needs its own: dropped, and the mask
        inputs = sum(2 * width * (reads[name][1] or D) for name in wrapped)
    else:
        inputs = sum(dict(reads[name] for name in wrapped).values()) * width
    return norms + attention + swiglu + inputs


def estimate_memory(model, wrapped, batch, precision, device, world_size=1):
    """(bytes by kind at the peak of a step, where that peak is): sizes of tensors in closed form, without any weights.

    model may be on the meta device; batch: the largest micro-batch.  The peak is either at the head, where backward
    holds three fp32 tensors of the logits' size (log-softmax, its gradient, the logits'), or in a block, where it
    holds three gradients of SwiGLU's width and, with checkpointing, what that block has just computed again.
    What the process itself takes, some 250 MiB on a CPU, is not in it.
    """
    args, width = model.args, DTYPES[precision].itemsize
    parameters = list(model.parameters())
    trained, full = sum(p.numel() for p in parameters if p.requires_grad), not wrapped
    layers = [path.rpartition(".")[2] for path in wrapped if path.startswith("layers.0.")]
    dropout = any(getattr(m, "p", 0) for m in model.modules() if isinstance(m, torch.nn.Dropout))
    tokens, rows = batch.tokens.numel(), batch.n_answer
    block = tokens * block_bytes(args, width, layers, dropout, full, device.type == "cpu")
    passing = 3 * tokens * args.hidden_dim * width
    if model.checkpointing:
        kept, in_block = args.n_layers * tokens * args.dim * (4 if full else width), block + passing
    else:
        kept, in_block = args.n_layers * block, passing
    at_head = 12 * rows * args.vocab_size
    copies = width * sum(p.numel() for p in parameters if p.dim() == 2) if full and width < 4 else 0   # autocast's, kept too
    kinds = {"weights": sum(p.numel() * p.element_size() for p in parameters) + copies,
             "gradients": 4 * trained * (2 if world_size > 1 else 1),            # DDP's buckets are a second copy
             "optimizer": 8 * trained,                                           # AdamW's two moments
             "activations": kept + (in_block if in_block > at_head else 0),
             "logits": 0 if in_block > at_head else at_head}
    return kinds, "in a block's backward pass" if in_block > at_head else "at the logits"


def describe(args, model, wrapped, train_set, val_set, batch, steps, per_epoch, device, world_size):
    """Print the few lines that say what is about to be trained, on what, and what it takes."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"base      {shown(args.checkpoint)}: {model.args.n_layers} layers{', random' if args.init == 'random' else ''}, "
          f"{args.precision} on {device}")
    print(f"data      {shown(args.data)}: {len(train_set)} examples, longest {max(len(tokens) for tokens, _ in train_set.rows)} "
          f"tokens, {train_set.cut} cut at {args.max_seq_len}, {train_set.dropped} dropped; {len(train_set) - train_set.cut} end in eos")
    if val_set:
        print(f"held out  {shown(args.val_data or args.data)}: {len(val_set)} examples, {val_set.cut} cut, {val_set.dropped} dropped")
    adapter = f"r {args.r}, alpha {args.alpha:g} on {','.join(args.targets)}: {len(wrapped)} layers wrapped, " * bool(wrapped)
    print(f"{args.method:<9} {adapter}{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %)")
    print(f"steps     {args.batch_size} examples x {args.accumulation_steps} micro-batches x {world_size} ranks = "
          f"{args.batch_size * args.accumulation_steps * world_size} examples a step; {steps} steps, "
          f"{steps / per_epoch:.3g} epochs")
    kinds, where = estimate_memory(model, wrapped, batch, args.precision, device, world_size)
    kinds = {"about": sum(kinds.values()), **kinds}
    about, *parts = (f"{kind} {size / MIB:,.{0 if size >= 100 * MIB else 1}f}" for kind, size in kinds.items())
    print(f"memory    {about} MiB of tensors{' a rank' * (world_size > 1)}, the most {where}: {', '.join(parts)}", flush=True)
