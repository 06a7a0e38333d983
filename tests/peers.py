"""The peers' side of `benchmark.py peers`: transformers with PEFT, or litgpt, in a plain loop.

Run by a python that has them, from the repository's root: `python -m tests.peers`.  Reads one JSON object from stdin, what
is asked and the rows of ids, and prints one: tokens_per_second, peaks, versions, and the loss or the generated ids.
"""
import functools
import importlib.metadata
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Peaks
from benchmarks.tables import first_to_go

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformers_model(ask, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = {"num_hidden_layers": ask["layers"]} if ask["layers"] else {}
    config = LlamaConfig.from_pretrained(ask["folder"], attn_implementation="sdpa", **sizes)
    if not ask["random"]:
        return LlamaForCausalLM.from_pretrained(ask["folder"], config=config, dtype=dtype).to(ask["device"])
    torch.set_default_dtype(dtype)
    with torch.device(ask["device"]):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def transformers_training(ask, dtype):
    """(model, rows -> loss)."""
    from peft import LoraConfig, get_peft_model
    model = transformers_model(ask, dtype)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=ask["dropout"], task_type="CAUSAL_LM",
                                             target_modules=["q_proj", "v_proj"]))
    if ask["checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss(rows):
        tokens, labels, mask = padded(rows, ask["device"])
        return model(input_ids=tokens, attention_mask=mask, labels=labels).loss
    return model, loss


def litgpt_config(ask, **lora):
    from litgpt.lora import Config
    sizes = json.loads((Path(ask["folder"]) / "config.json").read_text())
    return Config(
        name="Llama", block_size=4096, n_layer=ask["layers"] or sizes["num_hidden_layers"], n_embd=sizes["hidden_size"],
        n_head=sizes["num_attention_heads"], n_query_groups=sizes["num_key_value_heads"], vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"], intermediate_size=sizes["intermediate_size"], rope_base=int(sizes.get("rope_theta", 10000)),
        norm_eps=sizes["rms_norm_eps"], norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", rotary_percentage=1.0,
        parallel_residual=False, bias=False, **lora)


def litgpt_training(ask, dtype):
    """Its own modules, chunked head and loss; the weights are random, which changes no speed."""
    from litgpt.lora import GPT, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy
    with torch.device(ask["device"]):
        model = GPT(litgpt_config(ask, lora_r=16, lora_alpha=32, lora_dropout=ask["dropout"], lora_query=True, lora_value=True))
    model.to(dtype)
    mark_only_lora_as_trainable(model)
    if ask["checkpointing"]:
        for block in model.transformer.h:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def loss(rows):
        tokens, labels, _ = padded(rows, ask["device"])
        logits = model(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, labels[..., 1:])
    return model, loss


def padded(rows, device, left=False):
    """(tokens, labels, mask), each (B, T)."""
    T = max(len(tokens) for tokens, _ in rows)
    sides = [([2] * n + tokens, [-100] * n + labels, [0] * n + [1] * len(tokens)) if left else
             (tokens + [2] * n, labels + [-100] * n, [1] * len(tokens) + [0] * n)
             for tokens, labels in rows for n in [T - len(tokens)]]
    return (torch.tensor(side, device=device) for side in zip(*sides))


def train(ask, peaks):
    prepare = transformers_training if ask["peer"] == "transformers" else litgpt_training
    model, loss_of = prepare(ask, DTYPES[ask["precision"]])
    peaks("weights")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, rows, batch = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0), ask["rows"], ask["batch"]
    model.train()
    tokens = seconds = 0
    for step in range(ask["warm"] + ask["steps"]):
        some, began = [rows[(step * batch + i) % len(rows)] for i in range(batch)], time.perf_counter()
        loss = loss_of(some)
        peaks("forward")
        loss.backward()
        peaks("backward")
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        peaks("step")
        if step >= ask["warm"]:
            tokens, seconds = tokens + sum(len(row[0]) for row in some), seconds + time.perf_counter() - began
    return dict(tokens_per_second=tokens / seconds, loss=value)


@torch.inference_mode()
def generate(ask, peaks):
    """Greedy, past any eos; the first prompts (one, or a batch) warm up; from the first again when they end."""
    batch, new, dtype = ask["batch"], ask["new"], DTYPES[ask["precision"]]
    prompts = [(tokens[:len(tokens) - sum(label != -100 for label in labels)], []) for tokens, labels in ask["rows"]]
    if ask["peer"] == "litgpt":
        from litgpt.generate.base import generate
        from litgpt.model import GPT
        with torch.device(ask["device"]):
            model = GPT(litgpt_config(ask)).to(dtype).eval()
        model.max_seq_length = max(len(tokens) for tokens, _ in prompts) + new
        model.set_kv_cache(1, device=ask["device"], dtype=dtype)

        def answer(rows, new):
            prompt = torch.tensor(rows[0][0], device=ask["device"])
            return [generate(model, prompt, len(prompt) + new, temperature=0.0, top_p=0.0, include_prompt=False).tolist()]
    else:
        model = transformers_model(ask, dtype).eval()
        model.generation_config.eos_token_id = None

        def answer(rows, new):
            tokens, _, mask = padded([(tokens, [-100] * len(tokens)) for tokens, _ in rows], ask["device"], left=True)
            return model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=new, use_cache=ask["cache"],
                                  pad_token_id=2)[:, tokens.shape[1]:].tolist()
    peaks("weights")
    answers, seconds = [], []
    for start in range(0, batch * ask["prompts"] + batch, batch):
        began = time.perf_counter()
        answers += answer([prompts[i % len(prompts)] for i in range(start, start + batch)], new if start else min(new, 64))
        seconds.append(time.perf_counter() - began)
    peaks("generate")
    assert all(len(answer) == new for answer in answers[batch:])
    return dict(tokens_per_second=batch * ask["prompts"] * new / sum(seconds[1:]), ids=answers[batch:])


def leave_with(parent):
    """End when the process that waits for the figures has ended, so that nothing runs beside those of the next."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main():
    first_to_go()
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    ask = json.load(sys.stdin)
    torch.manual_seed(0)
    peaks = Peaks(torch.device(ask["device"]))
    peaks("start")
    result = (generate if "new" in ask else train)(ask, peaks)
    packages = {"transformers": ("transformers", "peft"), "litgpt": ("litgpt",)}[ask["peer"]] + ("torch",)
    print(json.dumps({**result, "peaks": peaks.mb, "versions": {name: importlib.metadata.version(name) for name in packages}}))


if __name__ == "__main__":
    main()
