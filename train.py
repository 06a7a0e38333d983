"""Fine-tune LLaMA 2 on Alpaca examples with LoRA.

    python train.py                 the demo: a base of a million parameters, 20 seconds on a CPU
    python train.py --layers 1      the same with only the first block, for debugging
    python train.py --checkpoint llama-2-7b --data alpaca_data.json --checkpointing --out out/7b
    torchrun --standalone --nproc_per_node=2 -- train.py      any of these, in two processes
                                    (the -- keeps torchrun from reading train.py's flags)

Read `main` first, then `train`.  finetune/job.py makes the Job: what is trained, on which data and
how.  Method, precision, quantisation and teacher are chosen there, and the loop does not branch on
them.
"""
from finetune.console import run_command     # First: it ends a Ctrl-C while torch loads quietly.

import functools
import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from finetune.batches import Window, prefetch, windows
from finetune.errors import one_line_errors
from finetune.evaluate import SCORING_TOKENS, evaluate
from finetune.hardware import Precision, peak_memory_mb
from finetune.job import Job, check_gradient_paths, estimate_step_bytes, load_weights, prepare
from finetune.memory import OutOfMemoryAdvice
from finetune.options import Options, parse_options
from finetune.preflight import describe
from finetune.printed import held_out_columns, progress_line, report_end, saved_line
from finetune.ranks import Ranks, connected_ranks
from finetune.run import ADAPTER, Run
from finetune.shard import clip_grad_norm_
from finetune.signals import stop_after_step_on_signals
from llama.checkpoint import (
    COMPANIONS,
    PARAMS,
    TOKENIZER,
    WEIGHTS,
    save_checkpoint,
    save_weights,
)
from llama.files import write_whole
from lora import AdapterState, begin_step, follow_optimizer, save_adapter
from lora.methods.lora_plus import lora_plus_groups


def main(argv=None):
    """Train: read the flags, check and prepare, train, save the adapter."""
    began = time.perf_counter()
    with connected_ranks() as ranks:                          # Without torchrun: rank 0 of 1.
        with one_line_errors("train.py", ranks):
            options = parse_options(argv, __doc__)
            run = Run.open(options, ranks)                    # with --resume the saved one
            job = prepare(options, run.ranks, build_optimizer)      # all but the weights
            run.check_same_run(job)
            if run.progress.finished:                         # Nothing is left to resume.
                return
            describe(job)
            memory_advice = OutOfMemoryAdvice(job, estimate_step_bytes)     # needs shapes only
            if options.dry_run:
                check_gradient_paths(job)
                print("dry run   nothing was trained, nothing was written")
                return
            with memory_advice:                               # says what to do if it runs out
                job = load_weights(job)
            run.begin(job)
        with stop_after_step_on_signals(run), memory_advice:
            train(job, run)
            save(job, run.out)
            run.finish()
        report_end(run.out, job.precision.device, time.perf_counter() - began, ranks)


def train(job: Job, run: Run):
    """Train job.model by job.plan; record, evaluate and save as the options say."""
    options = job.options
    ranks = job.ranks
    precision = job.precision
    model = job.model
    ddp_model = job.sharding.wrapped(model)                   # by DDP, if there are several ranks
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = lora_plus_groups(model, options.lr, options.lora_plus_ratio)    # one group by default
    optimizer = build_optimizer(groups, options)
    # Read before run.attach, which with --resume loads the schedule's rates at the last save.
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    follow_optimizer(model, optimizer)                        # A method may act after a step.
    n_steps = len(job.plan)
    warmup = round(0.03 * n_steps) if options.warmup_steps is None else options.warmup_steps
    tokens_per_batch = options.tokens_per_batch or options.batch_size * options.max_seq_len
    evaluate_held_out = functools.partial(
        evaluate, model, job.val_set, min(tokens_per_batch, SCORING_TOKENS), precision.autocast,
        ranks.rank, ranks.size)
    with one_line_errors("train.py", ranks):
        run.attach(precision.device, functools.partial(save_best, job),
                   model=trained_part(job), optimizer=optimizer, scaler=precision.scaler)
    if job.val_set and run.progress.step == 0:
        print(f"before    {held_out_columns(evaluate_held_out())}", flush=True)
    model.train()
    # A window holds one step's micro-batches.  A thread collates the next one during a step.
    upcoming = windows(job.train_set, job.collate, job.plan[run.progress.step:], ranks.rank)
    for step, window in run.steps(prefetch(upcoming)):
        method_log = begin_step(model, step, run.progress.loss)     # the loss of the step before
        # progress.updates does not count skipped steps, so they do not advance the schedule.
        factor = lr_factor(run.progress.updates, n_steps, warmup, options.schedule)
        for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
            group["lr"] = peak * factor
        loss_share = accumulate_gradients(ddp_model, job.loss_fn, window, precision, ranks)
        precision.scaler.unscale_(optimizer)                  # fp16: true gradients for clipping
        grad_norm = clip_grad_norm_(trainable, options.clip_grad_norm or math.inf).item()
        loss = run.sum_loss(loss_share)                       # over all ranks
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)     # the same on all ranks
        if is_finite:
            precision.scaler.step(optimizer)
        loss_scale = precision.scaler.get_scale()
        precision.scaler.update()                             # knows from unscale_ what overflowed
        overflow = precision.scaler.get_scale() < loss_scale  # fp16: a gradient overflowed
        optimizer.zero_grad(set_to_none=True)
        row = {"step": step, "epoch": window.epoch, "loss": loss,
               "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm,
               "tokens": window.n_tokens, "answer_tokens": window.n_answer,
               "tokens_per_second": window.n_tokens / run.step_seconds(),
               "peak_memory_mb": peak_memory_mb(precision.device),
               "loss_scale": loss_scale, **method_log}
        if job.val_set and (window.epoch.is_integer() or step == n_steps):
            row |= evaluate_held_out()
        remark = run.record(row, is_finite, overflow)         # advances run.progress
        is_notable = step in (1, n_steps) or "val_loss" in row or remark
        if step % options.log_every == 0 or is_notable:
            print(progress_line(row, n_steps, run.seconds_left()) + remark, flush=True)
        if run.end_step():                  # saves if it is due, and exits after a stop signal
            break                                             # the last step, or --early-stop


def accumulate_gradients(model, loss_fn: Callable, window: Window, precision: Precision,
                         ranks: Ranks):
    """Back-propagate the step's mean loss per answer token; return this rank's share of it.

    The mean is over the answer tokens of all micro-batches on all ranks.  An average of the means
    of micro-batches would give a token more weight if its micro-batch has few answer tokens.
    """
    total = torch.zeros((), device=precision.device)
    for i, batch in enumerate(window.batches, 1):
        is_last = i == len(window.batches)
        # DDP averages gradients on the last micro-batch only.  It reads this setting during
        # forward, so forward is inside no_sync too.  A single process has no DDP.
        with nullcontext() if is_last or ranks.size == 1 else model.no_sync():
            with precision.autocast:
                loss_sum, _ = loss_fn(model, batch.to(precision.device))
                loss_share = loss_sum / window.n_answer
            # DDP averages over the ranks.  Times their number, the average is the sum.
            precision.scaler.scale(loss_share * ranks.size).backward()
        total += loss_share.detach()
    return total


def build_optimizer(groups: list, options: Options) -> torch.optim.Optimizer:
    """Return the optimizer of these parameter groups.  Most others of torch.optim work too."""
    return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay, fused=True)


def lr_factor(step: int, n_steps: int, warmup: int, schedule: str) -> float:
    """Return the factor of the peak learning rate when `step` of n_steps steps are done.

    A linear warm-up, then constant or a cosine to 0 (Loshchilov & Hutter 2017, eq. 5).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def trained_part(job: Job):
    """Return the part of the model that is saved and restored, as an object with state_dict()."""
    return AdapterState(job.model) if job.lora else job.model


def save_best(job: Job, path):
    """Write the adapter, or the whole model's weights, to best.pt.  All ranks call this."""
    model = job.sharding.whole_model(job.model)
    if not job.ranks.is_first:
        return
    if job.lora:
        save_adapter(model, path, write_whole)
    else:
        save_weights(model, path)


def save(job: Job, out):
    """Write the adapter or, for --method full, the model.  All ranks call this.

    The model is written in fp32, because bf16 would round most updates away.
    """
    model = job.sharding.whole_model(job.model)
    if not job.ranks.is_first:
        return
    if job.lora:
        save_adapter(model, out / ADAPTER, write_whole)
        old_results = (PARAMS, WEIGHTS, TOKENIZER, COMPANIONS)    # from a --method full run
    else:
        save_checkpoint(model, job.tokenizer, out)
        old_results = (ADAPTER,)
    print(saved_line(job, out))
    for name in old_results:                                  # after the new files are written
        (out / name).unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(main, "train.py", "interrupted; a save that was there is intact",
                outlives_output=True)
