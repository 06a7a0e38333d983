"""Before step 1: say what is trained and what memory it takes, and refuse what cannot learn."""
from collections.abc import Callable

import torch

from llama.checkpoint import read_params

from .batches import example_indices
from .dataset import count_answer
from .errors import short_path, short_paths
from .evaluate import class_answers
from .hardware import count_parameters
from .memory import memory_of_a_step, mib
from .ranks import sum_over_ranks


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
    return (f"{short_paths(job.options.data)}: {count_line(train_set)}, the longest has {longest} "
            f"tokens; {fit_line(train_set, job.options.max_seq_len)}{empty_outputs(train_set)}")


def count_line(dataset) -> str:
    """Return how many examples there are; of plain text, how many documents in how many rows."""
    n_rows = len(dataset.rows)
    if not dataset.is_text:
        return plural(n_rows, "example")
    return f"{plural(len(set(dataset.numbers)), 'document')} in {plural(n_rows, 'row')}"


def fit_line(dataset, max_seq_len: int) -> str:
    """Return how many examples were too long, and what became of them.

    Of plain text nothing is: its documents are cut into rows.
    """
    notes = []
    if dataset.is_text:
        notes.append(f"rows of at most --max-seq-len {max_seq_len}")
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
            f"{count_line(val_set)}; {fit_line(val_set, job.options.max_seq_len)}"
            f"{empty_outputs(val_set)}")
    n_trained_on = count_common(job.train_set, val_set)
    if n_trained_on:
        line += f"; {n_trained_on} of them are trained on too"
    choices = class_answers(val_set, job.options.max_seq_len)
    if choices:
        line += f"; answers of {len(choices)} classes"
    return line


def count_common(train_set, val_set) -> int:
    """Return how many held-out rows are also rows of the training set."""
    trained_on = {hash(tuple(tokens)) for tokens, _ in train_set.rows}   # less memory than the ids
    return sum(hash(tuple(tokens)) in trained_on for tokens, _ in val_set.rows)


def empty_outputs(dataset) -> str:
    """Return the number of empty outputs for the end of a line, if there are any."""
    if not dataset.n_empty:
        return ""
    return f"; {plural(dataset.n_empty, 'output')} empty"


def method_line(job) -> str:
    total = count_parameters(job.model)
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
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
