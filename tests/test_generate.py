"""generate.py: base and adapter and merged, a file, a conversation, and the flags."""
import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import finetune.session
import generate as command
import train
from finetune.session import Session
from finetune.templates import DEFAULT
from llama import load_checkpoint, save_checkpoint

from .helpers import EXAMPLES, given_once, tiny

BLUE = ("--instruction", "Say blue please.")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, tokenizer):
    """The folder of a run whose adapter answers otherwise than the base, conftest.py's `base`."""
    folder = tmp_path_factory.mktemp("learnt")
    save_checkpoint(tiny(tokenizer.vocab_size, n_kv_heads=2), tokenizer, folder / "base")
    (folder / "data.json").write_text(json.dumps(EXAMPLES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["--checkpoint", "base", "--data", "data.json", "--targets", "all",
                    "--lr", "1e-2", "--epochs", "30", "--accumulation-steps", "1",
                    "--batch-size", "12", "--dropout", "0"])
    return folder / "out"


@pytest.fixture
def say(base, tmp_path, monkeypatch, capsys):
    """say(*flags) is (output, error) of generate.py, which answers in up to 8 tokens."""
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def say(*flags):
        command.main(given_once(["--max-new-tokens", "8", *flags]))
        return capsys.readouterr()

    return say


@pytest.fixture
def trained(learnt, say):
    """`say` where ./out holds that run."""
    shutil.copytree(learnt, "out")
    return say


def test_base_adapter_and_merged(trained, base):
    adapted = trained(*BLUE)
    alone = trained(*BLUE, "--adapter", "none", "--checkpoint", str(base))
    merged = trained(*BLUE, "--merge")
    assert adapted.out == merged.out != alone.out
    assert adapted.out == "\n### Say blue please.\nblue \n"      # It is learnt, and ends.
    loaded = r"^base \S+/base, 2 layers, fp32 on cpu; adapter out/adapter.pt, lora r 16 on all$"
    assert re.search(loaded, adapted.err, re.M)
    assert "merged: 100.0 % of the update survives in float32; logits of up to" in merged.err
    assert "; adapter" not in alone.err
    for precision in ("bf16", "fp16"):
        assert f"{precision} on cpu" in trained(*BLUE, "--precision", precision).err


def test_the_adapter_file_names_its_base_and_layers_and_answers_without_dropout(say, base, data):
    train.main(["--checkpoint", str(base), "--data", str(data), "--layers", "1",
                "--max-steps", "1", "--dropout", "0.5"])
    assert "1 layer," in say("--instruction", "Say").err
    args = command.parse_args(["--precision", "fp32"])
    model, *_ = command.load(args, command.read_saved(args), torch.device("cpu"), "fp32")
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("value, message", [
    (float("nan"), "in layers.0.attention.wq.lora_B"),
    (3e38, "the model's logits are no"),
])
def test_weights_that_are_no_numbers_end_in_one_line(trained, capsys, value, message):
    content = torch.load("out/adapter.pt", weights_only=True)
    content["tensors"]["layers.0.attention.wq.lora_B"].fill_(value)
    torch.save(content, "out/adapter.pt")
    for flags in ([], ["--temperature", "1"], ["--beams", "2"]):
        with pytest.raises(SystemExit, match="2"):
            trained(*flags)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("generate.py: ") and message in line


def test_an_adapter_taken_by_default_is_named_when_it_does_not_fit(trained, refused):
    assert ("; out/adapter.pt was chosen because it exists; --adapter none runs without it"
            in refused(command.main, "--layers", "1"))


@pytest.mark.parametrize("flags", [["--checkpoint", "typo"],
                                   ["--template", "text", "--data", "data.json", "--score"]])
def test_it_is_not_named_where_it_is_not_the_reason(trained, refused, data, flags):
    data.rename("data.json")
    assert "was chosen because" not in refused(command.main, *flags)


def test_input_and_flags_reach_prompt_and_sampler(trained):
    with_input = trained("--instruction", "Say cold again please.", "--input", "quietly").out
    assert with_input.startswith("\n### Say cold again please.\n# quietly\ncold")

    def answer(*flags):
        return trained("--instruction", "Say", *flags).out

    hot = ("--temperature", "3", "--seed")
    assert answer(*hot, "1") == answer(*hot, "1") != answer(*hot, "2")
    assert answer(*hot, "1", "--top-k", "1") == answer(*hot, "1", "--top-p", "1e-9") == answer()
    assert answer("--beams", "3") and answer("--no-repeat-ngram", "1")


def test_a_file_is_answered_to_json_lines(trained, tmp_path):
    """Twelve questions in batches; each is answered as it is alone; progress on stderr."""
    questions = [dict(example) for example in EXAMPLES]
    for question in questions[:-1]:
        del question["output"]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    printed, error = trained("--data", "questions.jsonl")
    rows = [json.loads(line) for line in printed.splitlines()]
    answers = [row.pop("answer") for row in rows]
    assert rows == questions
    n_right = 0
    for answer, example in zip(answers, EXAMPLES, strict=True):
        n_right += answer != "" and example["output"].startswith(answer)
    assert n_right >= 10
    assert error.splitlines()[1:] == ["8/12 answered", "12/12 answered"]
    for answer, example in zip(answers[::5], EXAMPLES[::5], strict=True):
        more = ["--input", example["input"]] if example["input"] else []
        alone = trained("--instruction", example["instruction"], *more)
        assert alone.out.endswith(f"\n{answer}\n")
    beams = trained("--data", "questions.jsonl", "--beams", "2").out
    assert len(beams.splitlines()) == 12


TYPED = """Say blue please.
 :adapter none
Say blue please.

:adapter other/adapter.pt
Say blue please.
:adapter nowhere.pt
:adapter
:quit
Say blue please.
:adapter out/adapter.pt
Say blue please.
"""


@pytest.mark.parametrize("flags", [(), ("--merge",)])
def test_interactive_answers_lines_and_switches_adapters_on_one_base(trained, base, data,
                                                                     monkeypatch, flags):
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--out",
                "other", "--targets", "w2", "--lr", "1"])
    loads = []

    def noting(*args, **settings):
        loads.append(args)
        return load_checkpoint(*args, **settings)

    monkeypatch.setattr(command, "load_checkpoint", noting)
    monkeypatch.setattr("sys.stdin", io.StringIO(TYPED))
    trained("--adapter", "none", "--checkpoint", str(base), "--instruction", "a")
    loads.clear()
    printed, error = trained("--interactive", *flags)
    assert len(loads) == 1
    answers = [part.strip() for part in printed.split("###")[1:] if part.strip()]
    first, bare, other, still_other, again = answers
    assert first == again == "blue" and other == still_other and len({first, bare, other}) == 3
    assert "generate.py: no adapter file at nowhere.pt" in error
    assert error.count("\nadapter ") == 3
    assert error.count("type an instruction, or :adapter PATH, or :adapter none") == 2
    alone = trained(*BLUE, "--adapter", "none", "--checkpoint", str(base)).out
    assert alone.endswith(f"\n{bare}\n")
    assert trained(*BLUE, "--adapter", "other/adapter.pt").out.endswith(f"\n{other}\n")


@pytest.mark.parametrize("error", [
    BrokenPipeError("the reader has gone"), OSError("standard output cannot be written")])
def test_a_session_ends_with_its_output(monkeypatch, error):
    """It does not compute answers that nobody can read."""
    asked = []

    def show(example):
        asked.append(example)
        raise error

    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    session = Session(SimpleNamespace(show=show, template=DEFAULT), None, has_adapter=True)
    with pytest.raises(OSError, match=str(error)):
        session.run()
    assert asked == [{"instruction": "one"}]


@pytest.mark.parametrize("base, warned", [({"quantize": "none"}, 1), ({"quantize": "nf4"}, 0),
                                          ({}, 1), (None, 0)])
def test_a_session_warns_of_another_quantisation(monkeypatch, capsys, base, warned):
    """base: what the adapter says of its base; PEFT's folders say nothing."""
    model = torch.nn.Linear(1, 1)
    model.args = None
    model.origin = {"quantize": "nf4"}
    base = base if base is None else {"folder": "base", **base}
    monkeypatch.setattr(finetune.session, "adapter_at", lambda *_: "adapter")
    monkeypatch.setattr(finetune.session, "read_adapter", lambda _: {"base": base})
    monkeypatch.setattr(finetune.session, "load_adapter", lambda *_: None)
    Session(SimpleNamespace(model=model, template=DEFAULT), None, True).switch_adapter("adapter")
    assert capsys.readouterr().err.count("warning: trained over a base with quant") == warned


def test_only_what_is_asked_must_fit(say, base, monkeypatch):
    """--interactive does not ask the six built-in questions."""
    monkeypatch.setattr(command, "INSTRUCTIONS", [{"instruction": "long " * 5000}])
    monkeypatch.setattr("sys.stdin", io.StringIO("Say\n"))
    flags = ["--checkpoint", str(base), "--adapter", "none"]
    assert "### " in say(*flags, "--interactive").out
    with pytest.raises(SystemExit):
        command.main(flags)


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "generate.py: CUDA out of memory. Tried"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "generate.py: DefaultCPUAlloc"),
    (RuntimeError("a fault of ours"), None),
])
def test_too_little_memory_is_one_line(monkeypatch, capsys, error, line):
    def load(*_):
        raise error

    monkeypatch.setattr(command, "load", load)
    with pytest.raises(SystemExit if line else RuntimeError) as left:
        command.main(["--adapter", "none"])
    if line:
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("flags, n_lines", [
    (["--instruction", "Say"], 1),
    (["--data", "examples.json"], 2),
    (["--instruction", "Say", "--beams", "2"], 1),
    ([], 6),
])
def test_verbose_says_tokens_a_forward_and_a_second(say, base, data, flags, n_lines):
    """Per answer, or per batch: of eight prompts, or four, in one forward."""
    flags = ["--checkpoint", str(base), "--adapter", "none", *flags]
    quiet = say(*flags)
    verbose = say(*flags, "--verbose")
    line = (r"(\d+) tokens? in (\d+) forward pass(?:es)?, (\S+) tokens per pass; "
            r"\S+ tokens/s\n")
    counts = re.findall(line, verbose.err)
    assert verbose.out == quiet.out and len(counts) == n_lines
    assert re.sub(r".* tokens? in .*\n", "", verbose.err) == quiet.err
    for tokens, forwards, ratio in counts:
        assert int(forwards) <= 8
        assert float(ratio) == pytest.approx(int(tokens) / int(forwards), abs=0.006)
        assert "--data" not in flags or float(ratio) > 2


@pytest.mark.parametrize("flags", [["--interactive"], ["--data", "same.json"]])
def test_later_answers_of_a_session_take_fewer_forwards(say, base, tmp_path, monkeypatch, flags):
    """The same instruction again: the same answer from what is remembered of the first."""
    (tmp_path / "same.json").write_text(json.dumps([{"instruction": "Say"}] * 9))
    monkeypatch.setattr("finetune.answers.ANSWERED_AT_ONCE", 1)
    monkeypatch.setattr("sys.stdin", io.StringIO("Say\n" * 9))
    printed, error = say("--checkpoint", str(base), "--adapter", "none", "--max-new-tokens", "40",
                         "--verbose", *flags)
    answers = printed.split("\n### ")[1:-1]
    if "--data" in flags:
        answers = [json.loads(line)["answer"] for line in printed.splitlines()]
    forwards = [int(n) for n in re.findall(r"tokens? in (\d+) forward", error)]
    assert len(answers) == len(forwards) == 9 and len(set(answers)) == 1
    assert max(forwards[1:]) < forwards[0]
