"""Other tools' folders in and out, to the bit, or refused: Hugging Face's, PEFT's, and convert."""
import io
import json
import os
import random
import resource
import struct
import sys
from dataclasses import asdict

import pytest
import sentencepiece as spm
import torch

import generate
import train
from finetune import convert
from llama import ModelArgs, Tokenizer, huggingface, load_checkpoint, save_checkpoint
from llama.files import write_tensors
from llama.huggingface import args_with_hidden_dim, as_halves, as_pairs
from llama.peft import adapter_at
from lora import load_adapter, lora_disabled, merge_lora, read_adapter, save_adapter
from lora.adapter import lora_layers

from . import reference
from .helpers import (CORPUS, DROP, EXAMPLES, HAS_SAFETENSORS, Attack, adapt, files_in,
                      needs_peers, needs_safetensors, saved, spoil, stored, tiny)

IN_BOTH_KINDS_OF_FILE = pytest.mark.parametrize(
    "suffix", [".bin", pytest.param(".safetensors", marks=needs_safetensors)])
WEIGHTS = "pytorch_model.bin"
PREFIX = "base_model.model.model."
KINDS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "mqa": {"n_kv_heads": 1},
    "tied": {"n_kv_heads": 2, "tie_embeddings": True},
    "odd": {"dim": 30, "n_heads": 5, "n_layers": 3, "multiple_of": 7, "vocab_size": 411,
            "norm_eps": 1e-6, "rope_theta": 5e5},
    "narrow": {"dim": 48, "n_heads": 12, "n_kv_heads": 4, "multiple_of": 1,
               "ffn_dim_multiplier": 0.3},
}
ADAPTED = [
    {},
    {"targets": ("wq", "wk", "wv", "wo")},
    {"targets": ("tok_embeddings", "output")},
    {"method": "rslora", "targets": ("wq", "tok_embeddings")},
    {"method": "dora", "targets": ("wq", "wk", "w2")},
]
TOKENS = torch.tensor([[1, 5, 9, 7, 3, 380, 12, 12, 4, 60]])
TEXTS = [*CORPUS, *(example["instruction"] for example in EXAMPLES), "Below is\n\n### Response:",
         "a", "", " ", "  two", "a  b ", "x\n    y", "1234 5.67", "na\u00efve \u6f22\U0001f642",
         "tab\tx .", "\u2581", "the instruction"]


@pytest.fixture(params=KINDS)
def meta(request, tmp_path, tokenizer):
    """A folder in Meta's layout, of each kind."""
    save_checkpoint(tiny(**KINDS[request.param]), tokenizer, tmp_path / "meta")
    return tmp_path / "meta"


def run(*flags, suffix=""):
    """Convert; a suffix of .bin is the flag --bin."""
    flags = [str(flag) for flag in flags]
    convert.main(flags + ["--bin"] if suffix == ".bin" else flags)


def to_hf(base, suffix=".bin"):
    """Return the base as a Hugging Face folder beside it."""
    run(base, base.parent / "hf", "--to", "hf", suffix=suffix)
    return base.parent / "hf"


def loaded(folder, **settings):
    """Return the model of a folder."""
    return load_checkpoint(folder, **settings)[0].eval()


def equal(one, other):
    """Tell whether two dicts hold the same tensors in the same dtypes."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])
        for name in one)


def close(one, other):
    return (one - other).abs().max() <= 1e-5 * one.abs().max()


def adapter_of(base, path, layers=None, **settings):
    """Save an adapter over `base` at `path`; return the model that has it."""
    settings = {"r": 3, "alpha": 7, "dropout": 0.1, "targets": "all"} | settings
    model = adapt(loaded(base, layers=layers), std=0.2, **settings)
    save_adapter(model, path)
    return model


def with_adapter(base, path):
    """Return the model of a base with the adapter of a file or of PEFT's folder."""
    model = loaded(base)
    load_adapter(model, adapter_at(path, model.args))
    return model.eval()


def peft_folder(base, path, suffix=".bin", **settings):
    """Write an adapter as PEFT's folder at `path`, ours beside it; return the model that has it."""
    model = adapter_of(base, path.with_suffix(".pt"), **settings)
    run(base, path, "--to", "peft", "--adapter", path.with_suffix(".pt"), suffix=suffix)
    return model


# --- bases


@IN_BOTH_KINDS_OF_FILE
@pytest.mark.parametrize("shard_mb", [None, "1"])
def test_meta_to_hugging_face_to_meta_is_bit_equal(meta, tmp_path, suffix, shard_mb, monkeypatch):
    """Each tensor keeps its own dtype."""
    state = stored(meta)
    for name in ("norm.weight", "layers.0.attention.wk.weight"):
        state[name] = state[name].bfloat16()
    torch.save(state, meta / "consolidated.00.pth")
    hf = tmp_path / "hf"
    flags = ["--to", "hf"]
    if shard_mb:                                     # of fewer bytes, for models as small as these
        save = huggingface.save
        monkeypatch.setattr(huggingface, "save", lambda *args: save(*args[:-1], args[-1] // 50))
        flags += ["--shard-mb", shard_mb]
    run(meta, hf, *flags, suffix=suffix)
    names = [path.name for path in hf.glob(f"*{suffix}")]
    whole = "pytorch_model.bin" if suffix == ".bin" else "model.safetensors"
    assert len(names) > 2 if shard_mb else names == [whole]
    # What holds all dtypes.
    assert json.loads((hf / "config.json").read_text())["torch_dtype"] == "float32"
    run(hf, tmp_path / "back", "--to", "meta")
    assert equal(stored(tmp_path / "back"), state)
    prints = {loaded(tmp_path / name).origin["fingerprint"] for name in ("meta", "hf", "back")}
    assert len(prints) == 1
    first, = loaded(hf, layers=1, dtype=torch.float64).layers
    assert torch.equal(first.attention.wk.weight,
                       loaded(meta).layers[0].attention.wk.weight.double())
    modes = {path.stat().st_mode & 0o777 for path in (*hf.iterdir(), meta / "params.json")}
    assert len(modes) == 1


def test_rows_are_turned_as_by_hand():
    """Two heads of width 6: in Meta's order, then in Hugging Face's."""
    pairs = torch.arange(12)[:, None]
    halves = torch.tensor([0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11])[:, None]
    assert torch.equal(as_halves(pairs, 2), halves) and torch.equal(as_pairs(halves, 2), pairs)
    assert as_halves(pairs, 1)[:3, 0].tolist() == [0, 2, 4] and as_halves(pairs, None) is pairs


OUR_NAMES = {
    "model.": "", "embed_tokens": "tok_embeddings", "lm_head": "output",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm"}


def test_what_is_written_is_the_same_model_where_halves_are_turned(meta, monkeypatch):
    """The naive reference with RoPE the other way, on the tensors as they are in the file."""
    weights = {}
    for name, tensor in stored(to_hf(meta), WEIGHTS).items():
        for their_name, our_name in OUR_NAMES.items():
            name = name.replace(their_name, our_name)
        weights[name] = tensor
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    turn_pairs = reference.turn

    def turn_halves(vector, position, theta):
        order = torch.arange(len(vector)).view(2, -1).T.flatten()    # 0, hd/2, 1, hd/2 + 1, ...
        return turn_pairs(vector[order], position, theta)[order.argsort()]

    monkeypatch.setattr(reference, "turn", turn_halves)
    model = loaded(meta)
    with torch.no_grad():
        expected = reference.naive_logits(weights, model.args, TOKENS[0].tolist())
        assert close(expected, model(TOKENS)[0].double())


def test_any_width_has_params_that_give_it():
    """By Meta's formula, and through params.json."""
    draw = random.Random(0)
    sizes = [(4096, 11008), (5120, 13824), (8192, 28672), (64, 1), (64, 170), (64, 171),
             (4096, 2 ** 20)]
    sizes += [(dim, 1) for dim in range(2, 400, 2)]
    sizes += [(2 * draw.randint(1, 4096), draw.randint(1, 30000)) for _ in range(2000)]
    for dim, width in sizes:
        args = args_with_hidden_dim({"dim": dim, "n_heads": 1, "multiple_of": width})
        again = ModelArgs(**json.loads(json.dumps(asdict(args))))
        assert args.hidden_dim == again.hidden_dim == width, (dim, width)
    assert args_with_hidden_dim({"dim": 4096, "n_heads": 32, "multiple_of": 11008}) == ModelArgs()


@pytest.mark.parametrize("changes", [
    {"torch_dtype": DROP, "dtype": "bfloat16", "rope_theta": DROP, "rope_scaling": DROP,
     "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    {"rope_scaling": {"type": "default"}, "rope_theta": 10000},
    {"rms_norm_eps": 1e-5, "head_dim": None},
])
def test_what_other_versions_write_is_the_same_model(base, changes):
    hf = to_hf(base)
    spoil(hf / "config.json", changes)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(stored(hf, WEIGHTS) | frequencies, hf / WEIGHTS)
    one = loaded(hf)
    other = loaded(base)
    assert torch.equal(one(TOKENS), other(TOKENS))
    assert one.origin["fingerprint"] == other.origin["fingerprint"]
    spoil(hf / "config.json", {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}})
    assert loaded(hf).args.rope_theta == 77.0


@needs_peers
@IN_BOTH_KINDS_OF_FILE
def test_transformers_loads_ours_and_says_the_same(meta, suffix):
    from transformers import AutoModelForCausalLM

    hf = to_hf(meta, suffix)
    peer, info = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not any(info.values()) and peer.dtype == torch.float32
    with torch.no_grad():
        assert close(peer(TOKENS).logits, loaded(meta)(TOKENS))
    config = peer.generation_config
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


@needs_peers
@pytest.mark.parametrize("sizes", [
    {}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}, {"intermediate_size": 17}])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_what_transformers_saved_loads_here(tmp_path, tokenizer, sizes, shard):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 88, "rope_theta": 5e4,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | sizes
    peer = LlamaForCausalLM(LlamaConfig(initializer_range=0.2, **sizes))
    peer.save_pretrained(tmp_path, max_shard_size=shard)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model = loaded(tmp_path)
    assert model.args.max_seq_len == 2048
    assert loaded(tmp_path, max_seq_len=9).args.max_seq_len == 9
    with torch.no_grad():
        assert close(peer(TOKENS).logits, model(TOKENS))


# --- tokenizers


def trained_tokenizer(**settings):
    """Return the bytes of a sentencepiece model with these settings."""
    out = io.BytesIO()
    usual = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "pad_id": -1,
             "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=out, minloglevel=2,
                                   hard_vocab_limit=False, **(usual | settings))
    return out.getvalue()


def with_late_scores(model):
    """Return a tokenizer of which some pieces are joined late, as runs of spaces in LLaMA 2's."""
    model = bytearray(model)
    for piece in Tokenizer(bytes(model)).sp.id_to_piece(list(range(259, 320, 2))):
        if len(piece) == 2:
            text = piece.encode()
            entry = b"\n" + bytes([len(text)]) + text + b"\x15"
            at = model.index(entry) + len(entry)
            model[at:at + 4] = struct.pack("<f", -1e6 + at)
    return bytes(model)


@needs_peers
@pytest.mark.parametrize("kind", ["ours", "no space before", "scores"])
def test_transformers_gives_our_ids(base, kind):
    """Also of a tokenizer with other special pieces, which puts no space before a text."""
    from transformers import AutoTokenizer

    model = (base / "tokenizer.model").read_bytes()
    special = (1, 2)
    if kind == "no space before":
        model = trained_tokenizer(add_dummy_prefix=False, bos_id=3, eos_id=4,
                                  bos_piece="<|start|>", eos_piece="<|end|>")
        special = (3, 4)
    if kind == "scores":
        before = Tokenizer(model)
        model = with_late_scores(model)
        assert any(Tokenizer(model).encode(text) != before.encode(text) for text in TEXTS)
    (base / "tokenizer.model").write_bytes(model)
    peer = AutoTokenizer.from_pretrained(to_hf(base))
    tokenizer = Tokenizer(model)
    for text in TEXTS:
        assert peer(text)["input_ids"] == tokenizer.encode(text, bos=True), text
        ids = tokenizer.encode(text)
        assert peer.decode(ids) == tokenizer.decode(ids)
    assert (peer.bos_token_id, peer.eos_token_id) == special
    assert (tokenizer.bos_id, tokenizer.eos_id) == special
    assert peer("a").keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("settings", [
    {"model_type": "unigram", "vocab_size": 60, "byte_fallback": False},
    {"user_defined_symbols": ["<sep>"]},
])
def test_a_tokenizer_that_transformers_would_read_otherwise_is_refused(refused, base, settings):
    tokenizer = trained_tokenizer(**({"vocab_size": 300, "pad_id": -1} | settings))
    (base / "tokenizer.model").write_bytes(tokenizer)
    error = refused(convert.main, str(base), "new", "--to", "hf", "--bin")
    assert "transformers would read this tokenizer.model differently" in error
    model, tokenizer = load_checkpoint(base)
    with pytest.raises(ValueError, match="would read this tokenizer.model differently"):
        save_checkpoint(model, tokenizer, base.parent / "saved", "hf", ".bin")
    assert not [*(base.parent / "saved").iterdir()]  # no weights without a tokenizer
    run(base, base.parent / "new", "--to", "meta")


# --- adapters


@pytest.mark.parametrize("settings", ADAPTED)
@IN_BOTH_KINDS_OF_FILE
def test_an_adapter_goes_to_peft_and_back_to_the_bit(meta, tmp_path, settings, suffix):
    model = peft_folder(meta, tmp_path / "peft", suffix, **settings)
    before = read_adapter(tmp_path / "peft.pt")
    after = read_adapter(adapter_at(tmp_path / "peft", model.args))
    assert equal(before["tensors"], after["tensors"]) and after["base"] is None
    config = after["config"]
    assert (config.r, config.alpha, config.dropout) == (3, settings.get("alpha", 7), 0.1)
    assert set(config.targets) == {name.split(".")[-2] for name in before["tensors"]}
    assert torch.equal(with_adapter(to_hf(meta), tmp_path / "peft")(TOKENS), model(TOKENS))


def test_a_peft_folder_by_hand(base, tmp_path):
    """Names, settings and the rows of lora_B: 4 query heads and 2 key heads of width 8."""
    model = peft_folder(base, tmp_path / "peft", targets=("wk", "wv", "tok_embeddings"))
    tensors = stored(tmp_path / "peft", "adapter_model.bin")
    names = {f"embed_tokens.lora_embedding_{matrix}" for matrix in "AB"}
    for layer in ("layers.0.self_attn.", "layers.1.self_attn."):
        names |= {f"{layer}k_proj.lora_{matrix}.weight" for matrix in "AB"}
        names |= {f"{layer}v_proj.lora_{matrix}.weight" for matrix in "AB"}
    assert tensors.keys() == {PREFIX + name for name in names}
    attention = model.layers[1].attention
    name = f"{PREFIX}layers.1.self_attn."
    order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(tensors[f"{name}k_proj.lora_B.weight"], attention.wk.lora_B[order])
    assert torch.equal(tensors[f"{name}k_proj.lora_A.weight"], attention.wk.lora_A)
    assert torch.equal(tensors[f"{name}v_proj.lora_B.weight"], attention.wv.lora_B)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7,
        "base_model_name_or_path": config["base_model_name_or_path"], "lora_dropout": 0.1,
        "target_modules": ["embed_tokens", "k_proj", "v_proj"], "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True}


@needs_peers
@torch.no_grad()
@pytest.mark.parametrize("settings", ADAPTED)
def test_peft_runs_our_adapter(meta, tmp_path, settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = peft_folder(meta, tmp_path / "peft", **settings)
    alone = AutoModelForCausalLM.from_pretrained(to_hf(meta))
    assert not close(alone(TOKENS).logits, model(TOKENS))
    peer = PeftModel.from_pretrained(alone, tmp_path / "peft")
    assert close(peer(TOKENS).logits, model(TOKENS))


@needs_peers
@pytest.mark.parametrize("target_modules", [
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear",
    ["embed_tokens", "lm_head", "k_proj"],
    r".*\.(k_proj|down_proj)",
])
@pytest.mark.parametrize("method, safe", [
    ("lora", True), ("lora", False), ("rslora", True), ("dora", True)])
def test_an_adapter_of_peft_runs_here(meta, tmp_path, target_modules, method, safe):
    """Also in .bin, as PEFT saved adapters before safetensors."""
    if method == "dora" and "embed_tokens" in target_modules:
        pytest.skip("DoRA has no form for embeddings here")
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.2, target_modules=target_modules,
                        task_type="CAUSAL_LM", use_rslora=method == "rslora",
                        use_dora=method == "dora")
    peer = get_peft_model(AutoModelForCausalLM.from_pretrained(to_hf(meta)), config)
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    peer.save_pretrained(tmp_path / "peft")
    if not safe:
        (tmp_path / "peft/adapter_model.safetensors").unlink()
        torch.save(get_peft_model_state_dict(peer), tmp_path / "peft/adapter_model.bin")
    for folder in ("meta", "hf"):
        model = with_adapter(tmp_path / folder, tmp_path / "peft")
        assert (model.lora_config.method, model.lora_config.dropout) == (method, 0.2)
        with torch.no_grad():
            assert close(peer.eval()(TOKENS).logits, model(TOKENS))
            with lora_disabled(model):
                assert not close(peer(TOKENS).logits, model(TOKENS))


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_a_merged_folder_is_the_merged_model(meta, tmp_path, to, capsys):
    model = peft_folder(meta, tmp_path / "peft")
    merge_lora(model)
    for name in ("peft", "peft.pt"):
        run(meta, tmp_path / f"{name}-merged", "--to", to, "--adapter", tmp_path / name,
            suffix=".bin" if to == "hf" else "")
        assert torch.equal(loaded(tmp_path / f"{name}-merged")(TOKENS), model(TOKENS))
    survives = "merged: 100.0 % of the update survives in float32; logits of up to "
    assert capsys.readouterr().out.count(survives) == 2


def test_a_merge_says_what_it_lost_and_what_helps(base, tmp_path, capsys, monkeypatch):
    """With one set of weights in memory."""
    def save(model, *args):
        assert all(layer.original_base == (None,) for layer in lora_layers(model).values())
        save_checkpoint(model, *args)

    monkeypatch.setattr(convert, "save_checkpoint", save)
    path = tmp_path / "small.pt"
    save_adapter(adapt(loaded(base), std=0.004, targets="all"), path)  # far below bf16's steps
    advice = "WARNING, most of it is lost: use --dtype fp32, or leave the adapter unmerged"
    for dtype, is_lost in (("bf16", True), ("fp32", False)):
        run(base, tmp_path / dtype, "--to", "meta", "--adapter", path, "--dtype", dtype)
        printed = capsys.readouterr().out
        assert (advice in printed) == is_lost
        assert ("100.0 % of the update survives in float32" in printed) != is_lost
    assert {tensor.dtype for tensor in stored(tmp_path / "bf16").values()} == {torch.bfloat16}
    generate.main(["--adapter", str(path), "--merge", "--precision", "bf16",
                   "--max-new-tokens", "1"])
    assert "WARNING, most of it is lost: use --precision fp32" in capsys.readouterr().err


def test_generate_takes_a_peft_folder(base, tmp_path, monkeypatch, capsys):
    """Which names its base, and in a conversation too."""
    monkeypatch.chdir(tmp_path)
    peft_folder(to_hf(base), tmp_path / "peft")
    capsys.readouterr()

    def answered(*flags):
        generate.main([*flags, "--max-new-tokens", "12"])
        return capsys.readouterr()

    asked = ["--instruction", "Name a colour."]
    alone = ["--adapter", "none", "--checkpoint", "base"]
    file = answered("--adapter", "peft.pt", *asked)
    folder = answered("--adapter", "peft", *asked)
    assert file.out == folder.out and "whose base PEFT does not record" in folder.err
    assert answered(*alone, *asked).out != file.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(":adapter peft\nName a colour.\n"))
    assert file.out.split("\n")[2] in answered(*alone, "--interactive").out


@IN_BOTH_KINDS_OF_FILE
def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch, suffix):
    """The safetensors package writes a file of its own, and leaves it to the system to flush."""
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.add(os.fstat(fd).st_ino))
    path = tmp_path / f"model{suffix}"
    write_tensors(path, {"weight": torch.ones(2)})
    assert path.stat().st_ino in flushed and tmp_path.stat().st_ino in flushed


def test_weights_that_fp16_cannot_hold(tmp_path, tokenizer):
    model = tiny(tokenizer.vocab_size)
    with torch.no_grad():
        model.output.weight[0, 0] = 1e5
    save_checkpoint(model, tokenizer, tmp_path / "base")
    load_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="too large for fp16, in output.weight; bf16 holds them"):
        load_checkpoint(tmp_path / "base", dtype=torch.float16)


@pytest.mark.parametrize("name", ["peft", "peft.pt"])
def test_train_goes_on_from_an_adapter(base, data, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    peft_folder(base, tmp_path / "peft", targets=("wq", "wk"))
    train.main(["--checkpoint", str(base), "--data", str(data), "--adapter", name,
                "--lr", "1e-30", "--max-steps", "1", "--out", "next"])
    before = read_adapter("peft.pt")
    after = read_adapter("next/adapter.pt")          # a step of nearly nothing later
    assert equal(before["tensors"], after["tensors"])
    assert after["base"] == before["base"] | {"template": "alpaca"}
    config = after["config"]
    assert (config.r, config.alpha, config.dropout) == (3, 7, 0.1)
    assert json.loads((tmp_path / "next/args.json").read_text())["r"] == 3


def test_an_adapter_of_the_first_layers_converts_over_these(base, tmp_path, capsys):
    model = adapter_of(base, tmp_path / "one.pt", layers=1)
    run(base, tmp_path / "peft", "--to", "peft", "--adapter", tmp_path / "one.pt", "--bin")
    printed = capsys.readouterr().out
    assert "PEFT needs a base of 1 layer for it: --to hf --layers 1" in printed
    run(base, tmp_path / "merged", "--to", "hf", "--adapter", tmp_path / "peft", "--layers", "1",
        "--bin")
    merge_lora(model)
    assert torch.equal(loaded(tmp_path / "merged")(TOKENS), model(TOKENS))


# --- what is wrong


INDEX = "pytorch_model.bin.index.json"
NORM = saved({"model.norm.weight": torch.ones(32)})
WRONG_CONFIGS = [
    ({"model_type": "mistral"}, "model_type is 'mistral', which this model does not"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is {'type': 'linear'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_param"),
    ({"attention_bias": True}, "attention_bias is True, which this model does not"),
    ({"sliding_window": 4096}, "sliding_window is 4096, which this model does not"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"head_dim": 16}, "head_dim is 16, which this model does not"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"tie_word_embeddings": True},
     "ties lm_head.weight to model.embed_tokens.weight, but the weights differ"),
    ({"hidden_size": DROP}, "config.json lacks ['hidden_size']"),
    ({"hidden_size": "32"}, "hidden_size is '32', not a number of the right kind"),
    ({"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight, "),
    ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight (16, 32) for (32, 32)"),
]


@pytest.mark.parametrize("files, message", [
    *(({"config.json": changes}, message) for changes, message in WRONG_CONFIGS),
    ({"config.json": b"{"}, "config.json is not JSON"),
    ({"tokenizer.model": None, "tokenizer.json": b"{}"}, "no tokenizer.model in"),
    ({WEIGHTS: None}, "no model.safetensors or pytorch_model.bin in"),
    ({WEIGHTS: saved({"a": Attack()})}, "pytorch_model.bin is not a checkpoint of tensors"),
    ({WEIGHTS: saved({"model.norm.weight": torch.ones(32, dtype=torch.int8)})},
     "does not hold a dict of floating-point tensors"),
    ({WEIGHTS: saved({"norm.weight": torch.ones(32)})}, "missing: lm_head.weight, model.embed"),
    ({WEIGHTS: None, INDEX: b'{"weight_map": {"a": 1}}'}, "has no weight_map of names to files"),
    ({WEIGHTS: None, INDEX: b'{"weight_map": {"a": "b.bin"}}'}, "no b.bin in"),
    ({WEIGHTS: None, "a.bin": NORM, "b.bin": NORM,
      INDEX: b'{"weight_map": {"x": "a.bin", "y": "b.bin"}}'},
     "b.bin holds model.norm.weight, and another shard does too"),
    pytest.param({WEIGHTS: None, "model.safetensors": b"\x10\0\0\0\0\0\0\0{"},
                 "model.safetensors is not a checkpoint of tensors", marks=needs_safetensors),
    *(({WEIGHTS: None, INDEX: json.dumps({"weight_map": {"a": name}}).encode()},
       "which is not a file of this folder")
      for name in ("../base/consolidated.00.pth", "/etc/passwd", "..", "", "C:\\\\a.bin")),
])
def test_files_of_a_hugging_face_folder_that_are_wrong(refused, base, files, message):
    hf = to_hf(base)
    for name, content in files.items():
        spoil(hf / name, content)
    assert message in refused(convert.main, "hf", "new", "--to", "meta")
    assert not list(base.parent.glob("*new*"))


CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.bin"
QUERY = f"{PREFIX}layers.0.self_attn.q_proj."
SOME_BLOCKS = [f"{QUERY}lora_A.weight", f"{PREFIX}layers.1.self_attn.q_proj.lora_A.weight",
               f"{PREFIX}layers.1.self_attn.v_proj.lora_A.weight"]


@pytest.mark.parametrize("name, content, message", [
    (CONFIG, {"use_rslora": True, "use_dora": True}, "use_rslora and use_dora together, which the"),
    (CONFIG, {"bias": "all"}, "bias is 'all', which the adapters here do not"),
    (CONFIG, {"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    (CONFIG, {"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}"),
    (CONFIG, {"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    (CONFIG, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    (CONFIG, {"init_lora_weights": "olora", "use_dora": True}, "use_dora and olora together"),
    (CONFIG, {"something_new": {"a": 1}}, "something_new is {'a': 1}"),
    (CONFIG, {"lora_alpha": DROP}, "adapter_config.json lacks ['lora_alpha']"),
    (CONFIG, {"r": "3"}, "r is '3', must be a whole number from 1"),
    (CONFIG, {"r": 4}, "peft does not fit; the model expects layers.0.attention.wq.lora_A (4, 32)"),
    (ADAPTER, None, "no adapter_model.safetensors or adapter_model.bin in"),
    (ADAPTER, saved({"a": Attack()}), "adapter_model.bin is not a checkpoint of tensors"),
    (ADAPTER, saved({}), "targets are (), must be names of layers"),
    *((ADAPTER, saved({key: torch.ones(shape)}), f"adapter_model.bin holds {key}")
      for key, shape in (("x", (1, 1)), (f"{PREFIX}norm.bias", (32,)),
                         (f"{PREFIX}embed_tokens.lora_A.weight", (3, 400)))),
    (ADAPTER, saved({key: torch.ones(3, 32) for key in SOME_BLOCKS}), "adapts wv in 1 of 2 blocks"),
    (ADAPTER, saved({f"{QUERY}lora_magnitude_vector": torch.ones(32)}), "peft does not fit"),
])
def test_a_peft_folder_that_is_wrong(refused, base, tmp_path, name, content, message):
    peft_folder(base, tmp_path / "peft", targets=("wq", "wk"))
    spoil(tmp_path / "peft" / name, content)
    assert message in refused(
        convert.main, str(base), "new", "--to", "meta", "--adapter", "peft")
    assert not list(tmp_path.glob("*new*"))


@pytest.fixture(scope="module")
def others(tmp_path_factory, tokenizer):
    """A folder with an adapter of another base, a spoiled one, and a base of two dtypes."""
    folder = tmp_path_factory.mktemp("others")
    save_checkpoint(tiny(n_kv_heads=2, norm_eps=1e-6), tokenizer, folder / "other")
    model = adapter_of(folder / "other", folder / "other.pt")
    model.tok_embeddings.base.half()
    merge_lora(model)
    save_checkpoint(model, tokenizer, folder / "mixed")
    content = torch.load(folder / "other.pt", weights_only=True)
    torch.save(content | {"base": None}, folder / "baseless.pt")
    save_checkpoint(tiny(n_kv_heads=2), tokenizer, folder / "base")
    (folder / "examples.json").write_text(json.dumps(EXAMPLES))
    return folder


@pytest.mark.parametrize("flags, message", [
    ("nowhere new --to hf --bin", "no checkpoint folder at nowhere"),
    ("base base --to hf", "base is not empty; name another folder"),
    ("base examples.json --to hf", "examples.json is a file; name another folder"),
    ("base new --to peft", "--to peft writes an --adapter, as it is: give one, and no --dtype"),
    ("base new --to peft --adapter other.pt --bin", "other.pt was trained on another base"),
    ("base new --to hf --adapter nowhere.pt --bin", "no adapter file at nowhere.pt"),
    ("base new --to meta --adapter baseless.pt", "baseless.pt is not an adapter file"),
    ("base new --to meta --layers 3", "so layers must be 1 to 2, not 3"),
    ("mixed new --to meta --adapter other.pt",
     "mixed has weights of several dtypes; name the one to merge in with --dtype"),
])
def test_a_conversion_that_cannot_be(refused, others, monkeypatch, flags, message):
    monkeypatch.chdir(others)
    before = files_in(others)
    assert message in refused(convert.main, *flags.split())
    assert files_in(others) == before and not list(others.glob("new*"))


def test_a_write_that_fails_leaves_nothing(refused, base, tmp_path):
    """On a disk that ends."""
    before = files_in(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for flags in (["meta"], ["hf", "--bin"], *[["hf"]] * HAS_SAFETENSORS):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            error = refused(convert.main, str(base), "deep/new", "--to", *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "cannot be written" in error
        assert files_in(tmp_path) == before and not list(tmp_path.glob("deep/*new*"))


def test_without_the_safetensors_package(refused, base, monkeypatch):
    hf = to_hf(base)
    monkeypatch.setattr("llama.files.find_spec", lambda name: None)
    message = "needs a package that is not installed: pip install safetensors"
    assert f"new {message}" in refused(convert.main, str(base), "new", "--to", "hf")
    (hf / "model.safetensors").write_bytes(b"never read")
    load_checkpoint(hf)                              # for there is a .bin too
    (hf / WEIGHTS).unlink()
    flags = ["--checkpoint", str(hf), "--adapter", "none"]
    assert f"model.safetensors {message}" in refused(generate.main, *flags)


def test_random_weights_over_a_hugging_face_folder(base):
    hf = to_hf(base)
    (hf / WEIGHTS).unlink()
    spoil(hf / "config.json", {"tie_word_embeddings": True})
    model = loaded(hf, init="random")
    assert model.output.weight is model.tok_embeddings.weight and model(TOKENS).isfinite().all()


def test_a_tied_matrix_that_is_stored_twice(tmp_path, tokenizer):
    save_checkpoint(tiny(tie_embeddings=True), tokenizer, tmp_path, "hf", ".bin")
    state = stored(tmp_path, WEIGHTS)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    torch.save(state, tmp_path / WEIGHTS)
    model = loaded(tmp_path)
    assert model.output.weight is model.tok_embeddings.weight
