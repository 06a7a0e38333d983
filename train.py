"""Fine-tune LLaMA 2 on Alpaca examples with LoRA.

    python train.py                 the demo: a base of a million parameters, 20 seconds on a CPU
    python train.py --layers 1      the same with only the first block, for debugging
    python train.py --checkpoint llama-2-7b --data alpaca_data.json --checkpointing --out out/7b
    torchrun --standalone --nproc_per_node=2 -- train.py      any of these, in two processes
                                    (the -- keeps torchrun from reading train.py's flags)

Read `main` first, then `train`; the functions between them prepare the Job.  Method, precision,
quantisation and teacher are chosen before the loop, and the loop does not branch on them.
"""
from finetune.console import run_command     # First: it ends a Ctrl-C while torch loads quietly.

import functools
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch

from finetune.batches import Window, pack, plan_epoch, plan_run, prefetch, windows
from finetune.dataset import SupervisedDataset, load_datasets
from finetune.distill import Distillation, check_teacher, load_teacher
from finetune.errors import one_line_errors
from finetune.evaluate import SCORING_TOKENS, evaluate
from finetune.hardware import (
    DTYPES,
    Precision,
    check_compiler,
    fit_to_cpu,
    peak_memory_mb,
    pick_hardware,
)
from finetune.loss import answer_loss
from finetune.neftune import add_embedding_noise
from finetune.options import Options, parse_options
from finetune.preflight import (
    OutOfMemoryAdvice,
    check_data,
    check_gradients,
    describe,
    largest_batch_rows,
    memory_of_a_step,
    optimizer_state_bytes,
)
from finetune.ranks import Ranks, connected_ranks
from finetune.printed import held_out_columns, progress_line, report_end, saved_line
from finetune.run import ADAPTER, Run
from finetune.shard import Sharding, clip_grad_norm_
from finetune.signals import stop_after_step_on_signals
from finetune.templates import template_name
from llama.checkpoint import (
    COMPANIONS,
    PARAMS,
    TOKENIZER,
    WEIGHTS,
    load_checkpoint,
    read_params,
    save_checkpoint,
    save_weights,
)
from llama.files import write_whole
from llama.peft import adapter_at
from llama.tokenizer import Tokenizer
from lora import (
    AdapterState,
    LoRAConfig,
    add_lora,
    begin_step,
    follow_optimizer,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lora.loftq import quantizer
from lora.methods.lora_plus import lora_plus_groups

META = torch.device("meta")                          # tensors with shapes, but without data


@dataclass(frozen=True)
class Job:
    """What a run trains, on which data and how.  It is complete before the first step.

    `prepare` makes it in two stages: first everything that needs no model, then the plan and models
    on the meta device (shapes only).  `load_weights` replaces these with models that have weights.
    The output folder, with progress, metrics and saves, belongs to Run.
    """
    options: Options
    ranks: Ranks
    sharding: Sharding                   # how the ranks share the base (--shard)
    precision: Precision
    lora: LoRAConfig | None              # None for --method full
    template: str                        # the prompt format, for adapter files
    quantize: str
    settings: dict                       # all options, with defaults filled in
    adapter: dict | None                 # content of the --adapter file or folder
    tokenizer: Tokenizer
    train_set: SupervisedDataset
    val_set: SupervisedDataset | None    # held-out examples
    collate: Callable                    # list of (tokens, labels) -> Batch
    optimizer_bytes_per_parameter: float         # per trained parameter; AdamW in fp32: 8
    plan: list = ()          # per step: (epochs done after it, indices[rank][micro-batch])
    model: torch.nn.Module | None = None
    adapter_paths: list = ()             # where the adapter layers are in the model
    distillation: Distillation | None = None
    loss_fn: Callable = answer_loss      # (model, batch) -> (sum over answer tokens, their number)


def main(argv=None):
    """Train: read the flags, check and prepare, train, save the adapter."""
    began = time.perf_counter()
    with connected_ranks() as ranks:                          # Without torchrun: rank 0 of 1.
        with one_line_errors("train.py", ranks):
            options = parse_options(argv, __doc__)
            run = Run.open(options, ranks)                    # with --resume the saved one
            job = prepare(options, run.ranks)                 # checks options, data and sizes
            run.check_same_run(job)
            if run.progress.finished:                         # Nothing is left to resume.
                return
            describe(job)
            memory_advice = OutOfMemoryAdvice(job, estimate_step_bytes)     # keeps shapes only
            if options.dry_run:
                check_gradient_paths(job)
                print("dry run   nothing was trained, nothing was written")
                return
            with memory_advice:                               # says what to do if memory ends
                job = load_weights(job)
            run.begin(job)
        with stop_after_step_on_signals(run), memory_advice:
            train(job, run)
            save(job, run.out)
            run.finish()
        report_end(run.out, job.precision.device, time.perf_counter() - began, ranks)


def prepare(options: Options, ranks: Ranks) -> Job:
    """Return the Job of these options, with shapes in place of weights.

    Every check that needs no weights is made here.  Raises ValueError or OSError.
    """
    device, precision_name = pick_hardware(options.device, options.precision, ranks.local_rank,
                                           options.fast_matmul)
    if options.compile:
        check_compiler(device)
    model_args, tokenizer = read_params(options.checkpoint)
    if options.teacher:
        check_teacher(options.teacher, model_args, tokenizer)
    adapter = None
    if options.adapter:
        adapter = adapter_at(options.adapter, model_args)
    lora, quantize, template = adapter_settings(options, adapter)
    sharding = Sharding.planned(options.shard, ranks, model_args, options.dry_run,
                                options.method == "full")
    train_set, val_set = load_datasets(options.data, options.val_data, options.val_fraction,
                                       options.max_seq_len, options.seed, tokenizer,
                                       template=template)
    check_data(train_set, val_set, options.max_seq_len, options.data,
               (options.checkpoint, options.teacher))
    state_bytes = optimizer_state_bytes(lambda groups: build_optimizer(groups, options))
    job = with_plan_and_shapes(Job(
        options=options,
        ranks=sharding.ranks,
        sharding=sharding,
        precision=mixed_precision(precision_name, device, lora),
        lora=lora,
        quantize=quantize,
        template=template,
        settings=chosen_settings(options, device, precision_name, lora, quantize, template)
        | {"shard": sharding.setting},
        adapter=adapter,
        tokenizer=tokenizer,
        train_set=train_set,
        val_set=val_set,
        collate=functools.partial(pack, share_prefix=options.share_prefix),
        optimizer_bytes_per_parameter=state_bytes))
    fit_to_cpu(job.model, job.plan)
    # Called for its check only: it raises ValueError if the method has no --lora-plus-ratio.
    lora_plus_groups(job.model, options.lr, options.lora_plus_ratio)
    return job


def adapter_settings(options: Options, adapter: dict | None):
    """Return (LoRAConfig or None, quantisation, template), from --adapter if given, else the flags.

    adapter: the content of the adapter file.  --quantize and --template override what it says.
    """
    if adapter is None:
        return options.lora_config, options.quantize or "none", options.template or "alpaca"
    saved = read_adapter(adapter)
    base_info = saved["base"] or {}
    return (saved["config"], options.quantize or base_info.get("quantize") or "none",
            template_name(options.template, base_info, options.adapter))


def chosen_settings(options: Options, device, precision: str, lora: LoRAConfig | None,
                    quantize: str, template: str) -> dict:
    """Return all options with their defaults filled in, for args.json and --resume."""
    settings = asdict(options)
    settings |= {"device": str(device), "precision": precision, "quantize": quantize,
                 "template": template}
    if lora:
        settings |= {"method": lora.method, "r": lora.r, "alpha": lora.alpha,
                     "dropout": lora.dropout, "targets": lora.targets,
                     "method_options": lora.options}
    return settings


def with_plan_and_shapes(job: Job) -> Job:
    """Return the job with its plan, and with its models on the meta device: shapes, no data."""
    model, adapter_paths = load_model(job, META, "random")    # "random" reads no weight file
    distillation = load_distillation(job, META, "random")
    return replace(job, plan=make_plan(job), model=model, adapter_paths=adapter_paths,
                   distillation=distillation)


def make_plan(job: Job) -> list:
    """Return every optimizer step of the run: (epochs completed after it, example indices)."""
    options = job.options
    lengths = [len(tokens) for tokens, _ in job.train_set.rows]
    # The epoch is the only argument that is still to be given.
    steps_of_epoch = functools.partial(
        plan_epoch, lengths, options.batch_size, options.accumulation_steps, options.seed,
        world_size=job.ranks.size, begun_with=job.ranks.begun_with,
        tokens_per_batch=options.tokens_per_batch)
    return plan_run(steps_of_epoch, options.epochs, options.max_steps)


def estimate_step_bytes(job: Job, **changes) -> int:
    """Return the bytes of tensors that a step would need if these options were changed."""
    options = replace(job.options, **changes)
    lora, quantize, _ = adapter_settings(options, job.adapter)
    precision = mixed_precision(options.precision or job.precision.name, job.precision.device, lora)
    sharding = replace(job.sharding, size=options.shard or job.sharding.size,
                       trains_base=lora is None)
    variant = replace(job, options=options, lora=lora, quantize=quantize, precision=precision,
                      sharding=sharding)
    bytes_by_kind, _ = memory_of_a_step(with_plan_and_shapes(variant))
    return sum(bytes_by_kind.values())


def check_gradient_paths(job: Job):
    """Raise ValueError if a trained part gets no gradient.  Runs on the meta device.

    The sum of the logits replaces the loss: answer_loss must read the values of labels, and tensors
    on the meta device have none.
    """
    batch = job.collate(largest_batch_rows(job.train_set, job.plan)).to(META)
    check_gradients(job.model, job.adapter_paths,
                    lambda: job.model(batch.tokens, layout=batch.layout).sum())


def load_weights(job: Job) -> Job:
    """Load the weights, and test one backward pass on the largest micro-batch."""
    device = job.precision.device
    job = replace(job, sharding=job.sharding.connected(device))
    torch.manual_seed(job.options.seed)                       # before the first weight is drawn
    model, adapter_paths = load_model(job, device, job.options.init)
    if job.adapter:
        load_adapter(model, job.adapter)                      # values for load_model's layers
    distillation = load_distillation(job, device, "checkpoint")     # even with --init random
    loss_fn = distillation or answer_loss
    job.ranks.exchange()                # If a rank has failed so far, all ranks stop here.
    batch = job.collate(largest_batch_rows(job.train_set, job.plan))
    with job.precision.autocast:
        check_gradients(model, adapter_paths, lambda: loss_fn(model, batch.to(device))[0])
    torch.manual_seed(job.options.seed + job.ranks.rank)      # other dropout on each rank
    return replace(job, model=model, adapter_paths=adapter_paths, distillation=distillation,
                   loss_fn=loss_fn)


def load_model(job: Job, device: torch.device, init: str):
    """Return (model, paths of its adapter layers).  Without an adapter the whole model is trained.

    Frozen weights are loaded in the compute dtype.  Stored in fp32 they would need autocast, which
    keeps a 16-bit copy of each until backward.  Trained weights stay in fp32, because 16 bits would
    round small updates away.
    """
    options = job.options
    dtype = job.precision.dtype if job.lora else torch.float32
    model, _ = load_checkpoint(options.checkpoint, options.layers, dtype, device,
                               options.max_seq_len, init, sharding=job.sharding,
                               convert=quantizer(job.quantize, job.adapter or job.lora))
    model.checkpointing = options.checkpointing
    model.origin["template"] = job.template                   # Adapter files store it.
    adapter_paths = add_lora(model, job.lora) if job.lora else []
    add_embedding_noise(model, options.neftune_alpha)         # None: no noise
    if options.compile:
        for block in model.layers:
            block.compile(dynamic=True)                       # Compile once for all lengths.
    return model, adapter_paths


def load_distillation(job: Job, device: torch.device, init: str) -> Distillation | None:
    """Return the loss that also learns from --teacher, or None without --teacher.

    The teacher is frozen and stored in the compute dtype.
    """
    options = job.options
    if not options.teacher:
        return None
    teacher = load_teacher(options.teacher, options.teacher_adapter, job.precision.dtype, device,
                           options.max_seq_len, init, sharding=job.sharding.of_teacher())
    return Distillation(teacher, options.distill_temperature, options.distill_weight)


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
        precision.scaler.update()
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
        remark = run.record(row, is_finite, overflow)
        is_notable = step in (1, n_steps) or "val_loss" in row or remark
        if step % options.log_every == 0 or is_notable:
            print(progress_line(row, n_steps, run.seconds_left()) + remark, flush=True)
        if run.end_step():                                    # the last step, or one to stop after
            break


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
            # DDP averages over the ranks, and times their number that is the sum.
            precision.scaler.scale(loss_share * ranks.size).backward()
        total += loss_share.detach()
    return total


def build_optimizer(groups: list, options: Options) -> torch.optim.Optimizer:
    """Return the optimizer of these parameter groups.  Another one of torch.optim works too."""
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


def mixed_precision(name: str, device: torch.device, lora: LoRAConfig | None) -> Precision:
    """Return the Precision of a run.  lora: None if the whole model is trained.

    Only full fine-tuning needs autocast: there fp32 weights meet 16-bit activations.  With an
    adapter the base is in 16 bit already, and adapter layers cast their fp32 A and B themselves.
    There autocast would only cost memory: on CUDA it returns the result of each norm in fp32, and
    every layer that reads the result casts it and keeps the copy.
    """
    is_16_bit = name != "fp32"
    autocast = torch.autocast(device.type, DTYPES[name], enabled=is_16_bit and lora is None)
    scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
    return Precision(name, device, autocast, scaler)


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
    run_command(main, "train.py", "interrupted; the last save is intact", outlives_output=True)
