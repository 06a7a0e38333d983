"""Folders and adapters as people have them: used, carried along, compared, or refused by name."""

import json
import re

import pytest
import torch

import generate
import train
from finetune import convert
from finetune.dataset import encode_prompt
from llama import load_checkpoint, save_checkpoint
from llama.fields import CARRIED, FIELDS, LOST, USED
from llama.peft import adapter_at
from llama.sampling import beam_search
from llama.sampling import generate as generate_ids
from lora import load_adapter

from .helpers import ROOT, files_in, needs_peers, spoil, stored, tiny
from .test_formats import (
    ADAPTER, PREFIX, WEIGHTS, adapter_of, equal, loaded, peft_folder, run, with_adapter,
)  # fmt: skip

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"
TOKENS = torch.tensor([[1, 5, 9, 7, 3, 380, 12, 401, 4, 60]])
ADDED = ["[PAD]", "<|im_start|>", "<|im_end|>"]  # the ids 400 to 402
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def read(path):
    return json.loads(path.read_text())


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def hf(tmp_path, tokenizer):
    """A folder in Hugging Face's layout, in .bin, with three rows more than its tokenizer."""
    save_checkpoint(tiny(403, n_kv_heads=2), tokenizer, tmp_path / "hf", "hf", ".bin")
    return tmp_path / "hf"


@pytest.fixture
def chat(hf):
    """The same with added tokens, an eos and a pad of its own, and a chat template."""
    names = {"pad_token": ADDED[0], "eos_token": ADDED[2]}
    tokens = read(hf / "tokenizer.json")
    for i, name in enumerate(ADDED, 400):
        tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": i, "content": name})
    write(hf / "tokenizer.json", tokens)
    spoil(hf / "tokenizer_config.json", names | {"additional_special_tokens": ADDED[1:]})
    write(hf / "special_tokens_map.json", names)
    write(hf / "chat_template.jinja", TEMPLATE)
    write(hf / "additional_chat_templates/tools.jinja", "{{ tools }}")
    write(hf / "LICENSE.txt", "a licence")
    ids = {"bos_token_id": 1, "eos_token_id": 402, "pad_token_id": 400}
    write(hf / "generation_config.json", {**ids, "temperature": 0.6})
    spoil(hf / "config.json", ids | {"max_position_embeddings": 256, "attention_dropout": 0.1})
    return hf


def texts_of(folder):
    """Return {name: text} of all files of a folder but config.json and weights."""
    paths = [path for path in files_in(folder) if path.suffix != ".bin"]
    texts = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    del texts["config.json"]
    return texts


# --- whole matrices in adapters


@pytest.fixture
def adapted(hf, tmp_path):
    """The model of hf/ with an adapter of wq and wv, which is in peft/ and peft.pt too."""
    return peft_folder(hf, tmp_path / "peft", targets=("wq", "wv"))


def add_tensors(folder, tensors):
    """Put more tensors into a PEFT folder."""
    torch.save(stored(folder, ADAPTER) | tensors, folder / ADAPTER)


WHOLE = ["lm_head.modules_to_save.default.weight", "model.embed_tokens.weight",
         "model.norm.weight", "model.layers.1.self_attn.k_proj.base_layer.weight"]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_matrix_is_used_in_a_merge_and_elsewhere_refused(
    hf, adapted, data, tmp_path, refused, capsys, name
):
    """Compared with the same base whose file has that matrix; rows 400 to 402 of it are new."""
    weights = stored(hf, WEIGHTS)
    plain = re.sub(r"\.(base_layer|modules_to_save\.default)", "", name)
    matrix = weights[plain].clone()
    matrix[-3:] += 1.0
    add_tensors(tmp_path / "peft", {f"base_model.model.{name}": matrix})
    message = f"holds base_model.model.{name}, other than the base's own"
    common = ["--checkpoint", str(hf), "--adapter", "peft"]
    assert message in refused(generate.main, *common)
    assert message in refused(train.main, *common, "--data", str(data), "--out", "new")
    assert message in refused(convert.main, str(hf), "new2", "--to", "int8", "--adapter", "peft")
    run(hf, "merged", "--to", "hf", "--adapter", "peft", "--bin")
    assert f"replaced by the adapter's own, in float32: base_model.model.{name}\n" in (
        capsys.readouterr().out)
    torch.save(weights | {plain: matrix}, hf / WEIGHTS)
    run(hf, "expected", "--to", "hf", "--adapter", "peft", "--bin")
    merged = stored(tmp_path / "merged", WEIGHTS)
    assert equal(merged, stored(tmp_path / "expected", WEIGHTS))
    assert not torch.equal(merged[plain], weights[plain])


@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_as", [torch.float32, torch.float16])
def test_the_bases_own_matrices_are_accepted_in_any_dtype(
    hf, adapted, tmp_path, stored_as, adapter_as
):
    weights = {key: tensor.to(stored_as) for key, tensor in stored(hf, WEIGHTS).items()}
    torch.save(weights, hf / WEIGHTS)
    names = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
             "model.layers.0.self_attn.q_proj.weight")  # fmt: skip
    whole = {f"base_model.model.{name}": weights[name].to(adapter_as) for name in names}
    add_tensors(tmp_path / "peft", whole)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, _ = load_checkpoint(hf, dtype=dtype)
        load_adapter(model, adapter_at(tmp_path / "peft", model.args))
    add_tensors(tmp_path / "peft", {f"{PREFIX}norm.weight": weights["model.norm.weight"] * 1.02})
    with pytest.raises(ValueError, match="norm.weight, other than the base's own"):
        load_adapter(model, adapter_at(tmp_path / "peft", model.args))


@pytest.mark.parametrize("tensors, message", [
    ({"lm_head.weight": (500, 32)}, "lm_head.weight (500, 32), and the base's is (403, 32)"),
    ({"model.layers.9.mlp.up_proj.weight": (96, 32)}, "(96, 32), which the base does not have"),
    ({"lm_head.weight": (403, 32), "lm_head.base_layer.weight": (403, 32)}, "holds both"),
    ({"model.layers.0.self_attn.q_proj.lora_A.other.weight": (3, 32)}, "of two adapters: give a"),
])  # fmt: skip
def test_a_whole_matrix_that_fits_nowhere(adapted, tmp_path, refused, tensors, message):
    whole = {f"base_model.model.{name}": torch.ones(shape) for name, shape in tensors.items()}
    add_tensors(tmp_path / "peft", whole)
    assert message in refused(convert.main, "hf", "new", "--to", "meta", "--adapter", "peft")


def test_a_tied_base_has_one_matrix_only(tmp_path, tokenizer, refused):
    save_checkpoint(tiny(403, tie_embeddings=True), tokenizer, tmp_path / "hf", "hf", ".bin")
    peft_folder(tmp_path / "hf", tmp_path / "peft", targets=("wq", "wv"))
    add_tensors(tmp_path / "peft", {f"{PREFIX}embed_tokens.weight": torch.ones(403, 32)})
    line = refused(convert.main, "hf", "new", "--to", "hf", "--bin", "--adapter", "peft")
    assert "the base ties its own to another matrix" in line


@needs_peers
@torch.no_grad()
def test_peft_with_new_rows_of_embedding_and_head(hf, tmp_path):
    """The base that PEFT trained on had other rows than the one in the folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf)
    for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
        matrix[400:403] = matrix.mean(0)
    targets = ["q_proj", "embed_tokens", "lm_head"]
    peer = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peer.save_pretrained(tmp_path / "peft")
    run(hf, tmp_path / "merged", "--to", "meta", "--adapter", tmp_path / "peft")
    difference = loaded(tmp_path / "merged")(TOKENS) - peer(TOKENS).logits
    assert difference.abs().max() < 1e-5


# --- some blocks only, other names


def select_blocks(folder, *blocks, **fields):
    """Keep an adapter's tensors of these blocks only, and say so in its settings."""
    kept = {name: tensor for name, tensor in stored(folder, ADAPTER).items()
            if int(name.split("layers.")[1][0]) in blocks}  # fmt: skip
    torch.save(kept, folder / ADAPTER)
    spoil(folder / "adapter_config.json", fields)


@pytest.mark.parametrize("fields", [
    {"layers_to_transform": 1}, {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    {"exclude_modules": r".*layers\.0.*"},
])  # fmt: skip
def test_an_adapter_of_some_blocks_leaves_the_others_alone(
    hf, adapted, data, tmp_path, fields, monkeypatch
):
    """Its logits are those of the whole adapter with B zero in the other blocks."""
    monkeypatch.chdir(tmp_path)
    select_blocks(tmp_path / "peft", 1, **fields)
    for layer in (adapted.layers[0].attention.wq, adapted.layers[0].attention.wv):
        torch.nn.init.zeros_(layer.lora_B)
    run(hf, "again", "--to", "peft", "--adapter", "peft", "--bin")
    for name in ("peft", "again"):
        assert torch.equal(with_adapter(hf, tmp_path / name)(TOKENS), adapted(TOKENS))
    if fields == {"layers_to_transform": 1}:  # Training leaves the zeros what they are.
        train.main(["--checkpoint", "hf", "--data", str(data), "--adapter", "peft", "--max-steps",
                    "3", "--weight-decay", "0.1"])  # fmt: skip
        for name, tensor in torch.load("out/adapter.pt", weights_only=True)["tensors"].items():
            assert bool(tensor.any()) == name.startswith("layers.1."), name


def test_blocks_that_are_missing_are_named(hf, adapted, tmp_path, refused):
    select_blocks(tmp_path / "peft", 1)
    line = refused(generate.main, "--checkpoint", str(hf), "--adapter", "peft")
    assert "peft does not fit; it adapts block 1 of 2; " in line


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(base, hf, adapted, tmp_path, prefix):
    """In both layouts, in ours and in PEFT's adapters, before a name or within it."""
    files = [(base, "consolidated.00.pth"), (hf, WEIGHTS), (tmp_path / "peft", ADAPTER)]
    before = loaded(base)(TOKENS % 400)
    for folder, name in files:
        torch.save({prefix + key.replace("layers.1.", "layers.1._orig_mod."): tensor
                    for key, tensor in stored(folder, name).items()}, folder / name)  # fmt: skip
    content = stored(tmp_path, "peft.pt")
    content["tensors"] = {prefix + key: tensor for key, tensor in content["tensors"].items()}
    torch.save(content, tmp_path / "wrapped.pt")
    assert torch.equal(loaded(base)(TOKENS % 400), before)
    for name in ("peft", "wrapped.pt"):
        assert torch.equal(with_adapter(hf, tmp_path / name)(TOKENS), adapted(TOKENS))


def test_a_name_that_is_there_with_and_without_a_prefix(base, refused):
    weights = stored(base)
    weights["module.norm.weight"] = weights["norm.weight"] + 1
    torch.save(weights, base / "consolidated.00.pth")
    line = refused(generate.main, "--checkpoint", str(base), "--adapter", "none")
    assert "holds norm.weight twice, with and without the prefix of a wrapper" in line


# --- what a Hugging Face folder holds besides


@pytest.mark.parametrize("way", ["hf", "meta", "merged", "meta, then merged", "layers"])
def test_all_that_is_not_weights_comes_along(chat, tmp_path, way, capsys, monkeypatch):
    """To the byte; of config.json what the weights do not decide."""
    monkeypatch.chdir(tmp_path)
    before = texts_of(chat), read(chat / "config.json")
    source, flags = chat, []
    if "meta" in way:
        run(chat, "meta", "--to", "meta")
        source = "meta"
        output = capsys.readouterr().out
        assert "kept in huggingface.json, as Meta's layout has no place for it: LICENSE" in output
        assert "reads no more rows than tokenizer.model has pieces: 400 of these 403" in output
        assert load_checkpoint("meta")[0].args.max_seq_len == 256
    if "merged" in way:
        adapter_of(source, "adapter.pt")
        flags = ["--adapter", "adapter.pt"]
    if way == "layers":
        flags = ["--layers", "1", "--dtype", "bf16"]
    run(source, "new", "--to", "hf", "--bin", *flags)
    output = capsys.readouterr().out
    assert "teaches </s> (2); transformers ends texts as the configs say\n" in output
    decided = {"num_hidden_layers": 1, "torch_dtype": "bfloat16"} if way == "layers" else {}
    assert texts_of(tmp_path / "new") == before[0]
    assert read(tmp_path / "new/config.json") == before[1] | decided


@needs_peers
def test_transformers_reads_the_same_after_a_round_trip(chat, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(chat, tmp_path / "meta", "--to", "meta")
    adapter_of(chat, tmp_path / "adapter.pt")
    run(tmp_path / "meta", tmp_path / "new", "--to", "hf", "--bin", "--adapter",
        tmp_path / "adapter.pt")  # fmt: skip
    one, other = (AutoTokenizer.from_pretrained(path) for path in (chat, tmp_path / "new"))
    text = "<|im_start|>Name a colour.<|im_end|> [PAD] </s>"
    ids = other(text).input_ids
    assert ids == one(text).input_ids and ids.count(401) == ids.count(402) == ids.count(400) == 1
    for tokenizer in (one, other):
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (402, 400)
        assert TEMPLATE in str(tokenizer.chat_template)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    settings = peer.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.temperature) == (402, 400, 0.6)
    assert peer.config.max_position_embeddings == 256


def test_an_older_folder_keeps_its_form(hf, tmp_path):
    """Added tokens in a file of their own, and no tokenizer.json: none is made."""
    (hf / "tokenizer.json").unlink()
    (hf / "generation_config.json").unlink()
    write(hf / "added_tokens.json", {"<|im_start|>": 401})
    before = texts_of(hf)
    run(hf, tmp_path / "meta", "--to", "meta")
    run(tmp_path / "meta", tmp_path / "new", "--to", "hf", "--bin")
    assert texts_of(tmp_path / "new") == before


def test_what_is_not_copied_is_named(hf, tmp_path, capsys):
    spoil(hf / "config.json", {"auto_map": {"AutoModel": "model.Model"}})
    spoil(hf / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": "tokens.Tokens"}})
    write(hf / "model.py", "print('never run')")
    (hf / "NOTICE").write_bytes(b"\xff\xfe")  # not UTF-8
    run(hf, tmp_path / "meta", "--to", "meta")
    capsys.readouterr()
    run(hf, tmp_path / "new", "--to", "hf", "--bin")
    assert ("not copied: NOTICE, auto_map of config.json, auto_map of tokenizer_config.json, "
            "model.py\n") in capsys.readouterr().out  # fmt: skip
    run(tmp_path / "meta", tmp_path / "back", "--to", "hf", "--bin")
    for folder in ("new", "back"):
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in read(tmp_path / folder / name)
        assert not (tmp_path / folder / "model.py").exists()


def test_the_fields_page_is_what_the_code_does(hf, tmp_path):
    """Each row of the table in docs/files.md, and each field of FIELDS."""
    rows = re.findall(r"^\| `(\w+\.json)` \| (.+?) \| (.+?) \|$",
                      (ROOT / "docs/files.md").read_text(), re.M)  # fmt: skip
    table = {name: {} for name in FIELDS}
    for file, fields, fate in rows:
        for field in re.findall(r"`(\w+)`", fields):
            assert field not in table[file], field
            table[file][field] = fate.partition(":")[0]
    assert table == FIELDS
    for file, fields in FIELDS.items():
        carried = [field for field, fate in fields.items() if fate != USED]
        spoil(hf / file, {field: {"kept": field} for field in [*carried, "unheard_of"]})
    run(hf, tmp_path / "meta", "--to", "meta")
    run(tmp_path / "meta", tmp_path / "new", "--to", "hf", "--bin")
    for file, fields in FIELDS.items():
        written = read(tmp_path / "new" / file)
        assert written["unheard_of"] == {"kept": "unheard_of"}
        for field, fate in fields.items():
            if fate == CARRIED:
                assert written[field] == {"kept": field}
            if fate == LOST:
                assert field not in written


def test_a_save_of_full_fine_tuning_keeps_them(chat, data, tmp_path, monkeypatch):
    """With the base's context, whatever the run's; another model in the folder takes them away."""
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint", "hf", "--data", str(data), "--method", "full", "--max-seq-len",
                "100", "--max-steps", "1", "--out", "full"])  # fmt: skip
    assert load_checkpoint("full")[0].args.max_seq_len == 256
    run("full", "back", "--to", "hf", "--bin")
    assert read(tmp_path / "back/config.json")["max_position_embeddings"] == 256
    assert texts_of(tmp_path / "back") == texts_of(chat)
    train.main(["--checkpoint", "hf", "--data", str(data), "--max-steps", "1", "--out", "full",
                "--overwrite"])  # fmt: skip
    assert not (tmp_path / "full/huggingface.json").exists()


@pytest.mark.parametrize("content, message", [
    ({"../evil.json": "x"}, "huggingface.json holds '../evil.json', which is no text file of a"),
    ({"tokenizer.json": 5}, "huggingface.json holds 'tokenizer.json', which is no text file of a"),
    ({"config.json": "{"}, "huggingface.json: config.json is not JSON"),
    ({"config.json": '{"eos_token_id": [2, "x"]}'}, "eos_token_id of config.json is [2, 'x'], not"),
])  # fmt: skip
def test_a_file_of_companions_that_is_wrong(base, tmp_path, refused, content, message):
    write(base / "huggingface.json", content)
    assert message in refused(convert.main, str(base), "new", "--to", "hf", "--bin")
    assert not list(tmp_path.glob("*evil*"))


def test_a_kept_config_says_what_the_model_is(base, tmp_path):
    fields = {"head_dim": 99, "rope_parameters": {"rope_theta": 9.0}, "hidden_size": 5,
              "rope_scaling": {"type": "linear"}, "attention_bias": True}  # fmt: skip
    write(base / "huggingface.json", {"config.json": json.dumps(fields)})
    run(base, tmp_path / "new", "--to", "hf", "--bin")
    written = read(tmp_path / "new/config.json")
    assert written["head_dim"] == 8 and written["hidden_size"] == 32
    assert written["rope_parameters"] == {"rope_theta": 10000.0}
    assert torch.equal(loaded(base)(TOKENS % 400), loaded(tmp_path / "new")(TOKENS % 400))


# --- the end of a text


class Script(torch.nn.Module):
    """A model whose likeliest tokens are those of a list, one after another."""

    def __init__(self, tokens, model):
        super().__init__()
        self.tokens = tokens
        self.args = model.args
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, rows=None, layout=None):
        logits = torch.zeros(tokens.shape[1], self.args.vocab_size)
        for place, position in enumerate(layout.positions.tolist()):
            logits[place, self.tokens[min(position, len(self.tokens) - 1)]] = 50.0
        return logits[rows]


def test_several_ids_end_an_answer():
    model = Script([0, 0, 7, 8, 30, 9, 31], tiny(400))
    for eos, answer in ((30, [7, 8]), ((31,), [7, 8, 30, 9]), ({31, 30}, [7, 8]), ([8, 31], [7])):
        ids = [i for _, i in generate_ids(model, [[1, 5, 6]], 9, eos)]
        assert ids == beam_search(model, [1, 5, 6], 9, eos, 1) == answer


@pytest.mark.parametrize("config, generation, end_ids, note", [
    (2, 2, {2}, ""),
    (402, 402, {2, 402}, "texts end at 402 in config.json and generation_config.json, at </s> (2) "
     "in tokenizer.model; answers end at any of these, and training teaches </s> (2)"),
    (2, [2, 402], {2, 402}, "texts end at 2, 402 in generation_config.json, at </s> (2) in"),
    ([401, 402], None, {2, 401, 402}, "texts end at 401, 402 in config.json, at </s> (2) in"),
    (401, 402, {2, 401, 402}, "in tokenizer.model; answers end at any of these, and training "
     "teaches </s> (2); texts end at 402 in generation_config.json"),
    (1, None, {2}, "texts end at 1 in config.json, at </s> (2) in tokenizer.model; 1 cannot be an "
     "end of text and is ignored"),
    ([0, 402, -1, 403], None, {2, 402}, "-1, 0, 403 cannot be an end of text and is ignored"),
])  # fmt: skip
def test_the_ends_of_text_that_a_folder_names(hf, config, generation, end_ids, note):
    spoil(hf / "config.json", {"eos_token_id": config})
    spoil(hf / "generation_config.json", {"eos_token_id": generation})
    _, tokenizer = load_checkpoint(hf)
    assert tokenizer.end_ids == end_ids and tokenizer.eos_id == 2
    assert note in tokenizer.eos_note and bool(note) == bool(tokenizer.eos_note)


def test_an_end_of_text_that_is_no_id(hf, refused):
    spoil(hf / "generation_config.json", {"eos_token_id": "</s>"})
    line = refused(generate.main, "--checkpoint", str(hf), "--adapter", "none")
    assert "eos_token_id of generation_config.json is" in line


def test_commands_stop_there_and_say_so(chat, data, capsys, monkeypatch, tmp_path):
    """The head is made to say <|im_end|> at once."""
    monkeypatch.chdir(tmp_path)
    asked = ["--checkpoint", "hf", "--adapter", "none", "--instruction", "Name it.", "--verbose"]
    model, tokenizer = load_checkpoint(chat)
    features = []
    model.norm.register_forward_hook(lambda _, inputs, output: features.append(output[0, -1]))
    with torch.no_grad():
        model(torch.tensor([encode_prompt({"instruction": "Name it."}, tokenizer)]))
    weights = stored(chat, WEIGHTS)
    weights["lm_head.weight"].zero_()[402] = features[0]
    torch.save(weights, chat / WEIGHTS)
    capsys.readouterr()
    for flags in ([], ["--beams", "2"]):
        generate.main([*asked, *flags])
        output = capsys.readouterr()
        assert output.out == "\n### Name it.\n\n"
        assert "\n0 tokens in " in output.err
        assert output.err.count("eos: texts end at 402 in config.json and generation_") == 1
    train.main(["--checkpoint", "hf", "--data", str(data), "--dry-run"])
    assert "\neos       texts end at 402 in config.json and gener" in capsys.readouterr().out


# --- files that are not there


def test_pointers_of_git_lfs_are_named(base, hf, adapted, tmp_path, refused):
    (hf / "tokenizer.json").write_bytes(POINTER)  # No run here needs it; a copy would be broken.
    load_checkpoint(hf)
    pointer = "is a git-lfs pointer, not the file: git lfs pull"
    assert f"tokenizer.json {pointer}" in refused(convert.main, "hf", "new", "--to", "meta")
    for name in ("peft.pt", "peft/adapter_model.bin", "peft/adapter_config.json",
                 "base/consolidated.00.pth", "base/params.json"):  # fmt: skip
        (tmp_path / name).write_bytes(POINTER)
    asked = ["--checkpoint", "base", "--adapter"]
    assert f"peft.pt {pointer}" in refused(generate.main, *asked, "peft.pt")
    assert f"adapter_config.json {pointer}" in refused(generate.main, *asked, "peft")
    assert f"params.json {pointer}" in refused(generate.main, *asked, "none")
    (tmp_path / "base/params.json").write_text('{"dim": 32, "n_layers": 2, "n_heads": 4}')
    assert f"consolidated.00.pth {pointer}" in refused(generate.main, *asked, "none")
    (hf / WEIGHTS).write_bytes(POINTER)
    line = refused(generate.main, "--checkpoint", "hf", "--adapter", "none")
    assert f"pytorch_model.bin {pointer}" in line


def test_a_base_that_has_moved(hf, adapted, tmp_path, refused, capsys):
    hf.rename(tmp_path / "moved")
    for adapter in ("peft", "peft.pt"):
        line = refused(generate.main, "--adapter", adapter)
        assert f"no checkpoint folder at {hf}, which {adapter} names as its base" in line
        assert "name its folder with --checkpoint" in line
        generate.main(["--adapter", adapter, "--checkpoint", "moved", "--max-new-tokens", "1"])
        capsys.readouterr()
