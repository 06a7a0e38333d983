"""Fine-tune LLaMA 2 on Alpaca examples with LoRA.

    python train.py                 the demo: a base of a million parameters, under a minute on a laptop's CPU
    python train.py --layers 1      the same with its first block alone, for debugging
    python train.py --checkpoint llama-2-7b --data alpaca_data.json --checkpointing --out out/7b
    torchrun --standalone --nproc_per_node=2 -- train.py     any of these on two GPUs, or in two processes on a CPU

Read from `main` on.  Every option is decided before the loop, which never asks which one was chosen.
"""
import argparse
import functools
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from finetune.arguments import Parser, add_hardware_flags, named_values, number, text
from finetune.batches import ahead, pack, plan_epoch, windows
from finetune.dataset import SupervisedDataset, read_examples
from finetune.distill import Distillation
from finetune.distill import add_flags as add_teacher_flags
from finetune.distill import check as check_teacher
from finetune.distill import settle as settle_teacher
from finetune.errors import bad_input_ends_in_one_line
from finetune.evaluate import TOKENS, evaluate
from finetune.hardware import DTYPES, peak_memory_mb, pick_hardware
from finetune.loss import answer_loss
from finetune.pictures import picture_of
from finetune.preflight import (
    check_data,
    check_gradients,
    describe,
    memory_of_a_step,
    out_of_memory_ends_in_one_line,
    trying_batch,
)
from finetune.progress import held_out, progress
from finetune.ranks import leave
from finetune.state import Run
from finetune.state import add_flags as add_survival_flags
from llama.checkpoint import (
    PARAMS,
    TOKENIZER,
    WEIGHTS,
    load_checkpoint,
    read_params,
    save_checkpoint,
    save_weights,
)
from llama.peft import adapter_at
from lora import (
    AdapterState,
    LoRAConfig,
    add_lora,
    begin_step,
    follow_optimizer,
    load_adapter,
    method_options,
    read_adapter,
    save_adapter,
)
from lora.adapter import METHODS
from lora.methods.lora_plus import lora_plus_groups
from lora.quantize import KINDS as QUANTIZED
from lora.quantize import quantizer

DEMO = Path(__file__).parent / "finetune" / "demo"
SETTINGS = ("method", "r", "alpha", "dropout", "targets")        # what --adapter brings along


def parse_args(argv=None):
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    what = parser.add_argument_group("what")
    flag = what.add_argument
    flag("--checkpoint", metavar="DIR", type=text, help="base model, a folder in Meta's or Hugging Face's layout (default: the demo's)")
    flag("--init", choices=("checkpoint", "random"), default="checkpoint",
         help="random: take only sizes and tokenizer from --checkpoint (default: checkpoint)")
    flag("--layers", metavar="N", type=number(int, 1), help="keep the first N blocks (default: all)")
    flag("--data", metavar="FILE", type=text, help="examples, .json or .jsonl (default: the demo's)")
    flag("--max-seq-len", metavar="N", type=number(int, 2), default=512, help="tokens a row; the tail is cut (default: 512)")
    flag("--val-data", metavar="FILE", type=text, help="held-out examples (default: the demo's with the demo's data, else none)")
    flag("--val-fraction", metavar="F", type=number(float, 0, 1, open_low=True, open_high=True),
         help="hold this share of --data out instead")
    flag("--out", metavar="DIR", type=text, help="where the run goes (default: out, where it replaces the last)")
    flag("--seed", metavar="N", type=number(int, 0), default=0, help="of weights, order and dropout (default: 0)")
    flag("--dry-run", action="store_true", help="check everything that can be checked without the weights, then stop")

    flag = parser.add_argument_group("how it learns").add_argument
    flag("--method", choices=("full", *METHODS), default="lora", help="what is trained (default: lora)")
    flag("--adapter", metavar="PATH", type=text, help="go on from this adapter, our file or PEFT's folder, with its settings")
    flag("--r", metavar="N", type=number(int, 1), default=16, help="rank (default: 16)")
    flag("--alpha", metavar="F", type=number(float, 0, open_low=True), default=32.0,
         help="scale of the update: alpha / r, unless the method's file in lora/ says otherwise (default: 32)")
    flag("--dropout", metavar="P", type=number(float, 0, 1, open_high=True),
         help="on the adapter's input (default: 0.05; lora-fa, delta-lora: 0)")
    flag("--targets", metavar="NAMES", type=lambda names: tuple(names.split(",")), default=("wq", "wv"),
         help="of wq,wk,wv,wo,w1,w2,w3,output,tok_embeddings, or all (default: wq,wv)")
    flag("--method-options", metavar="NAME=VALUE,...", type=named_values, default={},
         help="settings of the method's own, as its file in lora/ lists them")
    flag("--lora-plus-ratio", metavar="F", type=number(float, 0, open_low=True), default=1.0,
         help="LoRA+: learning rate of lora_B in units of lora_A's (default: 1)")
    flag("--lr", metavar="F", type=number(float, 0, open_low=True),
         help="peak learning rate (default: 3e-4; full: 1e-5; over the demo's base, which is tiny: 5e-3)")
    flag("--weight-decay", metavar="F", type=number(float, 0), default=0.0, help="AdamW's (default: 0)")
    flag("--warmup-steps", metavar="N", type=number(int, 0), help="optimizer steps (default: 3 %% of all)")
    flag("--schedule", choices=("cosine", "constant"), default="cosine", help="after warm-up (default: cosine, to 0)")
    flag("--epochs", metavar="N", type=number(int, 1), help="passes over the data (default: 3; over the demo's base: 4)")
    flag("--max-steps", metavar="N", type=number(int, 1), help="optimizer steps, if fewer than the epochs have")
    flag("--clip-grad-norm", metavar="F", type=number(float, 0), default=1.0, help="0: never clip (default: 1.0)")

    add_teacher_flags(parser)
    group = parser.add_argument_group("what it costs")
    flag = group.add_argument
    flag("--batch-size", metavar="N", type=number(int, 1), default=4, help="examples a micro-batch (default: 4)")
    flag("--accumulation-steps", metavar="N", type=number(int, 1), default=8,
         help="micro-batches an optimizer step (default: 8)")
    flag("--tokens-per-batch", metavar="N", type=number(int, 1), help="fill each micro-batch to N tokens instead of --batch-size examples")
    flag("--share-prefix", action="store_true", help="compute what a micro-batch's examples have in common at their beginning once")
    flag("--compile", action="store_true", help="compile the blocks: slow at first, worth it from some hundred steps on")
    flag("--fast-matmul", action="store_true", help="fp32 matrix products may round to bf16 on a CPU, TF32 on CUDA; all else stays fp32")
    flag("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
         help="recompute blocks in backward instead of keeping them: less memory, up to half more time (default: no)")
    flag("--quantize", choices=("none", *QUANTIZED), help="hold the blocks' frozen matrices in 8 or 4 bits (default: none, or --adapter's)")
    add_hardware_flags(group)
    flag("--log-every", metavar="N", type=number(int, 1), default=10, help="optimizer steps a printed line (default: 10)")
    add_survival_flags(parser)

    args = parser.parse_args(argv)
    settle_teacher(args, parser)
    if args.val_data is not None and args.val_fraction is not None:
        parser.error("--val-data and --val-fraction both name held-out examples; give one")
    if args.data is None and args.val_data is None and args.val_fraction is None:
        args.val_data = str(DEMO / "held_out.json")
    if args.early_stop and args.val_data is None and args.val_fraction is None:
        parser.error("--early-stop watches the held-out loss: give --val-data or --val-fraction")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite replaces it; give one")
    if args.adapter and any(getattr(args, name) != parser.get_default(name) for name in SETTINGS):
        parser.error(f"--adapter brings its own settings; leave --{', --'.join(SETTINGS)} out")
    if args.method == "full" and args.quantize not in (None, "none"):
        parser.error(f"--quantize {args.quantize} is for a base that stays as it is; --method full trains it")
    if args.method == "full" and args.method_options:
        parser.error("--method-options are an adapter's; --method full has none")
    demo = args.checkpoint is None
    args.lr = args.lr or (1e-5 if args.method == "full" else 5e-3 if demo else 3e-4)
    args.epochs = args.epochs or (4 if demo else 3)
    args.checkpoint, args.data = args.checkpoint or str(DEMO), args.data or str(DEMO / "train.json")
    if lora := lora_config(args):
        args.dropout, args.method_options = lora.dropout, lora.options
    return args


def lora_config(args):
    """The LoRAConfig that the flags ask for; None for --method full."""
    if args.method == "full":
        return None
    options = {"seed": args.seed} if "seed" in method_options(args.method) else {}
    return LoRAConfig(args.method, args.r, args.alpha, args.dropout, args.targets, options=options | args.method_options)


def setup_distributed():
    """(rank, world size, rank on this machine) as torchrun tells them; one process is rank 0 of 1."""
    if not dist.is_torchelastic_launched():
        return 0, 1, 0
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)      # torch 2.11 lacks its successor
    store, rank, world_size = next(rendezvous("env://"))
    # The store outlives a restart by torchrun, and in it stand the addresses of the ranks that are gone.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=world_size)
    return rank, world_size, int(os.environ["LOCAL_RANK"])


def load_data(args, tokenizer):
    """(training set, held-out set or None)."""
    examples, held_out, numbers = read_examples(args.data), None, None
    if args.val_data:
        held_out = read_examples(args.val_data)
    elif args.val_fraction:
        n = round(len(examples) * args.val_fraction)
        if not 1 <= n < len(examples):
            raise ValueError(f"--val-fraction {args.val_fraction} of {len(examples)} examples leaves one side empty")
        order = np.random.default_rng(args.seed).permutation(len(examples)).tolist()
        numbers = [i + 1 for i in order[n:]]
        examples, held_out = ([examples[i] for i in part] for part in (order[n:], order[:n]))
    return (SupervisedDataset(examples, tokenizer, args.max_seq_len, args.data, numbers),
            held_out and SupervisedDataset(held_out, tokenizer, args.max_seq_len, args.val_data or args.data))


def load_model(args, lora, device, init):
    """(model, wrapped paths): the base with an adapter or, for --method full, trainable as a whole."""
    # What is frozen is held in the compute dtype: held in fp32, autocast would make a 16-bit copy at each use
    # and keep it until backward.  What is trained is held in fp32, where small steps are not rounded away.
    dtype = DTYPES[args.precision] if lora else torch.float32
    model, _ = load_checkpoint(args.checkpoint, args.layers, dtype, device, args.max_seq_len, init, quantizer(args.quantize))
    model.checkpointing = args.checkpointing
    wrapped = add_lora(model, lora) if lora else []
    if args.compile:
        for block in model.layers:
            block.compile(dynamic=True)                      # once, for rows of any length
    return model, wrapped


def load_distillation(args, device, init):
    """The loss_fn that learns from --teacher too, frozen and in the compute dtype; None where there is none."""
    if not args.teacher:
        return None
    source = args.teacher_adapter and adapter_at(args.teacher_adapter, read_params(args.teacher)[0])
    adapter = read_adapter(source) if source else {}
    base = adapter.get("base") or {}
    teacher, _ = load_checkpoint(args.teacher, base.get("layers"), DTYPES[args.precision], device, args.max_seq_len, init,
                                 quantizer(base.get("quantize", "none")))
    if source:
        load_adapter(teacher, source) if init == "checkpoint" else add_lora(teacher, adapter["config"])
    return Distillation(teacher, args.distill_temperature, args.distill_weight)


def estimate(args, train_set, device, world_size):
    """Bytes of tensors that a step with these flags would take."""
    model, wrapped = load_model(args, lora_config(args), torch.device("meta"), "random")
    steps, teacher = plan(args, train_set, world_size), load_distillation(args, torch.device("meta"), "random")
    return sum(memory_of_a_step(model, wrapped, train_set, steps, args.precision, device, world_size, teacher)[0].values())


def plan(args, train_set, world_size):
    """Every optimizer step of the run: [(epochs passed with it, [rank][micro-batch][index])]."""
    lengths = [len(tokens) for tokens, _ in train_set.rows]
    steps = []
    for epoch in range(args.epochs):
        planned = plan_epoch(lengths, args.batch_size, args.accumulation_steps, args.seed, epoch, world_size, args.tokens_per_batch)
        steps += [(epoch + i / len(planned), step) for i, step in enumerate(planned, 1)]
        if args.max_steps and len(steps) >= args.max_steps:
            break
    return steps[:args.max_steps]


def lr_factor(step, steps, warmup, schedule):
    """Share of the peak learning rate at `step` (from 0) of `steps`: up in a line, then a cosine to 0 or constant."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def mixed_precision(args, device):
    """Autocast, where fp32 weights meet 16-bit activations.  A frozen base is in 16 bit already and adapters come down to
    it by themselves; autocast would only, on CUDA, hand every norm's result on in fp32, to be cast and kept once a use."""
    return torch.autocast(device.type, DTYPES[args.precision], enabled=args.method == "full" and args.precision != "fp32")


def train(args, model, loss_fn, trained, train_set, val_set, steps, collate, device, run, save_best):
    """The loop.  loss_fn(model, batch): (sum over answer tokens, their count); trained: what of the model it moves, as a save
    holds it; save_best(path) writes what there is then."""
    rank, world_size = run.rank, run.world_size
    # Frozen first, wrapped second: DDP waits for a gradient from whatever was trainable when it wrapped.
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = lora_plus_groups(model, args.lr, args.lora_plus_ratio)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    follow_optimizer(model, optimizer)
    warmup = round(0.03 * len(steps)) if args.warmup_steps is None else args.warmup_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: lr_factor(n, len(steps), warmup, args.schedule))
    autocast = mixed_precision(args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    def scores():
        return evaluate(model, val_set, min(args.tokens_per_batch or args.batch_size * args.max_seq_len, TOKENS), autocast, rank, world_size)
    with bad_input_ends_in_one_line("train.py"):
        run.connect(device, save_best, model=trained, optimizer=optimizer, schedule=schedule, scaler=scaler)
    if val_set and not run.step:
        print(f"before    {held_out(scores())}", flush=True)
    model.train()
    step_began = time.perf_counter()
    for step, window in enumerate(ahead(windows(train_set, collate, steps[run.step:], rank)), run.step + 1):
        noted = begin_step(model, step, run.loss)                        # by the adapter's method, if it acts around a step
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(window.batches, 1):
            # DDP talks once a step, on the last micro-batch; it takes note in forward, so forward is inside too.
            with parallel.no_sync() if world_size > 1 and i < len(window.batches) else nullcontext():
                with autocast:                                           # DDP averages over ranks: world_size undoes it
                    micro_loss = loss_fn(parallel, batch.to(device))[0] * world_size / window.n_answer
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach() / world_size
        scaler.unscale_(optimizer)                                       # first, so that clipping sees true gradients
        grad_norm = clip_grad_norm_(trainable, args.clip_grad_norm or math.inf).item()
        loss, loss_scale, lr = run.add(loss), scaler.get_scale(), schedule.get_last_lr()[0]
        if sound := math.isfinite(loss) and math.isfinite(grad_norm):    # on all ranks: both are of all ranks
            scaler.step(optimizer)
            schedule.step()                                              # which waits where a step is skipped
        scaler.update()                                                  # lowers the scale after an overflow in fp16
        optimizer.zero_grad(set_to_none=True)
        row = dict(step=step, epoch=window.epoch, loss=loss, lr=lr, grad_norm=grad_norm, tokens=window.n_tokens,
                   answer_tokens=window.n_answer)
        row["tokens_per_second"] = row["tokens"] / (time.perf_counter() - step_began)
        row |= dict(peak_memory_mb=peak_memory_mb(device), loss_scale=loss_scale, **noted)
        if val_set and (window.epoch.is_integer() or step == len(steps)):
            row |= scores()
        remark = run.record(row, sound, overflow=scaler.get_scale() < loss_scale)
        if step % args.log_every == 0 or step in (1, len(steps)) or "val_loss" in row or remark:
            print(progress(row, len(steps), time.perf_counter() - run.began) + remark, flush=True)
        if run.ends():
            break
        step_began = time.perf_counter()                                 # collating the next window is part of its step


def save(args, model, tokenizer, lora, out):
    """The adapter or, for --method full, the model in fp32, as it was trained: in bf16 most small steps would be lost."""
    if lora:
        save_adapter(model, out / "adapter.pt")
        replaced = PARAMS, WEIGHTS, TOKENIZER                # what another kind of run left: gone only now
        now = f"now: python generate.py --adapter {out / 'adapter.pt'}"
        if args.init == "random":
            now = "over random weights, which are not kept: a run to measure, not to generate with"
        print(f"saved     {out / 'adapter.pt'}; {now}")
    else:
        save_checkpoint(model, tokenizer, out)
        replaced = "adapter.pt",
        print(f"saved     {out}; now: python generate.py --checkpoint {out} --adapter none")
    for name in replaced:
        (out / name).unlink(missing_ok=True)


def main(argv=None):
    began = time.perf_counter()
    rank, world_size, local_rank = setup_distributed()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                   # one rank speaks for all
    # Bad input ends all ranks, whichever it is on; what a block appends to `alike` must be the same on all of them.
    with bad_input_ends_in_one_line("train.py") as alike:
        args = parse_args(argv)
        run = Run(args, rank, world_size)
        alike.append(run.step)
    if run.finished:
        print(f"resume    {run.out} is finished, after step {run.step}: nothing is left to do, nothing was changed")
        return leave(0) if world_size > 1 else None
    with bad_input_ends_in_one_line("train.py") as alike:
        device, args.precision = pick_hardware(args.device, args.precision, local_rank, args.fast_matmul)
        args.device = str(device)
        if args.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError("--compile needs a C++ compiler (g++, or what CXX names) to compile for a CPU")
        model_args, tokenizer = read_params(args.checkpoint)
        if args.teacher:
            check_teacher(args, (model_args, tokenizer), read_params(args.teacher))
        train_set, val_set = load_data(args, tokenizer)
        check_data(train_set, args.max_seq_len, args.data)
        collate = functools.partial(pack, share_prefix=args.share_prefix)
        steps = plan(args, train_set, world_size)
        batch = trying_batch(train_set, collate, steps)
        if args.adapter:
            adapter = adapter_at(args.adapter, model_args)
            saved = read_adapter(adapter)
            config, args.quantize = saved["config"], args.quantize or (saved["base"] or {}).get("quantize")
            vars(args).update({name: getattr(config, name) for name in SETTINGS}, method_options=config.options)
        args.quantize = args.quantize or "none"
        lora = lora_config(args)
        run.check(train_set, val_set, steps)
        # Sizes without memory: a wrong target, rank or ratio, and what it will take, show before the weights load.
        model, wrapped = load_model(args, lora, torch.device("meta"), "random")
        lora_plus_groups(model, args.lr, args.lora_plus_ratio)
        need = functools.partial(estimate, train_set=train_set, device=device, world_size=world_size)
        distillation = load_distillation(args, torch.device("meta"), "random")
        describe(args, model, wrapped, train_set, val_set, steps, device, world_size, distillation)
        if args.dry_run:
            check_gradients(model, wrapped, lambda: model(batch.tokens.to("meta"), layout=batch.layout.to("meta")).sum())
        else:
            torch.manual_seed(args.seed)                     # before the first weight is drawn
            with out_of_memory_ends_in_one_line(args, need):
                model, wrapped = load_model(args, lora, device, args.init)
                if args.adapter:
                    load_adapter(model, adapter)
                distillation = load_distillation(args, device, "checkpoint")
                loss_fn = distillation or answer_loss
                with mixed_precision(args, device):
                    check_gradients(model, wrapped, lambda: loss_fn(model, batch.to(device))[0])
            run.must_be("base", model.origin.get("fingerprint"), "it was begun over another base")
            run.must_be("teacher", distillation and distillation.fingerprint(), "it was begun with another teacher")
            torch.manual_seed(args.seed + rank)              # each rank drops other elements
        paths = ("checkpoint", "adapter", "teacher", "teacher_adapter", "data", "val_data", "out", "device")   # these may differ from machine to machine
        alike += [{key: value for key, value in vars(args).items() if key not in paths}, run.about,
                  *([len(tokens) for tokens, _ in part.rows] for part in (train_set, val_set) if part)]
    if args.dry_run:
        print("dry run   nothing was trained, nothing was written")
        return leave(0) if world_size > 1 else None
    with bad_input_ends_in_one_line("train.py"):             # only now that all ranks are well is a file touched
        run.begin()
    trained, write = (AdapterState(model), save_adapter) if lora else (model, save_weights)
    with run.survives(), out_of_memory_ends_in_one_line(args, need, "; --resume goes on from the last save, --batch-size or --checkpointing changed or not"):
        train(args, model, loss_fn, trained, train_set, val_set, steps, collate, device, run, functools.partial(write, model))
        if rank == 0:
            save(args, model, tokenizer, lora, run.out)
        run.finish()
    peak = peak_memory_mb(device)
    print(f"total     {time.perf_counter() - began:.1f} s" + (f", peak memory {peak:,.0f} MiB" if peak else ""))
    if rank == 0:
        print(f"picture   {picture_of(run.out)}")
    if world_size > 1:
        leave(0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("train.py: interrupted; what was saved is whole", file=sys.stderr)
        sys.exit(130)
