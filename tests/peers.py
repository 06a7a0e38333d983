"""The peers' side of `python -m benchmarks peers`: transformers with PEFT, litgpt, or TRL.

Run from the repository's root by a Python that has them: `python -m tests.peers`.  Reads one JSON
object from stdin, {request: a benchmarks.request.Request, rows: of ids}, and prints one:
{tokens_per_second, peaks, versions, and loss or ids}.
"""
import functools
import importlib.metadata
import json
import os
import sys
import threading
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Peaks
from benchmarks.request import Request
from benchmarks.tables import be_killed_first

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = {"transformers": ("transformers", "peft", "torch"), "litgpt": ("litgpt", "torch"),
            "trl": ("trl", "transformers", "peft", "torch")}
IGNORE = -100
PAD = 2
WARM_UP_TOKENS = 64                                  # at most, per answer that warms up


def main():
    """Answer the request on stdin, and end early if the process that waits for it ends."""
    be_killed_first()
    threading.Thread(target=exit_without, args=(os.getppid(),), daemon=True).start()
    asked = json.load(sys.stdin)
    request = Request(**asked["request"])
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)      # as on our side, see finetune/hardware.py
    peaks = Peaks(torch.device(request.device))
    peaks.end("start")
    function = train if request.new is None else generate
    result = function(request, asked["rows"], peaks)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES[request.peer]}
    print(json.dumps({**result, "peaks": peaks.mib, "versions": versions}))


def exit_without(parent: int):
    """End this process once its parent has ended, so that nothing runs beside the next figures."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def train(request: Request, rows: list, peaks: Peaks) -> dict:
    """Train on the rows in their order; return {tokens_per_second, loss: the last}."""
    if request.peer == "trl":
        from tests.peers_trl import train_by_trl     # TRL has a loop of its own.
        return train_by_trl(request, rows, peaks, transformers_model(request))
    load = transformers_training if request.peer == "transformers" else litgpt_training
    model, loss_of = load(request)
    peaks.end("weights")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0, fused=True)
    model.train()
    endless_rows = cycle(rows)
    n_tokens = 0
    seconds = 0.0
    for step in range(request.warm + request.steps):
        batch = list(islice(endless_rows, request.batch))
        began = time.perf_counter()
        loss = loss_of(batch)
        peaks.end("forward")
        loss.backward()
        peaks.end("backward")
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        peaks.end("step")
        if step >= request.warm:
            n_tokens += sum(len(tokens) for tokens, _ in batch)
            seconds += time.perf_counter() - began
    return {"tokens_per_second": n_tokens / seconds, "loss": value}


@torch.inference_mode()
def generate(request: Request, rows: list, peaks: Peaks) -> dict:
    """Answer prompts greedily, a batch at a time; return {tokens_per_second, ids}.

    Answers do not end at eos.  One batch warms up.  When the prompts end they begin again.
    """
    prompts = [prompt_of(tokens, labels) for tokens, labels in rows]
    load = transformers_answering if request.peer == "transformers" else litgpt_answering
    answer = load(request, max(map(len, prompts)))
    peaks.end("weights")
    endless_prompts = cycle(prompts)
    answers = []
    seconds = []
    for i in range(1 + request.n_batches):
        n_new = request.new if i else min(request.new, WARM_UP_TOKENS)
        began = time.perf_counter()
        answers += answer(list(islice(endless_prompts, request.batch)), n_new)
        seconds.append(time.perf_counter() - began)
    peaks.end("generate")
    answers = answers[request.batch:]
    assert all(len(ids) == request.new for ids in answers)
    n_tokens = request.batch * request.n_batches * request.new
    return {"tokens_per_second": n_tokens / sum(seconds[1:]), "ids": answers}


def prompt_of(tokens: list, labels: list) -> list:
    n_answer = sum(label != IGNORE for label in labels)
    return tokens[:len(tokens) - n_answer]


def transformers_model(request: Request):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": request.layers} if request.layers else {}
    config = LlamaConfig.from_pretrained(request.folder, attn_implementation="sdpa", **sizes)
    dtype = DTYPES[request.precision]
    if not request.is_random:
        model = LlamaForCausalLM.from_pretrained(request.folder, config=config, dtype=dtype)
        return model.to(request.device)
    torch.set_default_dtype(dtype)
    with torch.device(request.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def transformers_training(request: Request):
    """Return (model with PEFT's LoRA, rows -> loss, by transformers' own collator if padding-free).

    Without an attention mask the model attends by position ids: within each example.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorWithFlattening

    model = transformers_model(request)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(
        r=16, lora_alpha=32, lora_dropout=request.dropout, task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"]))
    if request.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False})

    flatten = DataCollatorWithFlattening()

    def loss_of(rows):
        if request.batching == "padding-free":
            batch = flatten([{"input_ids": tokens, "labels": labels} for tokens, labels in rows])
            return model(**{name: ids.to(request.device) for name, ids in batch.items()}).loss
        tokens, labels, mask = pad(rows, request.device)
        return model(input_ids=tokens, attention_mask=mask, labels=labels).loss

    return model, loss_of


def transformers_answering(request: Request, longest_prompt: int):
    """Return a function (prompts, new tokens) -> ids of the answers."""
    model = transformers_model(request).eval()
    model.generation_config.eos_token_id = None

    def answer(prompts, n_new):
        rows = [(prompt, [IGNORE] * len(prompt)) for prompt in prompts]
        tokens, _, mask = pad(rows, request.device, on_left=True)
        ids = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=n_new,
                             use_cache=request.cache, pad_token_id=PAD)
        return ids[:, tokens.shape[1]:].tolist()

    return answer


def litgpt_config(request: Request, **lora):
    from litgpt.lora import Config

    sizes = json.loads((Path(request.folder) / "config.json").read_text())
    return Config(
        name="Llama",
        block_size=4096,
        n_layer=request.layers or sizes["num_hidden_layers"],
        n_embd=sizes["hidden_size"],
        n_head=sizes["num_attention_heads"],
        n_query_groups=sizes["num_key_value_heads"],
        vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"],
        intermediate_size=sizes["intermediate_size"],
        rope_base=int(sizes.get("rope_theta", 10000)),
        norm_eps=sizes["rms_norm_eps"],
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        **lora)


def litgpt_training(request: Request):
    """Return (model with litgpt's LoRA, rows -> loss by its chunked head and loss).

    The weights are random, which changes no speed.
    """
    from litgpt.lora import GPT, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    config = litgpt_config(request, lora_r=16, lora_alpha=32, lora_dropout=request.dropout,
                           lora_query=True, lora_value=True)
    with torch.device(request.device):
        model = GPT(config)
    model.to(DTYPES[request.precision])
    mark_only_lora_as_trainable(model)
    if request.checkpointing:
        for block in model.transformer.h:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def loss_of(rows):
        tokens, labels, _ = pad(rows, request.device)
        logits = model(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]         # The last token predicts nothing.
        return chunked_cross_entropy(logits, labels[..., 1:])

    return model, loss_of


def litgpt_answering(request: Request, longest_prompt: int):
    """Return a function (prompts, of which it takes one, new tokens) -> ids of the answers."""
    from litgpt.generate.base import generate as litgpt_generate
    from litgpt.model import GPT

    dtype = DTYPES[request.precision]
    with torch.device(request.device):
        model = GPT(litgpt_config(request)).to(dtype).eval()
    model.max_seq_length = longest_prompt + request.new
    model.set_kv_cache(1, device=request.device, dtype=dtype)

    def answer(prompts, n_new):
        prompt = torch.tensor(prompts[0], device=request.device)
        ids = litgpt_generate(model, prompt, len(prompt) + n_new, temperature=0.0, top_p=0.0,
                              include_prompt=False)
        return [ids.tolist()]

    return answer


def pad(rows: list, device: str, on_left: bool = False) -> list:
    """Return tokens, labels and attention mask of rows, each (B, T) int64."""
    T = max(len(tokens) for tokens, _ in rows)
    columns = ([], [], [])
    for tokens, labels in rows:
        n_pad = T - len(tokens)
        pads = ([PAD] * n_pad, [IGNORE] * n_pad, [0] * n_pad)
        values = (tokens, labels, [1] * len(tokens))
        for column, padding, value in zip(columns, pads, values, strict=True):
            column.append(padding + value if on_left else value + padding)
    return [torch.tensor(column, device=device) for column in columns]


if __name__ == "__main__":
    main()
