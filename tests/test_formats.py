"""llama/huggingface.py, llama/peft.py and `python -m finetune.convert`: other tools' folders in and out, to the bit, or refused."""
import io
import json
import random
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
import sentencepiece as spm
import torch

import generate
import train
from finetune import convert
from llama import ModelArgs, Tokenizer, Transformer, huggingface, load_checkpoint, save_checkpoint
from llama.huggingface import as_halves, as_pairs, hf_name, meta_name, with_width
from llama.peft import adapter_at
from lora import LoRAConfig, add_lora, load_adapter, lora_disabled, lora_state_dict, merge_lora, read_adapter, save_adapter
from lora.adapter import lora_layers

from . import reference
from .helpers import Attack, CORPUS, EXAMPLES, PEAK, ROOT, saved, stored, tiny

needs_safetensors = pytest.mark.skipif(not find_spec("safetensors"), reason="needs safetensors: pip install safetensors")
needs_peers = pytest.mark.skipif(not (find_spec("transformers") and find_spec("peft")),
                                 reason="needs transformers and peft: pip install -r tests/requirements.txt")
SUFFIXES = [".bin", pytest.param(".safetensors", marks=needs_safetensors)]
KINDS = {"mha": {}, "gqa": dict(n_kv_heads=2), "mqa": dict(n_kv_heads=1), "tied": dict(n_kv_heads=2, tie_embeddings=True),
         "odd": dict(dim=30, n_heads=5, n_layers=3, multiple_of=7, vocab_size=411, norm_eps=1e-6, rope_theta=5e5),
         "narrow": dict(dim=48, n_heads=12, n_kv_heads=4, multiple_of=1, ffn_dim_multiplier=0.3)}
TOKENS = torch.tensor([[1, 5, 9, 7, 3, 380, 12, 12, 4, 60]])
TEXTS = [*CORPUS, *(example["instruction"] for example in EXAMPLES), "Below is\n\n### Response:", "a", "", " ", "  two", "a  b ", "x\n    y",
         "1234 5.67", "na\u00efve \u6f22\U0001f642", "tab\tx .", "\u2581", "the instruction"]


@pytest.fixture(params=KINDS)
def meta(request, tmp_path, tokenizer):
    """A folder in Meta's layout, of each kind, in dtypes that a conversion must keep apart."""
    save_checkpoint(tiny(**KINDS[request.param]), tokenizer, tmp_path / "meta")
    return tmp_path / "meta"


def run(*flags):
    convert.main([str(flag) for flag in flags])


def to_hf(base, suffix=".bin"):
    """The base as a Hugging Face folder beside it."""
    run(base, base.parent / "hf", "--to", "hf", *["--bin"] * (suffix == ".bin"))
    return base.parent / "hf"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def close(one, other):
    return (one - other).abs().max() <= 1e-5 * one.abs().max()


def trained_like(model, targets="all", **settings):
    """`model` with an adapter whose tensors are all random, as after training."""
    add_lora(model, LoRAConfig(**{**dict(r=3, alpha=7, dropout=0.1, targets=targets), **settings}))
    for tensor in lora_state_dict(model).values():
        torch.nn.init.normal_(tensor, std=0.2)
    return model.eval()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shards", [[], ["--shard-mb", "1"]])
def test_meta_to_hugging_face_to_meta_is_bit_equal(meta, tmp_path, suffix, shards, monkeypatch):
    state = stored(meta)
    for name in ("norm.weight", "layers.0.attention.wk.weight"):          # each tensor keeps its own dtype
        state[name] = state[name].bfloat16()
    torch.save(state, meta / "consolidated.00.pth")
    if shards:                                                            # of bytes, for models as small as these
        save = huggingface.save
        monkeypatch.setattr(huggingface, "save", lambda *args: save(*args[:-1], args[-1] // 50))
    run(meta, tmp_path / "hf", "--to", "hf", *shards, *["--bin"] * (suffix == ".bin"))
    files = sorted(path.name for path in (tmp_path / "hf").glob(f"*{suffix}"))
    assert len(files) > 2 if shards else files == [{".bin": "pytorch_model.bin", ".safetensors": "model.safetensors"}[suffix]]
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "float32"      # what holds all of them
    run(tmp_path / "hf", tmp_path / "back", "--to", "meta")
    assert same(stored(tmp_path / "back"), state)
    one, other = (load_checkpoint(tmp_path / name)[0] for name in ("hf", "back"))
    assert one.origin["fingerprint"] == other.origin["fingerprint"] == load_checkpoint(meta)[0].origin["fingerprint"]
    first, _ = load_checkpoint(tmp_path / "hf", layers=1, dtype=torch.float64)
    assert len(first.layers) == 1 and torch.equal(first.layers[0].attention.wk.weight, other.layers[0].attention.wk.weight.double())
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {(meta / "params.json").stat().st_mode & 0o777}


def test_rows_are_turned_as_by_hand():
    """Two heads of width 6: in Meta's order, then in Hugging Face's."""
    pairs, halves = torch.arange(12)[:, None], torch.tensor([0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11])[:, None]
    assert torch.equal(as_halves(pairs, 2), halves) and torch.equal(as_pairs(halves, 2), pairs)
    assert torch.equal(as_halves(pairs, 1)[:3, 0], torch.tensor([0, 2, 4])) and as_halves(pairs, None) is pairs


def test_what_is_written_is_the_same_model_where_halves_are_turned(meta, monkeypatch):
    """The naive reference with RoPE the other way, on the tensors as they are in the file, names mapped here."""
    hf, (model, _) = to_hf(meta), load_checkpoint(meta)
    weights = {}
    for name, tensor in torch.load(hf / "pytorch_model.bin", weights_only=True).items():
        for their, our in {"model.": "", "embed_tokens": "tok_embeddings", "self_attn.q_proj": "attention.wq", "lm_head": "output",
                           "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
                           "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
                           "post_attention_layernorm": "ffn_norm", "input_layernorm": "attention_norm"}.items():
            name = name.replace(their, our)
        weights[name] = tensor
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])

    def turn_halves(vector, position, theta):
        order = torch.arange(len(vector)).view(2, -1).T.flatten()         # 0, hd/2, 1, hd/2 + 1, ...
        return pairwise(vector[order], position, theta)[order.argsort()]
    pairwise = reference.turn
    monkeypatch.setattr(reference, "turn", turn_halves)
    with torch.no_grad():
        assert close(reference.naive_logits(weights, model.args, TOKENS[0].tolist()), model(TOKENS)[0].double())


def test_any_width_has_params_that_give_it():
    """By Meta's formula, and through params.json."""
    draw = random.Random(0)
    for dim, width in [(4096, 11008), (5120, 13824), (8192, 28672), (64, 1), (64, 170), (64, 171), (4096, 2 ** 20), *((dim, 1) for dim in range(2, 400, 2)),
                       *((2 * draw.randint(1, 4096), draw.randint(1, 30000)) for _ in range(2000))]:
        args = with_width(dict(dim=dim, n_heads=1, multiple_of=width))
        again = ModelArgs(**json.loads(json.dumps(dict(dim=dim, n_heads=1, multiple_of=args.multiple_of,
                                                       ffn_dim_multiplier=args.ffn_dim_multiplier))))
        assert args.hidden_dim == again.hidden_dim == width, (dim, width)
    assert with_width(dict(dim=4096, n_heads=32, multiple_of=11008)) == ModelArgs()


def test_names_go_there_and_back():
    with torch.device("meta"):
        names = [name.removesuffix(".weight") for name, _ in Transformer(ModelArgs(n_layers=12)).named_parameters()]
    assert all(meta_name(hf_name(name)) == name and hf_name(name + ".weight") == hf_name(name) + ".weight" for name in names)
    assert meta_name("model.layers.0.norm") is meta_name("self_attn.q_proj") is meta_name("layers.0.attention.wq") is meta_name("wq") is None


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_loading_holds_no_more_than_it_keeps(tmp_path, tokenizer, suffix):
    """One of 24 layers of 260 MiB, in a fresh process: the peak grows by what is kept, not by the file."""
    save_checkpoint(tiny(dim=512, n_heads=8, n_layers=24, multiple_of=64), tokenizer, tmp_path, "hf", suffix)
    code = f"""{PEAK}
from llama import load_checkpoint
load_checkpoint({str(tmp_path)!r}, layers=1, init="random")
before = peak()
load_checkpoint({str(tmp_path)!r}, layers=1)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert float(out) < 60, out


def test_random_weights_over_a_hugging_face_folder(base):
    hf = to_hf(base)
    (hf / "pytorch_model.bin").unlink()
    config(hf, tie_word_embeddings=True)
    model, _ = load_checkpoint(hf, init="random")
    assert model.output.weight is model.tok_embeddings.weight and model(TOKENS).isfinite().all()


@needs_peers
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_transformers_loads_ours_and_says_the_same(meta, suffix):
    from transformers import AutoModelForCausalLM
    hf, (model, _) = to_hf(meta, suffix), load_checkpoint(meta)
    peer, info = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not any(info.values()) and peer.dtype == torch.float32
    with torch.no_grad():
        assert close(peer(TOKENS).logits, model(TOKENS))
    assert (peer.generation_config.bos_token_id, peer.generation_config.eos_token_id) == (1, 2)


@needs_peers
@pytest.mark.parametrize("kind", ["ours", "no space before", "scores"])
def test_transformers_gives_our_ids(base, kind):
    """Of our tokenizer, of one that puts no space before a text and has other special pieces, and of one with a piece
    that is joined late though its id is low, as runs of spaces are in LLaMA 2's."""
    from transformers import AutoTokenizer
    model = bytearray((base / "tokenizer.model").read_bytes())
    if kind == "no space before":
        model = bytearray(without_a_space_before().getvalue())
    if kind == "scores":
        for piece in Tokenizer(bytes(model)).sp.id_to_piece(list(range(259, 320, 2))):
            if len(piece) == 2:
                at = model.index(b"\n" + bytes([len(piece.encode())]) + piece.encode() + b"\x15") + 3 + len(piece.encode())
                model[at:at + 4] = struct.pack("<f", -1e6 + at)
        assert [Tokenizer(bytes(model)).encode(text) for text in TEXTS] != [Tokenizer(base / "tokenizer.model").encode(text) for text in TEXTS]
    (base / "tokenizer.model").write_bytes(model)
    peer, tokenizer = AutoTokenizer.from_pretrained(to_hf(base)), Tokenizer(bytes(model))
    for text in TEXTS:
        assert peer(text)["input_ids"] == tokenizer.encode(text, bos=True), text
        assert peer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (peer.bos_token_id, peer.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id) == ((3, 4) if kind == "no space before" else (1, 2))
    assert peer("a").keys() == {"input_ids", "attention_mask"}


def without_a_space_before():
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, model_type="bpe", vocab_size=400, byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
        bos_id=3, eos_id=4, bos_piece="<|start|>", eos_piece="<|end|>", pad_id=-1)
    return out


@needs_peers
@pytest.mark.parametrize("sizes", [dict(), dict(num_key_value_heads=1), dict(tie_word_embeddings=True), dict(intermediate_size=17)])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_what_transformers_saved_loads_here(tmp_path, tokenizer, sizes, shard):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(**{**dict(vocab_size=400, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
                                                  num_attention_heads=4, num_key_value_heads=2, rope_theta=5e4, initializer_range=0.2), **sizes}))
    peer.save_pretrained(tmp_path, max_shard_size=shard)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model, _ = load_checkpoint(tmp_path)
    assert model.args.max_seq_len == 2048 and load_checkpoint(tmp_path, max_seq_len=9)[0].args.max_seq_len == 9
    with torch.no_grad():
        assert close(peer(TOKENS).logits, model(TOKENS))


def adapter_of(base, path, **settings):
    """An adapter of ours over `base`, saved at `path`; the model that has it."""
    model = trained_like(load_checkpoint(base)[0], **settings)
    save_adapter(model, path)
    return model


ADAPTED = [dict(), dict(targets=("wq", "wk", "wv", "wo")), dict(targets=("tok_embeddings", "output")), dict(targets=("wk",), alpha=2.5),
           dict(method="rslora", targets=("wq", "tok_embeddings")), dict(method="dora", targets=("wq", "wk", "w2"))]


@pytest.mark.parametrize("settings", ADAPTED)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_adapter_goes_to_peft_and_back_to_the_bit(meta, tmp_path, settings, suffix):
    model = adapter_of(meta, tmp_path / "adapter.pt", **settings)
    run(meta, tmp_path / "peft", "--to", "peft", "--adapter", tmp_path / "adapter.pt", *["--bin"] * (suffix == ".bin"))
    saved, back = read_adapter(tmp_path / "adapter.pt"), read_adapter(adapter_at(tmp_path / "peft", model.args))
    assert same(saved["tensors"], back["tensors"]) and back["base"] is None
    assert (back["config"].r, back["config"].alpha, back["config"].dropout) == (3, settings.get("alpha", 7), 0.1)
    assert set(back["config"].targets) == {name.split(".")[-2] for name in saved["tensors"]}
    other, _ = load_checkpoint(to_hf(meta))
    load_adapter(other, adapter_at(tmp_path / "peft", other.args))
    assert torch.equal(other.eval()(TOKENS), model(TOKENS))


def test_a_peft_folder_by_hand(base, tmp_path):
    """Names, settings and the rows of lora_B, written out: 4 query heads and 2 key heads of width 8."""
    model = adapter_of(base, tmp_path / "adapter.pt", targets=("wk", "wv", "tok_embeddings"))
    run(base, tmp_path / "peft", "--to", "peft", "--adapter", tmp_path / "adapter.pt", "--bin")
    tensors = torch.load(tmp_path / "peft/adapter_model.bin", weights_only=True)
    prefix = "base_model.model.model."
    assert tensors.keys() == {prefix + "embed_tokens.lora_embedding_A", prefix + "embed_tokens.lora_embedding_B",
                              *(f"{prefix}layers.{i}.self_attn.{name}.lora_{matrix}.weight"
                                for i in (0, 1) for name in ("k_proj", "v_proj") for matrix in "AB")}
    attention, name = model.layers[1].attention, prefix + "layers.1.self_attn."
    order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(tensors[name + "k_proj.lora_B.weight"], attention.wk.lora_B[order])
    assert torch.equal(tensors[name + "k_proj.lora_A.weight"], attention.wk.lora_A)
    assert torch.equal(tensors[name + "v_proj.lora_B.weight"], attention.wv.lora_B)
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text()) == dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=None, r=3, lora_alpha=7, lora_dropout=0.1,
        target_modules=["embed_tokens", "k_proj", "v_proj"], bias="none", fan_in_fan_out=False, inference_mode=True)


def peft_folder(base, path, **settings):
    """An adapter of ours as PEFT's folder at `path`, in .bin; the model that has it."""
    model = adapter_of(base, path.with_suffix(".pt"), **settings)
    run(base, path, "--to", "peft", "--adapter", path.with_suffix(".pt"), "--bin")
    return model


@needs_peers
@pytest.mark.parametrize("settings", ADAPTED)
def test_peft_runs_our_adapter(meta, tmp_path, settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = peft_folder(meta, tmp_path / "peft", **settings)
    alone = AutoModelForCausalLM.from_pretrained(to_hf(meta))
    with torch.no_grad():
        before = alone(TOKENS).logits
        peer = PeftModel.from_pretrained(alone, tmp_path / "peft")
        assert close(peer(TOKENS).logits, model(TOKENS)) and not close(before, model(TOKENS))


@needs_peers
@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear",
                                            ["embed_tokens", "lm_head", "k_proj"], r".*\.(k_proj|down_proj)"])
@pytest.mark.parametrize("method, safe", [("lora", True), ("lora", False), ("rslora", True), ("dora", True)])
def test_an_adapter_of_peft_runs_here(meta, tmp_path, target_modules, method, safe):
    if method == "dora" and "embed_tokens" in target_modules:
        pytest.skip("DoRA has no form for embeddings here")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    peer = get_peft_model(AutoModelForCausalLM.from_pretrained(to_hf(meta)), LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.2, target_modules=target_modules, task_type="CAUSAL_LM", use_rslora=method == "rslora", use_dora=method == "dora"))
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    if safe:
        peer.save_pretrained(tmp_path / "peft")
    else:                                                                 # as PEFT saved them before safetensors
        from peft import get_peft_model_state_dict
        peer.save_pretrained(tmp_path / "peft")
        (tmp_path / "peft/adapter_model.safetensors").unlink()
        torch.save(get_peft_model_state_dict(peer), tmp_path / "peft/adapter_model.bin")
    for folder in ("meta", "hf"):
        model, _ = load_checkpoint(tmp_path / folder)
        load_adapter(model, adapter_at(tmp_path / "peft", model.args))
        assert (model.lora_config.method, model.lora_config.dropout) == (method, 0.2)
        with torch.no_grad():
            assert close(peer.eval()(TOKENS).logits, model.eval()(TOKENS))
            with lora_disabled(model):
                assert not close(peer(TOKENS).logits, model(TOKENS))


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_a_merged_folder_is_the_merged_model(meta, tmp_path, to, capsys):
    model = peft_folder(meta, tmp_path / "peft")
    merge_lora(model)
    for name in ("peft", "peft.pt"):
        run(meta, tmp_path / f"{name}-merged", "--to", to, "--adapter", tmp_path / name, *["--bin"] * (to == "hf"))
        merged, _ = load_checkpoint(tmp_path / f"{name}-merged")
        assert torch.equal(merged.eval()(TOKENS), model(TOKENS))
    assert capsys.readouterr().out.count("merged: 100.0 % of the update survives in float32; logits of up to ") == 2


@needs_peers
def test_transformers_runs_a_merged_folder(meta, tmp_path):
    from transformers import AutoModelForCausalLM
    model = peft_folder(meta, tmp_path / "peft")
    merge_lora(model)
    run(meta, tmp_path / "merged", "--to", "hf", "--adapter", tmp_path / "peft", "--bin")
    peer, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    with torch.no_grad():
        assert not any(info.values()) and close(peer(TOKENS).logits, model(TOKENS))


def test_a_merge_says_what_it_lost_and_what_helps(base, tmp_path, capsys, monkeypatch):
    def save(model, *args):                                               # with one set of weights in memory
        assert all(layer.original_base == (None,) for layer in lora_layers(model).values())
        save_checkpoint(model, *args)
    monkeypatch.setattr(convert, "save_checkpoint", save)
    model = trained_like(load_checkpoint(base)[0])
    for name, tensor in lora_state_dict(model).items():
        if name.endswith("lora_B"):
            tensor.mul_(1e-3)                                             # an update far below bf16's steps
    save_adapter(model, tmp_path / "small.pt")
    for dtype, lost in (("bf16", True), ("fp32", False)):
        run(base, tmp_path / dtype, "--to", "meta", "--adapter", tmp_path / "small.pt", "--dtype", dtype)
        said = capsys.readouterr().out
        assert ("WARNING, most of it is lost: use --dtype fp32, or keep the adapter apart" in said) == lost
        assert ("100.0 % of the update survives in float32" in said) != lost
    assert {tensor.dtype for tensor in stored(tmp_path / "bf16").values()} == {torch.bfloat16}
    generate.main(["--adapter", str(tmp_path / "small.pt"), "--merge", "--precision", "bf16", "--max-new-tokens", "1"])
    assert "WARNING, most of it is lost: use --precision fp32" in capsys.readouterr().err


def test_generate_takes_a_peft_folder(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter_of(base, tmp_path / "peft.pt")
    run(to_hf(base), tmp_path / "peft", "--to", "peft", "--adapter", "peft.pt", "--bin")
    capsys.readouterr()
    asked = ["--instruction", "Name a colour.", "--max-new-tokens", "12"]
    generate.main(["--adapter", "peft.pt", *asked])
    file = capsys.readouterr()
    generate.main(["--adapter", "peft", *asked])                          # it names its base
    folder = capsys.readouterr()
    assert file.out == folder.out and "whose base PEFT does not record" in folder.err
    generate.main(["--adapter", "none", "--checkpoint", "base", *asked])
    assert capsys.readouterr().out != file.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(":adapter peft\nName a colour.\n"))
    generate.main(["--adapter", "none", "--checkpoint", "base", "--interactive", "--max-new-tokens", "12"])
    assert file.out.split("\n")[2] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["peft", "peft.pt"])
def test_train_goes_on_from_an_adapter(base, data, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    peft_folder(base, tmp_path / "peft", targets=("wq", "wk"))
    train.main(["--checkpoint", str(base), "--data", str(data), "--adapter", name, "--lr", "1e-30", "--max-steps", "1", "--out", "next"])
    before, after = read_adapter("peft.pt"), read_adapter("next/adapter.pt")
    assert same(before["tensors"], after["tensors"]) and before["base"] == after["base"]       # a step of nearly nothing
    assert (after["config"].r, after["config"].alpha, after["config"].dropout) == (3, 7, 0.1)
    assert json.loads((tmp_path / "next/args.json").read_text())["r"] == 3


def test_an_adapter_of_the_first_layers_converts_over_these(base, tmp_path):
    model = trained_like(load_checkpoint(base, layers=1)[0])
    save_adapter(model, tmp_path / "one.pt")
    run(base, tmp_path / "peft", "--to", "peft", "--adapter", tmp_path / "one.pt", "--bin")
    run(base, tmp_path / "merged", "--to", "hf", "--adapter", tmp_path / "peft", "--layers", "1", "--bin")
    merge_lora(model)
    assert torch.equal(load_checkpoint(tmp_path / "merged")[0].eval()(TOKENS), model(TOKENS))


def config(folder, name="config.json", **changes):
    """Change keys of a JSON file in place; "drop" takes one out."""
    old = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({k: v for k, v in {**old, **changes}.items() if v != "drop"}))


@pytest.mark.parametrize("changes", [
    dict(torch_dtype="drop", dtype="bfloat16", rope_theta="drop", rope_scaling="drop", rope_parameters=dict(rope_theta=1e4, rope_type="default")),
    dict(rope_scaling=dict(type="default"), rope_theta=10000), dict(num_attention_heads=4, head_dim=8, pretraining_tp=2), dict(rms_norm_eps=1e-5, head_dim=None),
])
def test_what_other_versions_write_is_the_same_model(base, changes):
    hf = to_hf(base)
    config(hf, **changes)
    state = torch.load(hf / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, hf / "pytorch_model.bin")
    (one, _), (other, _) = load_checkpoint(hf), load_checkpoint(base)
    assert torch.equal(one(TOKENS), other(TOKENS)) and one.origin["fingerprint"] == other.origin["fingerprint"]


def test_a_theta_among_the_rope_parameters_counts(base):
    hf = to_hf(base)
    config(hf, rope_parameters=dict(rope_theta=77.0, rope_type="default"))
    assert load_checkpoint(hf)[0].args.rope_theta == 77.0


def test_a_tied_matrix_that_is_stored_twice(tmp_path, tokenizer):
    save_checkpoint(tiny(tie_embeddings=True), tokenizer, tmp_path, "hf", ".bin")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")
    model, _ = load_checkpoint(tmp_path)
    assert model.output.weight is model.tok_embeddings.weight
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="config.json ties lm_head.weight to model.embed_tokens.weight, but the weights differ"):
        load_checkpoint(tmp_path)


WEIGHTS = {"pytorch_model.bin": None}                           # a file to take away


@pytest.mark.parametrize("change, message", [
    (dict(model_type="mistral"), "config.json: model_type is 'mistral', which this model does not support; supported: llama"),
    (dict(model_type="drop"), "config.json lacks model_type"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "config.json: rope_scaling is {'type': 'linear', 'factor': 2.0}, which this model"),
    (dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), "config.json: rope_parameters is {'rope_type': 'llama3'"),
    (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "config.json: rope_parameters is"),
    (dict(rope_scaling=[1]), "config.json: rope_scaling is [1]"),
    (dict(attention_bias=True), "config.json: attention_bias is True, which this model does not support; supported: False"),
    (dict(mlp_bias=True), "config.json: mlp_bias is True"),
    (dict(sliding_window=4096), "config.json: sliding_window is 4096, which this model does not support"),
    (dict(hidden_act="gelu"), "config.json: hidden_act is 'gelu'"),
    (dict(quantization_config=dict(bits=4)), "config.json: quantization_config is {'bits': 4}"),
    (dict(head_dim=16), "config.json: head_dim is 16, which this model does not support; supported: hidden_size / num_attention_heads = 8"),
    (dict(torch_dtype="float8_e4m3fn"), "config.json: torch_dtype is 'float8_e4m3fn', which this model does not support; supported: float32"),
    (dict(dtype="int8"), "config.json: dtype is 'int8'"),
    (dict(tie_word_embeddings="yes"), "config.json: tie_word_embeddings is 'yes'"),
    (dict(hidden_size="drop"), "config.json lacks ['hidden_size']"),
    (dict(hidden_size="32"), "config.json: hidden_size is '32', not a number of the right kind"),
    (dict(num_hidden_layers=True), "config.json: num_hidden_layers is True"),
    (dict(num_attention_heads=5), "config.json: hidden_size 32 must be num_attention_heads 5 times an even head width"),
    (dict(intermediate_size=0), "config.json: intermediate_size is 0, must be 1 to"),
    (dict(intermediate_size=97), "of another shape: model.layers.0.mlp.down_proj.weight (32, 96) for (32, 97)"),
    (dict(num_key_value_heads=4), "of another shape: model.layers.0.self_attn.k_proj.weight (16, 32) for (32, 32)"),
    (dict(num_hidden_layers=3), "do not fit its config.json; missing: model.layers.2.input_layernorm.weight, "),
    (dict(num_hidden_layers=1), "unexpected: model.layers.1.input_layernorm.weight, "),
    (dict(vocab_size=399), "config.json: vocab_size 399 is less than the tokenizer's 400"),
    (dict(tie_word_embeddings=True), "config.json ties lm_head.weight to model.embed_tokens.weight, but the weights differ"),
    ({"config.json": b"{"}, "config.json is not JSON"),
    ({"config.json": b"[1]"}, "config.json holds a list, not an object"),
    ({"config.json": b"[" * 100_000}, "config.json is not JSON"),
    ({"tokenizer.model": None, "tokenizer.json": b"{}"}, "no tokenizer.model in"),
    (WEIGHTS, "no model.safetensors or pytorch_model.bin in"),
    ({"pytorch_model.bin": b""}, "pytorch_model.bin is not a checkpoint of tensors: it is empty"),
    ({"pytorch_model.bin": saved({"a": Attack()})}, "pytorch_model.bin is not a checkpoint of tensors"),
    ({"pytorch_model.bin": saved({"model.norm.weight": torch.ones(32, dtype=torch.int8)})}, "does not hold a dict of floating-point tensors"),
    ({"pytorch_model.bin": saved({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})}, "it calls torch._utils._rebuild_tensor_v3"),
    ({"pytorch_model.bin": saved({"norm.weight": torch.ones(32)})}, "missing: lm_head.weight, model.embed_tokens.weight, "),
    ({**WEIGHTS, "pytorch_model.bin.index.json": b"{}"}, "pytorch_model.bin.index.json has no weight_map of names to files"),
    ({**WEIGHTS, "pytorch_model.bin.index.json": b'{"weight_map": {"a": 1}}'}, "has no weight_map of names to files"),
    *[({**WEIGHTS, "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": name}}).encode()}, "which is not a file of this folder")
      for name in ("../base/consolidated.00.pth", "/etc/passwd", "..", ".", "", "sub/a.bin", "..\\\\a.bin", "C:\\\\a.bin", "C:a.bin")],
    ({**WEIGHTS, "pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}'},
     "no pytorch_model-00001-of-00002.bin in"),
    ({**WEIGHTS, "a.bin": saved({"model.norm.weight": torch.ones(32)}), "b.bin": saved({"model.norm.weight": torch.ones(32)}),
      "pytorch_model.bin.index.json": b'{"weight_map": {"x": "a.bin", "y": "b.bin"}}'}, "b.bin holds model.norm.weight, and another shard does too"),
    pytest.param({**WEIGHTS, "model.safetensors": b"\x10\0\0\0\0\0\0\0{"}, "model.safetensors is not a checkpoint of tensors", marks=needs_safetensors),
])
def test_a_hugging_face_folder_that_is_wrong(refused, base, data, change, message):      # noqa: F811
    hf = to_hf(base)
    if any("." in key for key in change):
        for name, content in change.items():
            (hf / name).unlink() if content is None else (hf / name).write_bytes(content)
    else:
        config(hf, **change)
    assert message in refused(generate.main, "--checkpoint", str(hf), "--adapter", "none")
    assert message in refused(train.main, "--checkpoint", str(hf), "--data", str(data))
    assert message in refused(convert.main, str(hf), "new", "--to", "meta")
    assert not list(hf.parent.glob("*new*"))


@pytest.mark.parametrize("change, message", [
    (dict(use_rslora=True, use_dora=True), "adapter_config.json: use_rslora and use_dora together, which the adapters here do not support"),
    (dict(use_qalora=True), "adapter_config.json: use_qalora is True, which the adapters here do not support"),
    (dict(bias="all"), "bias is 'all', which the adapters here do not support; supported: none"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head'], but"),
    (dict(rank_pattern={"q_proj": 8}), "rank_pattern is {'q_proj': 8}"),
    (dict(alpha_pattern={"q_proj": 8}), "alpha_pattern is"),
    (dict(layers_to_transform=[0]), "layers_to_transform is [0], but"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out is True"),
    (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    (dict(peft_type="LOHA"), "peft_type is 'LOHA', which the adapters here do not support; supported: LORA"),
    (dict(something_new={"a": 1}), "something_new is {'a': 1}"),
    (dict(lora_alpha="drop"), "adapter_config.json lacks ['lora_alpha']"),
    (dict(r="3"), "r is '3', must be a whole number from 1"),
    (dict(lora_alpha=0), "alpha is 0, must be a number above 0"),
    (dict(r=4), "peft does not fit; the model expects layers.0.attention.wq.lora_A (4, 32), "),
    ({"adapter_config.json": b"{"}, "adapter_config.json is not JSON"),
    ({"adapter_model.bin": None}, "no adapter_model.safetensors or adapter_model.bin in"),
    ({"adapter_model.bin": b"x"}, "adapter_model.bin is not a checkpoint of tensors"),
    ({"adapter_model.bin": saved({"a": Attack()})}, "adapter_model.bin is not a checkpoint of tensors"),
    ({"adapter_model.bin": saved({})}, "targets are (), must be names of layers"),
    *[({"adapter_model.bin": saved({name: torch.ones(shape)})}, f"adapter_model.bin holds {name}")
      for name, shape in (("x", (1, 1)), ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", (32, 1)),
                          ("base_model.model.model.norm.bias", (32,)), ("base_model.model.lm_head.weight", (400,)),
                          ("base_model.model.model.norm.weight", (1, 32)), ("base_model.model.lm_head.original_module.weight", (400, 32)),
                          ("base_model.model.model.embed_tokens.lora_A.weight", (3, 400)),
                          ("base_model.model.lm_head.lora_embedding_A", (3, 32)))],
    ({"adapter_model.bin": saved({"base_model.model.model.norm.lora_A.weight": torch.ones(3, 32)})}, "no layer named norm to adapt"),
    ({"adapter_model.bin": saved({f"base_model.model.model.layers.{i}.self_attn.{name}.lora_A.weight": torch.ones(3, 32)
                                  for i, name in ((0, "q_proj"), (1, "q_proj"), (1, "v_proj"))})},
     "adapts wv in 1 of 2 blocks, and no setting of it leaves out any"),
    ({"adapter_model.bin": saved({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(31, 3)})}, "peft does not fit"),
    ({"adapter_model.bin": saved({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)})}, "peft does not fit"),
])
def test_a_peft_folder_that_is_wrong(refused, base, data, tmp_path, change, message):    # noqa: F811
    peft_folder(base, tmp_path / "peft", targets=("wq", "wk"))
    if any("." in key for key in change):
        for name, content in change.items():
            (tmp_path / "peft" / name).unlink() if content is None else (tmp_path / "peft" / name).write_bytes(content)
    else:
        config(tmp_path / "peft", "adapter_config.json", **change)
    assert message in refused(generate.main, "--checkpoint", str(base), "--adapter", "peft")
    assert message in refused(train.main, "--checkpoint", str(base), "--data", str(data), "--adapter", "peft")
    assert message in refused(convert.main, str(base), "new", "--to", "meta", "--adapter", "peft")
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize("flags, message", [
    (["nowhere", "new", "--to", "hf", "--bin"], "no checkpoint folder at nowhere"),
    (["base", "base", "--to", "hf"], "base is not empty; name another folder"),
    (["base", "examples.json", "--to", "hf"], "examples.json is a file; name another folder"),
    (["base", "examples.json/new", "--to", "meta"], "Not a directory"),
    (["base", "new"], "the following arguments are required: --to"),
    (["base", "new", "--to", "gguf"], "argument --to: invalid choice: 'gguf'"),
    (["base", "new", "--to", "peft"], "--to peft writes an --adapter, as it is: give one, and no --dtype"),
    (["base", "new", "--to", "peft", "--adapter", "other.pt", "--dtype", "bf16"], "give one, and no --dtype"),
    (["base", "new", "--to", "peft", "--adapter", "other.pt", "--bin"], "other.pt was trained on another base"),
    (["base", "new", "--to", "hf", "--adapter", "other.pt", "--bin"], "other.pt was trained on another base"),
    (["base", "new", "--to", "hf", "--adapter", "nowhere.pt", "--bin"], "no adapter file at nowhere.pt"),
    (["base", "new", "--to", "meta", "--adapter", "nonsense.pt"], "so layers must be 1 to 2, not x"),
    (["base", "new", "--to", "meta", "--adapter", "baseless.pt"], "baseless.pt is not an adapter file"),
    (["base", "new", "--to", "meta", "--layers", "3"], "so layers must be 1 to 2, not 3"),
    (["base", "new", "--to", "meta", "--dtype", "fp8"], "argument --dtype: invalid choice"),
    (["base", "new", "--to", "hf", "--shard-mb", "0"], "--shard-mb: 0 is out of range"),
    (["mixed", "new", "--to", "meta", "--adapter", "other.pt"], "mixed has weights of several dtypes; name the one to merge in with --dtype"),
])
def test_a_conversion_that_cannot_be(refused, base, data, tmp_path, tokenizer, flags, message):      # noqa: F811
    save_checkpoint(tiny(n_kv_heads=2, norm_eps=1e-6), tokenizer, tmp_path / "other")
    model = adapter_of(tmp_path / "other", tmp_path / "other.pt")
    model.tok_embeddings.base.half()
    merge_lora(model)
    save_checkpoint(model, tokenizer, tmp_path / "mixed")
    content = torch.load(tmp_path / "other.pt", weights_only=True)
    torch.save({**content, "base": {"layers": "x"}}, tmp_path / "nonsense.pt")
    torch.save({**content, "base": None}, tmp_path / "baseless.pt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert message in refused(convert.main, *flags)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before and not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("flags, message", [
    (["--adapter", "peft", "--r", "8"], "--adapter brings its own settings; leave out --method, --r, --alpha, --dropout, --targets"),
    (["--adapter", "peft", "--method", "full"], "--adapter brings its own settings"),
    (["--adapter", "nowhere"], "no adapter file at nowhere"),
    (["--adapter", "other.pt"], "other.pt was trained on another base"),
])
def test_an_adapter_that_cannot_be_gone_on_from(refused, base, data, tmp_path, tokenizer, flags, message):      # noqa: F811
    peft_folder(base, tmp_path / "peft")
    save_checkpoint(tiny(n_kv_heads=2, norm_eps=1e-6), tokenizer, tmp_path / "other")
    adapter_of(tmp_path / "other", tmp_path / "other.pt")
    assert message in refused(train.main, "--checkpoint", str(base), "--data", str(data), *flags)
    assert not (tmp_path / "out/args.json").exists()


def test_a_peft_folder_whose_base_is_not_here(refused, base, tmp_path):      # noqa: F811
    peft_folder(base, tmp_path / "peft")
    for name, message in ((None, "peft does not say what its base is; name its folder with --checkpoint"), ("a/b", "no checkpoint folder at a/b")):
        config(tmp_path / "peft", "adapter_config.json", base_model_name_or_path=name)
        assert message in refused(generate.main, "--adapter", "peft")


def test_a_write_that_fails_leaves_nothing(refused, base, tmp_path, monkeypatch):        # noqa: F811
    before = sorted(tmp_path.iterdir())

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    for to in ("meta", "hf"):
        assert "No space left" in refused(convert.main, str(base), "deep/new", "--to", to, *["--bin"] * (to == "hf"))
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(base.iterdir())
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    run(base, tmp_path / "empty", "--to", "meta")                         # an empty folder is as good as none
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "deep", tmp_path / "empty"])
    limit = "import resource, sys; from finetune import convert; resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000)); convert.main()"
    for flags in (["hf", "--bin"], *[["hf"]] * bool(find_spec("safetensors"))):              # a disk that ends
        done = subprocess.run([sys.executable, "-c", limit, str(base), str(tmp_path / "new"), "--to", *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
        assert not list(tmp_path.glob("new*"))
    with pytest.raises(ValueError, match="holds a model already .pytorch_model.bin.; write to another folder"):
        save_checkpoint(*load_checkpoint(to_hf(base)), tmp_path / "hf", "hf")


@pytest.mark.parametrize("settings", [dict(model_type="unigram", vocab_size=60), dict(normalization_rule_name="nmt_nfkc"),
                                      dict(remove_extra_whitespaces=True), dict(user_defined_symbols=["<sep>"])])
def test_a_tokenizer_that_transformers_would_read_otherwise_is_refused(refused, base, settings):    # noqa: F811
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=out, minloglevel=2, hard_vocab_limit=False, **{
        **dict(model_type="bpe", vocab_size=300, byte_fallback=settings.get("model_type") != "unigram", remove_extra_whitespaces=False,
               normalization_rule_name="identity"), **settings})
    (base / "tokenizer.model").write_bytes(out.getvalue())
    assert "transformers would read this tokenizer.model differently" in refused(convert.main, str(base), "new", "--to", "hf", "--bin")
    run(base, base.parent / "new", "--to", "meta")


def test_an_adapter_of_the_first_layers_says_what_base_peft_needs(base, tmp_path, capsys):
    save_adapter(trained_like(load_checkpoint(base, layers=1)[0]), tmp_path / "one.pt")
    run(base, tmp_path / "peft", "--to", "peft", "--adapter", tmp_path / "one.pt", "--bin")
    assert "PEFT needs a base of 1 layer for it: --to hf --layers 1" in capsys.readouterr().out


def test_without_the_safetensors_package(refused, base, tmp_path, monkeypatch):          # noqa: F811
    hf = to_hf(base)
    monkeypatch.setattr("llama.files.find_spec", lambda name: None)
    assert "new needs a package that is not installed: pip install safetensors" in refused(convert.main, str(base), "new", "--to", "hf")
    (hf / "model.safetensors").write_bytes(b"never read")
    load_checkpoint(hf)                                                   # for there is a .bin too
    (hf / "pytorch_model.bin").unlink()
    assert "model.safetensors needs a package that is not installed: pip install safetensors" in refused(
        generate.main, "--checkpoint", str(hf), "--adapter", "none")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_changed_at_random(base, tmp_path):
    """Each folder with a few bytes changed or the end cut off loads or is a ValueError (or a file that is not there)."""
    model = peft_folder(base, tmp_path / "peft")
    if find_spec("safetensors"):
        run(base, tmp_path / "safe", "--to", "hf")
    hf, draw = to_hf(base), random.Random(0)
    files = [hf / "config.json", hf / "pytorch_model.bin", tmp_path / "peft/adapter_config.json", tmp_path / "peft/adapter_model.bin",
             *tmp_path.glob("safe/model.safetensors")]
    for path in files:
        whole = path.read_bytes()
        at = whole.index(b"data.pkl") if path.suffix == ".bin" else 0
        for _ in range(80):
            broken = bytearray(whole if draw.random() < 0.8 else whole[:draw.randrange(len(whole))])
            for _ in range(draw.randint(1, 4)):
                broken[min(len(broken) - 1, at + draw.randrange(1500))] = draw.randrange(256)
            path.write_bytes(broken)
            try:
                if path.parent.name == "peft":
                    read_adapter(adapter_at(path.parent, model.args))
                else:
                    load_checkpoint(path.parent, layers=1)
            except (ValueError, FileNotFoundError):
                pass
        path.write_bytes(whole)


@pytest.mark.slow
def test_the_command_in_a_fresh_process(base, tmp_path):
    done = subprocess.run([sys.executable, "-m", "finetune.convert", str(base), str(tmp_path / "new"), "--to", "hf", "--bin"],
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"written   {tmp_path / 'new'}\n")
    subprocess.run([sys.executable, "-c", "from llama import *; save_checkpoint; import sys, llama.checkpoint, llama.peft; assert not {'lora', 'safetensors'} & sys.modules.keys()"],
                   cwd=ROOT, check=True)
