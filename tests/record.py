"""The same models, layers and run built twice: here, and with transformers and PEFT.

python -m tests.record                      writes recorded.json, numbers of the peers alone
python -m tests.record META HF DATA.json    compares a real base in both layouts, on 20 prompts

tests/test_peers.py compares the two sides, tests/test_recorded.py compares ours with the file.
Weights and inputs come from a formula: a random generator may change with torch's release.  The
run reads EXAMPLES and the demo's tokenizer: when either changes, the file must be written anew.
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

import finetune.job
import train
from llama import ModelArgs, Tokenizer, Transformer, load_checkpoint, save_checkpoint
from finetune.batches import plan_epoch
from finetune.dataset import encode_prompt
from finetune.examples import read_examples
from llama.huggingface import as_halves, as_pairs, hf_name
from llama.sampling import generate
from lora import LoRAEmbedding, LoRALinear, lora_state_dict

from .helpers import EXAMPLES, ROOT, adapter_tensors, metrics
from .peers import pad

RECORDED = Path(__file__).with_name("recorded.json")
TOKENIZER = ROOT / "finetune/demo/tokenizer.model"   # fixed bytes

SHAPES = {
    "MHA": {},
    "GQA": {"n_kv_heads": 2},
    "MQA": {"n_kv_heads": 1},
    "tied": {"tie_embeddings": True, "n_kv_heads": 2},
    "other theta": {"rope_theta": 500.0},
    "other eps": {"norm_eps": 0.1},                  # far from 1e-5, so that it shows
    "odd sizes, multiple of 1": {"dim": 36, "n_heads": 6, "n_kv_heads": 3, "multiple_of": 1,
                                 "n_layers": 3},
    "odd sizes, multiple of 7": {"dim": 36, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 7,
                                 "rope_theta": 1e6},
    "wide SwiGLU": {"ffn_dim_multiplier": 1.3, "multiple_of": 8},
}
RECORDED_SHAPES = ("GQA", "tied", "other eps", "odd sizes, multiple of 7")
LAYERS = {                                           # kind: (base, r, alpha, input)
    "LoRALinear": (lambda: nn.Linear(10, 7), 4, 6, lambda: wave(2, 3, 10, start=900)),
    "LoRALinear without bias": (lambda: nn.Linear(36, 53, bias=False), 3, 32,
                                lambda: wave(9, 36, start=900)),
    "LoRAEmbedding": (lambda: nn.Embedding(11, 6), 3, 7, lambda: ids(2, 8, 11)),
}
# A much larger LR makes the run chaotic: rounding grows past any tolerance worth having.
STEPS = 50
WARMUP = 5
LR = 1.2e-2
DECAY = 0.01
BATCH = 4
ACCUMULATION = 2
R = 4
ALPHA = 6


def wave(*shape, start=0, std=0.2):
    """Return sin(i^2) for i from `start`; of sin(i), every matrix would have rank 2."""
    i = torch.arange(start, start + math.prod(shape), dtype=torch.float64)
    return (std * math.sqrt(2) * torch.sin(i * i)).float().view(shape)


def ids(B, T, vocab):
    i = torch.arange(T)
    return (i * i * 7 + 3 * i + 11 * torch.arange(B)[:, None]) % vocab


@torch.no_grad()
def fill(named, std=0.2):
    """Give each parameter its own stretch of the wave, gains around 1."""
    start = 0
    for name, parameter in sorted(named):
        values = wave(*parameter.shape, start=start, std=std)
        parameter.copy_(1 + values if "norm" in name else values)
        start += parameter.numel()


def ours(**sizes):
    small = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 53, "multiple_of": 16}
    model = Transformer(ModelArgs(**(small | sizes)))
    fill(model.named_parameters())
    return model.eval()


def turned_heads(path, args):
    """How many heads the rows of this matrix make, if RoPE turns them, else None."""
    return {"wq": args.n_heads, "wk": args.n_kv_heads}.get(path.rpartition(".")[2])


def peer_model(model):
    """Return the LlamaForCausalLM with these weights, its attention written out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model.args
    width = int((args.ffn_dim_multiplier or 1) * (8 * args.dim // 3))
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        intermediate_size=math.ceil(width / args.multiple_of) * args.multiple_of,
        rms_norm_eps=args.norm_eps, tie_word_embeddings=args.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager"))
    state = {}
    for name, weight in model.state_dict().items():
        path = name.removesuffix(".weight")
        state[hf_name(name)] = as_halves(weight, turned_heads(path, args))
    peer.load_state_dict(state)
    return peer.eval()


def prompts():
    return [(ids(1, T, 53)[0] + T).remainder(53).tolist() for T in (1, 2, 5, 11, 30)]


def our_greedy(shape):
    """Return 30 tokens after each prompt: all in one batch, without a cache."""
    answers = [[] for _ in prompts()]
    for i, token in generate(ours(**SHAPES[shape]), prompts(), max_new_tokens=30, eos_id=-1):
        answers[i].append(token)
    return answers


def peer_greedy(shape):
    """Return the same by transformers: one prompt at a time, with a cache."""
    peer = peer_model(ours(**SHAPES[shape]))
    answers = []
    for prompt in prompts():
        row = torch.tensor([prompt])
        ids = peer.generate(row, attention_mask=torch.ones_like(row), do_sample=False,
                            max_new_tokens=30, pad_token_id=0)
        answers.append(ids[0, len(prompt):].tolist())
    return answers


def our_layer(kind):
    """(layer, A, B), every tensor from the wave."""
    make, r, alpha, _ = LAYERS[kind]
    base = make()
    fill(base.named_parameters())
    kind = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
    layer = kind(base, r, alpha)
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
    """Return {name: tensor}: output, gradients, merged weight."""
    x = LAYERS[kind][3]()
    wanted = {"gradient of A": A, "gradient of B": B}
    if x.is_floating_point():
        wanted["gradient of x"] = x.requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad((y * wave(*y.shape, start=500)).sum(), wanted.values())
    layer.merge()
    merged = layer.base.weight if hasattr(layer, "base") else layer.base_layer.weight
    numbers = dict(zip(wanted, gradients, strict=True))
    return {"output": y.detach(), **numbers, "merged weight": merged.detach()}


def run_base():
    return ours(n_kv_heads=2, vocab_size=Tokenizer(TOKENIZER).vocab_size)


@functools.cache
def trained_by_us():
    """Return (rows of metrics.jsonl, adapter) of the run through the command line."""
    load_model = finetune.job.load_model

    def load_and_fill(*args):                        # What torch's generator drew is replaced.
        model, adapter_paths = load_model(*args)
        start_adapter(lora_state_dict(model).items())
        return model, adapter_paths

    patched = mock.patch.object(finetune.job, "load_model", load_and_fill)
    with tempfile.TemporaryDirectory() as name, patched:
        folder = Path(name)
        save_checkpoint(run_base(), Tokenizer(TOKENIZER), folder / "base")
        (folder / "examples.json").write_text(json.dumps(EXAMPLES))
        flags = {"checkpoint": folder / "base", "data": folder / "examples.json",
                 "out": folder / "out", "device": "cpu", "precision": "fp32", "targets": "all",
                 "r": R, "alpha": ALPHA, "dropout": 0, "lr": LR, "weight-decay": DECAY,
                 "schedule": "cosine", "batch-size": BATCH, "accumulation-steps": ACCUMULATION,
                 "warmup-steps": WARMUP, "epochs": 999, "max-steps": STEPS, "clip-grad-norm": 1}
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([f"--{flag}={value}" for flag, value in flags.items()])
        return metrics(folder / "out"), adapter_tensors(folder / "out")


def start_adapter(named):
    """Fill A of each pair and set B to zero, and the other way round for an embedding."""
    named = dict(named)
    filled = []
    for name, tensor in named.items():
        if name.endswith("lora_B") == ("tok_embeddings" in name):
            filled.append((name, tensor))
        else:
            nn.init.zeros_(tensor)
    fill(filled)


def encoded_by_hand():
    """Return [(ids, labels)] of EXAMPLES, by sentencepiece and nothing of ours."""
    sp = spm.SentencePieceProcessor(model_file=str(TOKENIZER))
    rows = []
    for example in EXAMPLES:
        paired = ", paired with an input that provides further context" if example["input"] else ""
        given = f"### Input:\n{example['input']}\n\n" if example["input"] else ""
        text = (f"Below is an instruction that describes a task{paired}. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\n"
                f"{example['instruction']}\n\n{given}### Response:")
        prompt = [1] + sp.encode(text)
        answer = sp.encode(example["output"]) + [2]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    return rows


def order():
    """Give the micro-batches of indices of each step: the one thing taken from our side."""
    for epoch in itertools.count():
        for batches, in plan_epoch([0] * len(EXAMPLES), BATCH, ACCUMULATION, seed=0, epoch=epoch):
            yield batches


def peer_adapter(peer, base):
    """Return {our name: (PEFT's parameter, heads that RoPE turns)}."""
    adapter = {}
    for name, weight in base.named_parameters():
        if weight.dim() == 2:
            path = name.removesuffix(".weight")
            A, B = peft_tensors(peer.get_submodule(f"base_model.model.{hf_name(path)}"))
            adapter[f"{path}.lora_A"] = (A, None)
            adapter[f"{path}.lora_B"] = (B, turned_heads(path, base.args))
    return adapter


def backward(peer, micro_batches):
    """Back-propagate the mean loss per answer token, written out; return it."""
    columns = [pad(rows, "cpu") for rows in micro_batches]
    n_targets = sum((labels != -100).sum() for _, labels, _ in columns)
    total = 0.0
    for tokens, labels, mask in columns:
        logits = peer(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        log_p = logits[:, :-1].log_softmax(-1).flatten(0, 1)
        loss = F.nll_loss(log_p, labels[:, 1:].flatten(), reduction="sum") / n_targets
        loss.backward()
        total += loss.item()
    return total


@functools.cache
def trained_by_peers():
    """Return (losses, adapter in our names and order of rows) of the same run by the peers."""
    from peft import LoraConfig, get_peft_model

    base = run_base()
    paths = [name.removesuffix(".weight") for name, p in base.named_parameters() if p.dim() == 2]
    targets = sorted({hf_name(path).rpartition(".")[2] for path in paths})
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets)
    peer = get_peft_model(peer_model(base), config).train()
    adapter = peer_adapter(peer, base)
    # B is zero where RoPE turns its rows.
    start_adapter((name, parameter) for name, (parameter, _) in adapter.items())
    trainable = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=DECAY)
    data = encoded_by_hand()
    losses = []
    for step, batches in enumerate(itertools.islice(order(), STEPS)):
        micro_batches = [[data[i] for i in batch] for batch in batches]
        losses.append(backward(peer, micro_batches))
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in trainable))
        for parameter in trainable:
            parameter.grad *= min(1.0, 1 / norm)
        share = (step + 1) / (WARMUP + 1)
        if step >= WARMUP:
            share = math.cos(math.pi / 2 * (step - WARMUP) / (STEPS - WARMUP)) ** 2
        optimizer.param_groups[0]["lr"] = LR * share
        optimizer.step()
        optimizer.zero_grad()
    tensors = {}
    for name, (parameter, heads) in adapter.items():
        tensors[name] = as_pairs(parameter.detach(), heads)
    return losses, tensors


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
    """Print how far a base's logits are from transformers', on 20 prompts."""
    from transformers import LlamaForCausalLM

    model, tokenizer = load_checkpoint(meta, dtype=torch.float32)
    peer = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    model.eval()
    largest = 0.0
    n_alike = 0
    n_places = 0
    for example in read_examples(data)[:20]:
        tokens = torch.tensor([encode_prompt(example, tokenizer)])
        logits = model(tokens)
        expected = peer(tokens).logits
        largest = max(largest, ((logits - expected).abs().max() / expected.abs().max()).item())
        n_alike += (logits.argmax(-1) == expected.argmax(-1)).sum().item()
        n_places += tokens.numel()
    print(f"{meta}: largest difference {largest:.1e} of the largest logit; the likeliest token "
          f"alike at {n_alike} of {n_places} positions")


def main():
    packages = ("torch", "transformers", "peft")
    recorded = {"made by": {name: importlib.metadata.version(name) for name in packages}}
    with torch.no_grad():
        for shape in RECORDED_SHAPES:
            logits = peer_model(ours(**SHAPES[shape]))(ids(1, 200, 53)).logits
            recorded[f"logits, {shape}"] = numbers(sampled_logits(logits))
            recorded[f"largest logit, {shape}"] = logits.abs().max().item()
    recorded["greedy, GQA"] = peer_greedy("GQA")
    for kind in ("LoRALinear", "LoRAEmbedding"):
        for name, tensor in layer_numbers(kind, *peer_layer(kind)).items():
            recorded[f"{kind}, {name}"] = numbers(tensor)
    losses, adapter = trained_by_peers()
    recorded["losses"] = numbers(torch.tensor(losses, dtype=torch.float64))
    for name, tensor in adapter.items():
        values = numbers(sampled_adapter(tensor))
        recorded[f"adapter, {name}"] = {"norm": tensor.norm().item(), "values": values}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in recorded.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{RECORDED.relative_to(ROOT)}: {len(lines)} entries, {RECORDED.stat().st_size:,} bytes")


if __name__ == "__main__":
    compare(*sys.argv[1:]) if len(sys.argv) == 4 else main()
