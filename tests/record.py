"""The same models, layers and run built twice: here, and with transformers and PEFT (tests/requirements.txt).

    python -m tests.record                      writes tests/recorded.json, numbers of transformers and PEFT alone
    python -m tests.record META HF DATA.json    compares a real base, in Meta's and in Hugging Face's layout, on 20 prompts

tests/test_peers.py compares the two sides; tests/test_recorded.py compares ours with the file and needs no peer.
Weights and inputs come from a formula: a random generator may give other numbers in another release of torch.
The run reads EXAMPLES and the demo's tokenizer: when either changes, the file has to be written anew.
"""
import contextlib
import functools
import importlib.metadata
import io
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path
from unittest import mock

import sentencepiece as spm
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from llama import ModelArgs, Tokenizer, Transformer, load_checkpoint, save_checkpoint
from finetune.batches import plan_epoch
from finetune.dataset import encode_prompt, read_examples
from llama.sampling import generate
from lora import LoRAEmbedding, LoRALinear, lora_state_dict

from .helpers import EXAMPLES, ROOT, adapter_tensors, metrics

RECORDED = Path(__file__).with_name("recorded.json")
TOKENIZER = ROOT / "finetune/demo/tokenizer.model"               # fixed bytes, which a tokenizer trained here would not be

SHAPES = {
    "MHA": dict(),
    "GQA": dict(n_kv_heads=2),
    "MQA": dict(n_kv_heads=1),
    "tied": dict(tie_embeddings=True, n_kv_heads=2),
    "other theta": dict(rope_theta=500.0),
    "other eps": dict(norm_eps=0.1),                           # far from 1e-5, so that it shows
    "odd sizes, multiple of 1": dict(dim=36, n_heads=6, n_kv_heads=3, multiple_of=1, n_layers=3),
    "odd sizes, multiple of 7": dict(dim=36, n_heads=6, n_kv_heads=2, multiple_of=7, rope_theta=1e6),
    "wide SwiGLU": dict(ffn_dim_multiplier=1.3, multiple_of=8),
}
RECORDED_SHAPES = ("GQA", "tied", "other eps", "odd sizes, multiple of 7")
LAYERS = {                                                     # kind: (base, r, alpha, input)
    "LoRALinear": (lambda: nn.Linear(10, 7), 4, 6, lambda: wave(2, 3, 10, start=900)),
    "LoRALinear without bias": (lambda: nn.Linear(36, 53, bias=False), 3, 32, lambda: wave(9, 36, start=900)),
    "LoRAEmbedding": (lambda: nn.Embedding(11, 6), 3, 7, lambda: ids(2, 8, 11)),
}
# The run.  A much larger LR makes it chaotic: rounding then grows from step to step past any tolerance worth having.
STEPS, WARMUP, LR, DECAY, BATCH, ACCUMULATION, R, ALPHA = 50, 5, 1.2e-2, 0.01, 4, 2, 4, 6


def wave(*shape, start=0, std=0.2):
    """sin(i^2) for i from `start`, made in fp64; of sin(i), every matrix would have rank 2."""
    i = torch.arange(start, start + math.prod(shape), dtype=torch.float64)
    return (std * math.sqrt(2) * torch.sin(i * i)).float().view(shape)


def ids(B, T, vocab):
    return torch.tensor([[(i * i * 7 + 3 * i + 11 * b) % vocab for i in range(T)] for b in range(B)])


@torch.no_grad()
def fill(named, std=0.2):
    """Give each parameter its own stretch of the wave, gains around 1; large enough for every part to matter."""
    start = 0
    for name, parameter in sorted(named):
        values = wave(*parameter.shape, start=start, std=std)
        parameter.copy_(1 + values if "norm" in name else values)
        start += parameter.numel()


def ours(**sizes):
    model = Transformer(ModelArgs(**{**dict(dim=32, n_layers=2, n_heads=4, vocab_size=53, multiple_of=16), **sizes}))
    fill(model.named_parameters())
    return model.eval()


PEER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
              "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
              "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
              "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def peer_path(path):
    """layers.0.attention.wq -> model.layers.0.self_attn.q_proj."""
    if path.startswith("layers."):
        _, i, rest = path.split(".", 2)
        return f"model.layers.{i}.{PEER_NAMES[rest]}"
    return PEER_NAMES[path]


def turned_heads(path, args):
    """How many heads the rows of this matrix make, if RoPE turns them, else 0."""
    return {"wq": args.n_heads, "wk": args.n_kv_heads}.get(path.rpartition(".")[2], 0)


def to_halves(rows, heads):
    """RoPE turns neighbouring rows of a head here, row j and j + hd/2 there: the even rows first, then the odd."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else rows


def to_pairs(rows, heads):
    """to_halves undone."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else rows


def peer_model(model):
    """The LlamaForCausalLM with the weights of `model`; its attention is the written-out one, ours is fused."""
    from transformers import LlamaConfig, LlamaForCausalLM
    args = model.args
    width = int((args.ffn_dim_multiplier or 1) * (8 * args.dim // 3))
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads, intermediate_size=-(-width // args.multiple_of) * args.multiple_of,
        rms_norm_eps=args.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=args.tie_embeddings, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager"))
    paths = {name: name.removesuffix(".weight") for name in model.state_dict()}
    peer.load_state_dict({f"{peer_path(paths[name])}.weight": to_halves(weight, turned_heads(paths[name], args))
                          for name, weight in model.state_dict().items()})
    return peer.eval()


def prompts():
    return [(ids(1, T, 53)[0] + T).remainder(53).tolist() for T in (1, 2, 5, 11, 30)]


def our_greedy(shape):
    """30 tokens after each prompt: all in one batch, without a cache."""
    answers = [[] for _ in prompts()]
    for i, token in generate(ours(**SHAPES[shape]), prompts(), max_new_tokens=30, eos_id=-1):
        answers[i].append(token)
    return answers


def peer_greedy(shape):
    """The same by transformers: one prompt at a time, with a cache."""
    peer = peer_model(ours(**SHAPES[shape]))
    rows = [torch.tensor([prompt]) for prompt in prompts()]
    return [peer.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=30,
                          pad_token_id=0)[0, row.shape[1]:].tolist() for row in rows]


def our_layer(kind):
    """(layer, A, B), every tensor from the wave."""
    make, r, alpha, _ = LAYERS[kind]
    base = make()
    fill(base.named_parameters())
    layer = (LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear)(base, r, alpha)
    fill([("A", layer.lora_A), ("B", layer.lora_B)])
    return layer, layer.lora_A, layer.lora_B


def peer_layer(kind):
    """The same by PEFT."""
    from peft import LoraConfig, inject_adapter_in_model
    make, r, alpha, _ = LAYERS[kind]
    module = nn.ModuleDict({"base": make()})
    fill(module["base"].named_parameters())
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=["base"])
    layer = inject_adapter_in_model(config, module)["base"]
    A, B = peft_tensors(layer)
    fill([("A", A), ("B", B)])
    return layer, A, B


def peft_tensors(layer):
    if len(layer.lora_embedding_A):
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def layer_numbers(kind, layer, A, B):
    """{what: tensor}: output, gradients, merged weight."""
    x = LAYERS[kind][3]()
    wanted = {"gradient of A": A, "gradient of B": B}
    if x.is_floating_point():
        wanted["gradient of x"] = x.requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad((y * wave(*y.shape, start=500)).sum(), wanted.values())
    layer.merge()
    merged = layer.base.weight if hasattr(layer, "base") else layer.base_layer.weight
    return {"output": y.detach(), **dict(zip(wanted, gradients)), "merged weight": merged.detach()}


def run_base():
    return ours(n_kv_heads=2, vocab_size=Tokenizer(TOKENIZER).vocab_size)


@functools.cache
def trained_by_us():
    """(rows of metrics.jsonl, adapter) of the run through the command line."""
    load_model = train.load_model

    def load_and_fill(*args):                                  # what torch's generator drew gives way to the wave
        model, wrapped = load_model(*args)
        start_adapter(lora_state_dict(model).items())
        return model, wrapped
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train, "load_model", load_and_fill):
        folder = Path(folder)
        save_checkpoint(run_base(), Tokenizer(TOKENIZER), folder / "base")
        (folder / "examples.json").write_text(json.dumps(EXAMPLES))
        flags = {"checkpoint": folder / "base", "data": folder / "examples.json", "out": folder / "out", "device": "cpu",
                 "precision": "fp32", "targets": "all", "r": R, "alpha": ALPHA, "dropout": 0,
                 "lr": LR, "weight-decay": DECAY, "schedule": "cosine",
                 "batch-size": BATCH, "accumulation-steps": ACCUMULATION, "warmup-steps": WARMUP, "epochs": 999,
                 "max-steps": STEPS, "clip-grad-norm": 1}
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([word for flag, value in flags.items() for word in (f"--{flag}", str(value))])
        return metrics(folder / "out"), adapter_tensors(folder / "out")


def start_adapter(named):
    """One half of each pair from the wave, the other at zero: A and B, and for an embedding B and A."""
    named = dict(named)
    first = {name for name in named if name.endswith("lora_B" if "tok_embeddings" in name else "lora_A")}
    fill((name, named[name]) for name in first)
    for name in named.keys() - first:
        nn.init.zeros_(named[name])


def encoded_by_hand():
    """[(ids, labels)] of EXAMPLES, by sentencepiece and nothing of ours."""
    sp = spm.SentencePieceProcessor(model_file=str(TOKENIZER))
    rows = []
    for example in EXAMPLES:
        paired = ", paired with an input that provides further context" if example["input"] else ""
        given = f"### Input:\n{example['input']}\n\n" if example["input"] else ""
        text = (f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
                f"request.\n\n### Instruction:\n{example['instruction']}\n\n{given}### Response:")
        prompt, answer = [1] + sp.encode(text), sp.encode(example["output"]) + [2]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    return rows


def order():
    """Lists of micro-batches of indices, one list a step, for ever: the one thing taken from our side."""
    for epoch in itertools.count():
        for batches, in plan_epoch([0] * len(EXAMPLES), BATCH, ACCUMULATION, seed=0, epoch=epoch):
            yield batches


def peer_adapter(peer, base):
    """{our name: (PEFT's parameter, heads that RoPE turns)}."""
    found = {}
    for path in (name.removesuffix(".weight") for name, weight in base.named_parameters() if weight.dim() == 2):
        A, B = peft_tensors(peer.get_submodule(f"base_model.model.{peer_path(path)}"))
        found |= {f"{path}.lora_A": (A, 0), f"{path}.lora_B": (B, turned_heads(path, base.args))}
    return found


@functools.cache
def trained_by_peers():
    """(losses, adapter under our names and in our order of rows) of the same run, by transformers, PEFT and torch."""
    from peft import LoraConfig, get_peft_model
    base = run_base()
    peer = get_peft_model(peer_model(base), LoraConfig(
        r=R, lora_alpha=ALPHA, lora_dropout=0.0,
        target_modules=[path.rpartition(".")[2] for path in PEER_NAMES.values() if "norm" not in path]))
    adapter = peer_adapter(peer, base)
    start_adapter((name, parameter) for name, (parameter, _) in adapter.items())     # B is zero where RoPE turns its rows
    trainable = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=DECAY)
    data, batches, losses = encoded_by_hand(), order(), []
    peer.train()
    for step in range(STEPS):
        micros = [[data[i] for i in batch] for batch in next(batches)]
        n_targets = sum(label != -100 for rows in micros for _, labels in rows for label in labels)
        loss = 0.0
        for rows in micros:
            T = max(len(tokens) for tokens, _ in rows)
            tokens = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens, _ in rows])
            mask = torch.tensor([[1] * len(tokens) + [0] * (T - len(tokens)) for tokens, _ in rows])
            labels = torch.tensor([labels + [-100] * (T - len(labels)) for _, labels in rows])
            logits = peer(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            nll = F.nll_loss(logits[:, :-1].log_softmax(-1).flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (nll / n_targets).backward()
            loss += nll.item() / n_targets
        norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in trainable))
        for parameter in trainable:
            parameter.grad *= min(1.0, 1 / norm)
        rising, falling = (step + 1) / (WARMUP + 1), math.cos(math.pi / 2 * (step - WARMUP) / (STEPS - WARMUP)) ** 2
        optimizer.param_groups[0]["lr"] = LR * (rising if step < WARMUP else falling)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses, {name: to_pairs(parameter.detach(), heads) for name, (parameter, heads) in adapter.items()}


def sampled_logits(logits):
    """A few of one row's, from its first position to its 199th."""
    return logits[0, ::66, ::7]


def sampled_adapter(tensor):
    """Four of its values, evenly spread."""
    return tensor.flatten()[::tensor.numel() // 4][:4]


def numbers(tensor):
    """A flat list, to 8 digits: fp32 has fewer."""
    return [float(f"{value:.8g}") for value in tensor.flatten().tolist()]


@torch.no_grad()
def compare(meta, hf, data):
    from transformers import LlamaForCausalLM
    model, tokenizer = load_checkpoint(meta, dtype=torch.float32)
    peer = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    largest = alike = positions = 0
    for example in read_examples(data)[:20]:
        tokens = torch.tensor([encode_prompt(example, tokenizer)])
        found, expected = model.eval()(tokens), peer.eval()(tokens).logits
        largest = max(largest, ((found - expected).abs().max() / expected.abs().max()).item())
        alike += (found.argmax(-1) == expected.argmax(-1)).sum().item()
        positions += tokens.numel()
    print(f"{meta}: largest difference {largest:.1e} of the largest logit; the likeliest token alike at {alike} of {positions} positions")


def main():
    recorded = {"made by": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")}}
    with torch.no_grad():
        for shape in RECORDED_SHAPES:
            logits = peer_model(ours(**SHAPES[shape]))(ids(1, 200, 53)).logits
            recorded[f"logits, {shape}"] = numbers(sampled_logits(logits))
            recorded[f"largest logit, {shape}"] = logits.abs().max().item()
    recorded["greedy, GQA"] = peer_greedy("GQA")
    for kind in ("LoRALinear", "LoRAEmbedding"):
        for what, tensor in layer_numbers(kind, *peer_layer(kind)).items():
            recorded[f"{kind}, {what}"] = numbers(tensor)
    losses, adapter = trained_by_peers()
    recorded["losses"] = numbers(torch.tensor(losses, dtype=torch.float64))
    for name, tensor in adapter.items():
        recorded[f"adapter, {name}"] = {"norm": tensor.norm().item(), "values": numbers(sampled_adapter(tensor))}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in recorded.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{RECORDED.relative_to(ROOT)}: {len(lines)} entries, {RECORDED.stat().st_size:,} bytes")


if __name__ == "__main__":
    compare(*sys.argv[1:]) if len(sys.argv) == 4 else main()
