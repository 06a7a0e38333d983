"""What a run trains, on which data and how: the Job, made from the options before the first step.

`prepare` makes it with shapes in place of weights, and checks what needs no weights.
`load_weights` reads the weights.  train.py calls both, and then trains.
"""
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from llama.checkpoint import load_checkpoint, read_params
from llama.peft import adapter_at
from llama.tokenizer import Tokenizer
from lora import LoRAConfig, add_lora, load_adapter, read_adapter
from lora.loftq import quantizer
from lora.methods.lora_plus import lora_plus_groups

from .batches import pack, plan_epoch, plan_run
from .dataset import SupervisedDataset, load_datasets
from .distill import Distillation, check_teacher, load_teacher
from .hardware import DTYPES, Precision, check_compiler, fit_to_cpu, pick_hardware
from .loss import answer_loss
from .memory import largest_batch_rows, memory_of_a_step, optimizer_state_bytes
from .neftune import add_embedding_noise
from .options import Options
from .preflight import check_data, check_gradients
from .ranks import Ranks
from .shard import Sharding
from .templates import template_name

META = torch.device("meta")                          # tensors with shapes, but without data


@dataclass(frozen=True)
class Job:
    """What a run trains, on which data and how.  It is complete before the first step.

    `prepare` makes it in two stages: first what needs no model, then the plan, and the models on
    the meta device (shapes only).  `load_weights` replaces these with models that have weights.
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


def prepare(options: Options, ranks: Ranks, build_optimizer: Callable) -> Job:
    """Return the Job of these options, with shapes in place of weights.

    Raises ValueError or OSError for what cannot be trained.
    build_optimizer(parameter groups, options): train.py's.
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
    # Measured on a stand-in, because the model comes later.
    state_bytes = optimizer_state_bytes(lambda groups: build_optimizer(groups, options))
    job = with_plan_and_shapes(Job(
        options=options,
        ranks=sharding.ranks,                                 # in a dry run, the planned ones
        sharding=sharding,
        precision=mixed_precision(precision_name, device, lora),
        lora=lora,
        quantize=quantize,
        template=template,
        settings=(chosen_settings(options, device, precision_name, lora, quantize, template)
                  | {"shard": sharding.setting}),             # a number, even if --shard has none
        adapter=adapter,
        tokenizer=tokenizer,
        train_set=train_set,
        val_set=val_set,
        collate=functools.partial(pack, share_prefix=options.share_prefix,
                                  pinned=device.type == "cuda"),
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
    """Return the bytes of tensors that a step would need if these options were changed.

    changes: fields of Options.  What they leave open stays as the job has it.
    """
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
    adapter_paths = add_lora(model, job.lora, bool(job.adapter)) if job.lora else []
    add_embedding_noise(model, options.neftune_alpha)         # None: no noise
    if options.compile and device.type != "meta":             # There is no code for shapes alone.
        for block in model.layers:
            block.compile(dynamic=True)                       # once for all lengths
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


def mixed_precision(name: str, device: torch.device, lora: LoRAConfig | None) -> Precision:
    """Return the Precision of a run.  lora: None if the whole model is trained.

    Only full fine-tuning needs autocast, which multiplies its fp32 weights in 16 bit.  With an
    adapter the base is in 16 bit already, and adapter layers cast their fp32 A and B themselves.
    Then autocast would only cost memory: on CUDA it returns the result of each norm in fp32, and
    every layer that reads the result casts it and keeps the copy.
    """
    autocast = torch.autocast(device.type, DTYPES[name], enabled=name != "fp32" and lora is None)
    return Precision(name, device, autocast,
                     scaler=torch.amp.GradScaler(device.type, enabled=name == "fp16"))
