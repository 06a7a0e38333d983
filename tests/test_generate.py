"""generate.py: base and adapter and merged, a file, a conversation, and the flags."""
import io
import json
import re
import shutil

import pytest
import torch

import generate as command
import train
from llama import load_checkpoint, save_checkpoint

from .helpers import EXAMPLES, tiny


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, tokenizer):
    """The folder of a run whose adapter says something else than the base, which is the `base` of conftest.py."""
    folder = tmp_path_factory.mktemp("learnt")
    save_checkpoint(tiny(tokenizer.vocab_size, n_kv_heads=2), tokenizer, folder / "base")
    (folder / "data.json").write_text(json.dumps(EXAMPLES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["--checkpoint", "base", "--data", "data.json", "--targets", "all", "--lr", "1e-2",
                    "--epochs", "40", "--accumulation-steps", "1", "--dropout", "0"])
    return folder / "out"


@pytest.fixture
def trained(learnt, base, data, tmp_path, monkeypatch, capsys):
    """say(*flags) where ./out holds that run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(learnt, "out")
    capsys.readouterr()

    def say(*flags):
        command.main([*flags, "--max-new-tokens", "8"])
        return capsys.readouterr()
    return say


def test_base_adapter_and_merged(trained, base, tokenizer):
    asked = ("--instruction", "Say blue please.")
    adapted, alone, merged = trained(*asked), trained(*asked, "--adapter", "none", "--checkpoint", str(base)), trained(*asked, "--merge")
    assert adapted.out == merged.out != alone.out
    assert adapted.out == "\n### Say blue please.\nblue \n"                  # learnt, and stops by itself
    assert re.search(r"^base \S+/base, 2 layers, fp32 on cpu; adapter out/adapter.pt, lora r 16 on all$", adapted.err, re.M)
    assert "merged: 100.0 % of the update survives in float32; logits of up to" in merged.err
    assert "; adapter" not in alone.err


def test_the_adapter_file_names_its_base_and_layers(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint", str(base), "--data", str(data), "--layers", "1", "--max-steps", "1", "--out", "one"])
    command.main(["--adapter", "one/adapter.pt", "--instruction", "Say", "--max-new-tokens", "1"])
    assert "1 layer," in capsys.readouterr().err


def test_the_adapter_answers_without_dropout(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--dropout", "0.5"])
    model, *_ = command.load(command.parse_args(["--precision", "fp32"]), torch.device("cpu"), "fp32")
    assert not any(module.training for module in model.modules())


def test_weights_that_are_no_numbers_end_in_one_line(trained, tmp_path, capsys):
    content = torch.load("out/adapter.pt", weights_only=True)
    for value, message in ((float("nan"), "out/adapter.pt has values that are not finite, in layers.0.attention.wq.lora_B"),
                           (3e38, "the model's logits are not finite")):
        content["tensors"]["layers.0.attention.wq.lora_B"].fill_(value)
        torch.save(content, "out/adapter.pt")
        for flags in ([], ["--temperature", "1"], ["--beams", "2"], ["--data", "examples.json"]):
            with pytest.raises(SystemExit, match="2"):
                trained(*flags)
            assert f"generate.py: {message}" in capsys.readouterr().err


def test_an_adapter_taken_by_default_is_named_when_it_does_not_fit(trained, base, capsys):
    with pytest.raises(SystemExit, match="2"):
        trained("--layers", "1")
    assert "; out/adapter.pt is the default because it is there, --adapter none runs without it" in capsys.readouterr().err


def test_input_goes_into_the_prompt(trained):
    with_input = trained("--instruction", "Say cold again please.", "--input", "quietly")
    assert with_input.out.startswith("\n### Say cold again please.\n# quietly\ncold")


def test_flags_reach_the_sampler(trained):
    def asked(*flags):
        return trained("--instruction", "Say", *flags).out
    hot = ("--temperature", "3", "--seed")
    assert asked(*hot, "1") == asked(*hot, "1") != asked(*hot, "2")
    assert asked(*hot, "1", "--top-k", "1") == asked(*hot, "1", "--top-p", "1e-9") == asked()
    assert asked("--beams", "3") and asked("--no-repeat-ngram", "1")


def test_a_file_is_answered_to_json_lines(trained, tmp_path):
    """Twelve questions in batches, one without an output; each answered as it is alone; progress on stderr."""
    questions = [{key: value for key, value in example.items() if key != "output"} for example in EXAMPLES[:-1]] + EXAMPLES[-1:]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    said = trained("--data", "questions.jsonl")
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "answer"} for row in rows] == questions
    assert sum(row["answer"] != "" and example["output"].startswith(row["answer"]) for row, example in zip(rows, EXAMPLES)) >= 10
    assert said.err.splitlines()[1:] == ["8/12 answered", "12/12 answered"]
    for row in rows[::5]:
        alone = trained("--instruction", row["instruction"], "--input", row["input"]) if row["input"] \
            else trained("--instruction", row["instruction"])
        assert alone.out.endswith(f"\n{row['answer']}\n")
    beams = trained("--data", "questions.jsonl", "--beams", "2").out
    assert len(beams.splitlines()) == 12


def test_interactive_answers_lines_and_switches_adapters_on_one_base(trained, base, data, monkeypatch):
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--out", "other", "--targets", "w2", "--lr", "1"])
    typed = ["Say blue please.\n", " :adapter none\n", "Say blue please.\n", "\n", ":adapter other/adapter.pt\n", "Say blue please.\n",
             ":adapter nowhere.pt\n", ":adapter\n", ":quit\n", "Say blue please.\n", ":adapter out/adapter.pt\n", "Say blue please.\n"]
    loads = []
    monkeypatch.setattr(command, "load_checkpoint", lambda *args, **rest: loads.append(args) or load_checkpoint(*args, **rest))
    for flags in ((), ("--merge",)):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(typed)))
        said = trained("--interactive", *flags)
        first, bare, other, still_other, again = (part.strip() for part in said.out.split("###")[1:] if part.strip())
        assert first == again == "blue" and other == still_other and len({first, bare, other}) == 3
        assert "generate.py: no adapter file at nowhere.pt" in said.err
        assert said.err.count("\nadapter ") == 3
        assert said.err.count("type an instruction, or :adapter PATH, or :adapter none") == 2
        asked = ("--instruction", "Say blue please.", "--adapter")
        assert trained(*asked, "none", "--checkpoint", str(base)).out.endswith(f"\n{bare}\n")
        assert trained(*asked, "other/adapter.pt").out.endswith(f"\n{other}\n")
    assert len(loads) == 6                                                    # two sessions, four plain calls


def test_verbose_says_tokens_a_forward_and_a_second(base, data, capsys):
    def asked(*flags):
        command.main(["--checkpoint", str(base), "--adapter", "none", "--max-new-tokens", "8", *flags])
        return capsys.readouterr()
    for flags, lines in ((("--instruction", "Say"), 1), (("--data", str(data)), 2), (("--instruction", "Say", "--beams", "2"), 1), ((), 6)):
        quiet, said = asked(*flags), asked(*flags, "--verbose")
        found = re.findall(r"(\d+) tokens in (\d+) forwards, (\S+) per forward; \S+ tokens/s\n", said.err)
        assert said.out == quiet.out and len(found) == lines                  # an answer each, or a batch
        assert re.sub(r".* tokens in .*\n", "", said.err) == quiet.err
        for tokens, forwards, ratio in found:
            assert int(forwards) <= 8 and float(ratio) == pytest.approx(int(tokens) / int(forwards), abs=0.006)
            assert flags[0:1] != ("--data",) or float(ratio) > 2             # of eight prompts, or four, in one forward


def test_later_answers_of_a_session_take_fewer_forwards(base, tmp_path, capsys, monkeypatch):
    """The same instruction again, typed or in another batch of a file: the same answer from what is remembered of the first."""
    (tmp_path / "same.json").write_text(json.dumps([{"instruction": "Say"}] * 9))
    for flags in (["--interactive"], ["--data", str(tmp_path / "same.json")]):
        monkeypatch.setattr(command, "BATCH", 1)
        monkeypatch.setattr("sys.stdin", io.StringIO("Say\n" * 9))
        command.main(["--checkpoint", str(base), "--adapter", "none", "--max-new-tokens", "40", "--verbose", *flags])
        said = capsys.readouterr()
        answers = [json.loads(line)["answer"] for line in said.out.splitlines()] if "--data" in flags else said.out.split("\n### ")[1:-1]
        forwards = [int(n) for n in re.findall(r"tokens in (\d+) forwards", said.err)]
        assert len(answers) == len(forwards) == 9 and len(set(answers)) == 1 and max(forwards[1:]) < forwards[0]


def test_several_dtypes_answer(trained):
    for precision in ("bf16", "fp16"):
        assert f"{precision} on cpu" in trained("--instruction", "Say blue please.", "--precision", precision).err
