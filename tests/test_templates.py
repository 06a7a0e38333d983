"""finetune/templates/: tokens and labels written out by hand, conversations, several files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
import train
from finetune import convert
from finetune.answers import Answerer
from finetune.dataset import (SupervisedDataset, count_answer, encode_example, encode_prompt,
                              load_datasets)
from finetune.evaluate import class_answers, evaluate
from finetune.exam import Exam
from finetune.examples import read_examples
from finetune.options import DEMO
from finetune.preflight import fit_line
from finetune.session import Session
from finetune.templates import TEMPLATES

from .helpers import ONE_THREAD, ROOT, stored, tiny

LLAMA2 = TEMPLATES["llama2"]
TEXT = TEMPLATES["text"]


class Characters:
    """A tokenizer with an id per character, bos 1 and eos 2, which shows rows as text."""

    bos_id, eos_id, vocab_size = 1, 2, 0x110000

    def encode(self, text, bos=False, eos=False):
        ids = [ord(character) for character in text]
        if bos:
            ids = [1, *ids]
        if eos:
            ids = [*ids, 2]
        return ids

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 2)


def written(row):
    """Return a row as text, with what is a target in {braces}."""
    text = ""
    within = False
    for token, label in zip(*row, strict=True):
        is_target = label != -100
        assert not is_target or label == token
        if is_target != within:
            text += "{" if is_target else "}"
        within = is_target
        text += {1: "<s>", 2: "</s>"}.get(token, chr(token))
    return text + "}" if within else text


def chat(*texts, system=None):
    """Return an example of messages: user, assistant, user and so on."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return {"messages": messages}


SHAREGPT = {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                              {"from": "gpt", "value": "A"}]}
ALPACA_FORM = {"instruction": "Q2", "input": "I", "output": "A2", "system": "S",
               "history": [["Q1", "A1"]]}
SINGLE = {"instruction": "Q", "input": "", "output": "A"}
STANFORD = SINGLE | {"input": "I", "text": "Below is an instruction.  Q  I  A"}    # has all four
ONE_TURN = "<s>[INST] Q [/INST]{A </s>}"
WITH_SYSTEM = "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]{A </s>}"


@pytest.mark.parametrize("example, expected", [
    (chat("Q", "A"), ONE_TURN),
    (chat("Q", "A", "R", "B", "T", "C"),
     f"{ONE_TURN}<s>[INST] R [/INST]{{B </s>}}<s>[INST] T [/INST]{{C </s>}}"),
    (chat("Q", "A", system="S"), WITH_SYSTEM),
    (chat("Q", "A", system=""), "<s>[INST] <<SYS>>\n\n<</SYS>>\n\nQ [/INST]{A </s>}"),
    (chat(" Q\n", "\tA "), ONE_TURN),
    (chat("[INST] </s>", "[/INST] <s>"), "<s>[INST] [INST] </s> [/INST]{[/INST] <s> </s>}"),
    (SHAREGPT, WITH_SYSTEM),
    ({"conversations": chat("Q", "A")["messages"]}, ONE_TURN),
    ({"conversations": chat("Q", "A")["messages"], "system": "S"}, WITH_SYSTEM),
    (chat("Q", "A") | {"conversations": [], "system": ""}, ONE_TURN),
    ({"messages": []} | SINGLE, ONE_TURN),
    ({"messages": SHAREGPT["conversations"]}, WITH_SYSTEM),
    (ALPACA_FORM,
     "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]{A1 </s>}<s>[INST] Q2\nI [/INST]{A2 </s>}"),
    (SINGLE | {"output": ""}, "<s>[INST] Q [/INST]{ </s>}"),
])  # fmt: skip
def test_llama2_by_hand(example, expected):
    assert written(encode_example(example, Characters(), LLAMA2)) == expected


def dataset(examples, max_seq_len, template=LLAMA2):
    return SupervisedDataset(examples, Characters(), max_seq_len, template=template)


def test_a_cut_answer_has_no_eos_and_the_next_turn_is_gone():
    data = dataset([chat("Q", "ABC", "R", "D")], 20)
    assert written(data[0]) == "<s>[INST] Q [/INST]{ABC}"
    assert (data.cut, data.dropped, data.n_with_eos) == (1, 0, 0)


def test_what_is_cut_is_told_from_turns_that_are_gone():
    """Turns end after 22, 42 and 62 tokens."""
    example = chat("Q", "ABC", "R", "D", "T", "E")
    for max_seq_len, cut_answers, lost_turns in ((20, 1, 2), (22, 0, 2), (30, 0, 2), (62, 0, 0)):
        data = dataset([example], max_seq_len)
        assert (data.cut_answers, data.lost_turns) == (cut_answers, lost_turns), max_seq_len
    line = fit_line(dataset([example, example], 20), 20)
    assert line.startswith("2 answers cut off at --max-seq-len 20, without the end that teaches")
    assert line.endswith("; 4 turns left out, beyond --max-seq-len 20")
    assert fit_line(dataset([example], 22), 22) == "2 turns left out, beyond --max-seq-len 22"


def test_a_prompt_ends_where_the_last_answer_begins():
    for example in (chat("Q", "A", "R"), chat("Q", "A", "R", "B")):
        prompt = encode_prompt(example, Characters(), LLAMA2)
        row = (prompt, [-100] * len(prompt))
        assert written(row) == "<s>[INST] Q [/INST]A </s><s>[INST] R [/INST]"


def test_metas_encoding_as_one_text_gives_the_same_ids(tokenizer):
    """Meta encodes question and answer of a turn as one text; no token crosses "[/INST]"."""
    turns = [("Name a colour.", "blue"), (" What [INST] is </s>?\n", "- a list\n- of things")]
    expected = []
    for question, answer in turns:
        text = f"[INST] {question.strip()} [/INST] {answer.strip()} "
        expected += tokenizer.encode(text, bos=True, eos=True)
    texts = [text for turn in turns for text in turn]
    assert encode_example(chat(*texts), tokenizer, LLAMA2)[0] == expected


def test_text_goes_on_in_further_rows_and_loses_nothing():
    documents = [{"text": "abcdefg"}, {"text": "xy"}]
    data = dataset(documents, 4, TEXT)
    rows = [written(row) for row in data.rows]
    assert rows == ["<s>{abc}", "c{def}", "f{g</s>}", "<s>{xy</s>}"]
    assert data.numbers == [1, 1, 1, 2]
    assert (data.cut, data.dropped, data.n_with_eos, data.n_empty) == (0, 0, 2, 0)
    assert class_answers(data, 512) is None
    for max_seq_len in range(2, 12):
        rows = dataset(documents, max_seq_len, TEXT).rows
        assert sum(count_answer(labels) for _, labels in rows) == 7 + 1 + 2 + 1


def test_alpaca_takes_one_turn_of_messages():
    assert encode_example(chat("Q", "A"), Characters()) == encode_example(SINGLE, Characters())


@pytest.mark.parametrize("template, example, message", [
    ("llama2", {"messages": [{"role": "bot", "content": "Q"}]}, "unknown role"),
    ("llama2", {"messages": [{"role": "assistant", "content": "A"}]}, "must alternate"),
    ("llama2", chat("Q", "A", "R"), "has no answer at its end"),
    ("llama2", chat("Q", " "), "message 2: 'content' is empty"),
    ("llama2", {"messages": []}, "not a list of messages"),
    ("llama2", chat("Q", "A") | {"instruction": "Q"}, "has both 'messages' and 'instruction'"),
    ("llama2",
     {"messages": [*chat("Q")["messages"], {"role": "assistant", "content": "A", "weight": 0}]},
     "message 2: the template has no place for 'weight'"),
    ("llama2", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "message 1: 'content' is [{'type': 'text'}], not text"),
    ("llama2",
     {"conversations": [{"from": "human", "value": "Q"}, {"role": "gpt", "content": "A"}]},
     "'conversations', message 2, has the keys ['role', 'content']; give each message 'from' "
     "and 'value'"),
    ("llama2", {"messages": [{"speaker": "user", "content": "Q"}]},
     "'messages', message 1, has the keys ['speaker', 'content']; give each message 'role' and "
     "'content'"),
    ("llama2", chat("Q", "\ud83d"), "has an incomplete character"),
    ("llama2", {"messages": [], "instruction": ""}, "'messages' is [], not a list of messages"),
    ("llama2", SHAREGPT | {"system": "T"},
     "has a system prompt in 'system' and one in its first message; give one"),
    ("alpaca", chat("Q", "A", "R", "B"), "has 2 turns, and the template alpaca has one"),
    ("alpaca", ALPACA_FORM, "use --template llama2"),
    ("alpaca", SINGLE | {"system": 5},
     "the template has no place for the text in 'system'; use --template llama2"),
    ("text", SINGLE, "has no 'text'"),
    ("text", {"text": "a", "input": "b"}, "plain text has no place for the input"),
    ("text", STANFORD, "remove it, or use --template alpaca"),
])  # fmt: skip
def test_what_a_template_cannot_say_is_refused_with_file_and_row(
    tmp_path, template, example, message
):
    path = tmp_path / "data.jsonl"
    good = {"text": "a", "input": " "} if template == "text" else chat("Q", "A")
    path.write_text("\n".join(map(json.dumps, [good, example])))
    with pytest.raises(ValueError) as error:
        read_examples(path, template=TEMPLATES[template])
    assert message in str(error.value) and f"{path}, example 2" in str(error.value)


def test_several_files_are_one_set_whose_numbers_name_the_file(tmp_path, tokenizer):
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    for path in paths:
        rows = [{"instruction": f"{path} {i}", "output": "yes"} for i in range(3)]
        Path(path).write_text(json.dumps(rows))
    training, held_out = load_datasets(paths, None, 0.5, 512, 0, tokenizer)
    assert len(training) == len(held_out) == 3
    whole, _ = load_datasets(paths, None, None, 512, 0, tokenizer)
    expected = [f"{path} {n}" for path in paths for n in (1, 2, 3)]
    assert whole.numbers == expected and set(training.numbers) < set(expected)


def test_plain_text_files(tmp_path):
    path = tmp_path / "book.TXT"
    path.write_text("Once upon a time.\n{not JSON")
    assert read_examples(path, template=TEXT) == [{"text": "Once upon a time.\n{not JSON"}]
    with pytest.raises(ValueError, match="begins with 'Once .* for plain text: --template text"):
        read_examples(path)
    with pytest.raises(ValueError, match="book.TXT, example 1 has no question to answer"):
        read_examples(path, ("instruction",), TEXT)
    beginning = {"instruction": "Once", "input": "upon", "output": None}
    (tmp_path / "beginning.json").write_text(json.dumps([beginning]))
    assert read_examples(tmp_path / "beginning.json", ("instruction",), TEXT) == [beginning]


@pytest.mark.parametrize("template, example", [
    (LLAMA2, chat("Q", "A") | {"output": None}), (TEXT, {"text": "a", "output": 5}),
])  # fmt: skip
def test_a_column_that_the_template_does_not_read_may_hold_anything(template, example, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([example]))
    assert len(read_examples(path, template=template)) == 1


def slow_loss(model, rows):
    """Return the mean of -log p over all targets, by one plain forward per row."""
    losses = []
    for tokens, labels in rows:
        log_p = model(torch.tensor([tokens]))[0].log_softmax(-1)
        losses += [-log_p[t, label].item() for t, label in enumerate(labels[1:]) if label != -100]
    return sum(losses) / len(losses)


@torch.no_grad()
def test_held_out_loss_of_several_turns_is_the_slow_one(tokenizer):
    model = tiny(tokenizer.vocab_size, max_seq_len=256).double()
    examples = [chat("Name a colour.", "blue", "Again?", "blue blue"), chat("One?", "two")]
    data = SupervisedDataset(examples, tokenizer, 256, template=LLAMA2)
    expected = slow_loss(model, data.rows)
    autocast = torch.autocast("cpu", enabled=False)
    assert evaluate(model, data, 512, autocast)["val_loss"] == pytest.approx(expected, rel=1e-9)
    exam = Exam(examples, tokenizer, 256, limit=3, template=LLAMA2)
    table = exam.score(model)
    assert table["nats"].sum() / table["tokens"].sum() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("system", [None, "", " Be brief.\n"])
def test_the_chat_template_for_transformers_writes_the_same_text(system):
    """The space before an answer is sentencepiece's here; in one text it must be written."""
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)   # transformers' own
    chat_template = environment.from_string(LLAMA2.chat_template)
    texts = [" Name a colour.\n", "blue ", "And [INST]?", "\n- one\n- two", "Again?"]
    for n in range(1, len(texts) + 1):
        example = chat(*texts[:n], system=system)
        expected = ""
        for piece in LLAMA2.pieces(example):
            expected += "<s>" * piece.bos + " " * piece.is_target + piece.text + "</s>" * piece.eos
        assert expected == chat_template.render(example, bos_token="<s>", eos_token="</s>")


def test_a_merge_writes_the_chat_template_unless_the_base_has_one(chat_run, tmp_path, capsys):
    convert.main([str(DEMO), str(tmp_path / "base"), "--to", "hf", "--bin", "--layers", "1"])
    config = tmp_path / "base/tokenizer_config.json"
    fields = json.loads(config.read_text())
    assert "chat_template" not in fields

    def merged(name):
        capsys.readouterr()
        convert.main([str(tmp_path / "base"), str(tmp_path / name), "--to", "hf", "--bin",
                      "--adapter", str(chat_run / "adapter.pt")])  # fmt: skip
        return json.loads((tmp_path / name / config.name).read_text()), capsys.readouterr().out

    written, printed = merged("new")
    assert written == fields | {"chat_template": LLAMA2.chat_template}
    assert "chat template of llama2 written to tokenizer_config.json" in printed
    config.write_text(json.dumps(fields | {"chat_template": "{{ bos_token }}"}))
    written, printed = merged("kept")
    assert written["chat_template"] == "{{ bos_token }}"
    assert "the base's own chat template is kept" in printed
    config.write_text(json.dumps(fields))
    (tmp_path / "base/chat_template.jinja").write_text("{{ bos_token }}")
    assert "chat_template" not in merged("kept too")[0]


def test_answers_that_the_template_writes_alike_are_one_choice(tokenizer):
    """LLaMA 2's format strips an answer; Alpaca's does not."""
    answers = ["yes", "no", "yes ", "no", "yes", "no"]
    examples = [{"instruction": "Q", "output": answer} for answer in answers]
    exam = Exam(examples, tokenizer, 512, template=LLAMA2)
    about = exam.about()
    assert about["choices"] == ["no", "yes"] and about["majority"]["accuracy"] == 0.5
    table = exam.score(tiny(tokenizer.vocab_size))
    assert table["confusion"].sum(2).tolist() == [[0, 1], [1, 0]] * 3
    assert Exam(examples, tokenizer, 512, ["no", " yes"], template=LLAMA2).choices == ["no", " yes"]
    with pytest.raises(ValueError, match="'yes' and 'yes ' are one answer in this template"):
        Exam(examples, tokenizer, 512, ["yes", "no", "yes "], template=LLAMA2)
    assert Exam(examples, tokenizer, 512).choices == ["no", "yes", "yes "]


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """Return the folder of a short run of the demo's chat examples."""
    out = tmp_path_factory.mktemp("chat")
    data = str(DEMO / "chat.json")
    train.main(["--template", "llama2", "--data", data, "--layers", "1", "--max-steps", "3",
                "--batch-size", "2", "--accumulation-steps", "1", "--out", str(out)])  # fmt: skip
    return out


def test_the_adapter_carries_its_template(chat_run):
    assert stored(chat_run, "adapter.pt")["base"]["template"] == "llama2"
    assert json.loads((chat_run / "args.json").read_text())["template"] == "llama2"
    args = generate.parse_args(["--adapter", str(chat_run / "adapter.pt")])
    saved = generate.read_saved(args)
    assert generate.template_of(args, saved) is LLAMA2
    args.template = "alpaca"
    assert generate.template_of(args, saved) is TEMPLATES["alpaca"]


@pytest.mark.parametrize("name", ["gone", 5])
def test_an_adapter_of_an_unknown_template_is_refused(name, chat_run, tmp_path, refused):
    content = stored(chat_run, "adapter.pt")
    content["base"]["template"] = name
    torch.save(content, tmp_path / "adapter.pt")
    for main in (generate.main, train.main):
        line = refused(main, "--adapter", "adapter.pt")
        assert f"was trained with the template {name!r}" in line


@pytest.fixture
def answerer(chat_run):
    """The run's model and adapter, answering in at most five tokens."""
    args = generate.parse_args(["--adapter", str(chat_run / "adapter.pt"), "--max-new-tokens", "5"])
    saved = generate.read_saved(args)
    model, tokenizer, _ = generate.load(args, saved, torch.device("cpu"), "fp32")
    return Answerer(model, tokenizer, LLAMA2, generate.decoding_of(args))


def test_a_session_of_three_turns_is_the_three_turn_prompt(answerer):
    """What --interactive answers to the third question, one prompt of three turns answers too."""
    session = Session(answerer, None, has_adapter=True)
    for question in ("What comes after Monday?", "And after that?", "Say it once more."):
        session.reply(question)
    answers = [message["content"] for message in session.turns if message["role"] == "assistant"]
    assert len(answers) == 3
    prompt = {"messages": session.turns[:-1]}
    tokens = [token for _, token in answerer.answer_ids([prompt])]
    assert answerer.tokenizer.decode(tokens).strip() == answers[-1].strip()


def test_without_an_adapter_a_session_has_the_default_template(answerer, capsys):
    for given, expected in ((None, "alpaca"), ("llama2", "llama2")):
        answerer.template = LLAMA2
        session = Session(answerer, given, has_adapter=True)
        session.reply("What comes after Monday?")
        session.switch_adapter("none")
        assert answerer.template is TEMPLATES[expected]
        assert (session.turns == []) == (expected == "alpaca")
    assert capsys.readouterr().err.count("a new conversation begins") == 1


def test_deleting_a_page_and_its_lines_leaves_the_rest(tmp_path):
    tree = tmp_path / "tree"
    for name in ("llama", "lora", "finetune"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tree)
    (tree / "finetune/templates/llama2.py").unlink()
    pages = tree / "finetune/templates/__init__.py"
    lines = pages.read_text().splitlines(keepends=True)
    pages.write_text("".join(line for line in lines if "llama2" not in line))
    command = [sys.executable, "train.py", "--layers", "1", "--dry-run"]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, env=ONE_THREAD)
