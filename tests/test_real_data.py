"""Data as people have it: several answers in a row, any form of file, fields of the prompt."""

import json

import pytest
import torch
import torch.nn.functional as F

import finetune.dataset
import finetune.exam
import finetune.preflight
import generate
import train
from finetune.batches import DataCollatorForSupervisedDataset, first_target, pack
from finetune.dataset import IGNORE, SupervisedDataset, answer_spans, load_datasets
from finetune.distill import Distillation
from finetune.evaluate import class_answers, evaluate, score_answers
from finetune.exam import Exam
from finetune.examples import read_examples
from finetune.loss import answer_loss
from llama import load_checkpoint, save_checkpoint
from lora import load_adapter

from .helpers import EXAMPLES, random_ids, tiny

_ = IGNORE


@pytest.fixture
def read(tmp_path):
    """read(content) returns the examples of a file a.json that holds it: text, bytes or rows."""
    def read(content):
        if isinstance(content, list):
            content = json.dumps(content)
        path = tmp_path / "a.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_examples(path)

    return read


# --- labels


@torch.no_grad()
def reference(model, row):
    """Return (nats, targets, hits) of a row: a plain forward, a cross-entropy over its labels."""
    tokens, labels = row
    logits = model(torch.tensor([tokens]))[0, :-1].double()
    targets = torch.tensor(labels[1:])
    nats = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE).item()
    return nats, (targets != IGNORE).sum().item(), (logits.argmax(-1) == targets).sum().item()


def several(n=9, seed=0):
    """Return rows with one to three answers, a shared beginning, and a masked tail in some."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        tokens = [1, *range(20, 35)]
        labels = [_] * len(tokens)
        for turn in range(1 + i % 3):
            question = random_ids(draw, 1, 9)
            answer = [*random_ids(draw, 0, 7), 2]
            tail = random_ids(draw, 1, 5) if turn == i % 3 and i % 2 else []
            tokens += question + answer + tail
            labels += [_] * len(question) + answer + [_] * len(tail)
        rows.append((tokens, labels))
    return rows


def test_answers_of_a_row_by_hand():
    assert answer_spans([_, _, 7, 2, _, _, 8, 2, _]) == [(2, 4), (6, 8)]
    assert answer_spans([5, 6, _, 2]) == [(1, 2), (3, 4)]  # Nothing predicts the first token.
    assert answer_spans([_, _]) == answer_spans([5]) == []


@pytest.mark.parametrize("tokens", [1, 150, 10**6])
def test_scores_follow_the_labels(tokens):
    model = tiny(n_kv_heads=2)
    rows = several()
    table = score_answers(model, rows, tokens=tokens)
    expected = torch.tensor([reference(model, row) for row in rows], dtype=torch.float64)
    assert torch.allclose(table["nats"], expected[:, 0], rtol=1e-5)
    assert torch.equal(table["tokens"], expected[:, 1])
    assert torch.equal(table["hits"], expected[:, 2])


@pytest.mark.parametrize("collate", [
    DataCollatorForSupervisedDataset(0), pack, lambda rows: pack(rows, share_prefix=True)])
def test_losses_follow_the_labels(collate):
    """The plain loss, and distillation from the student itself, which adds only its T^2 KL = 0."""
    model = tiny(n_kv_heads=2).double()
    rows = several()
    batch = collate(rows)
    scores = [reference(model, row) for row in rows]
    nats = sum(score[0] for score in scores)
    assert batch.n_answer == sum(score[1] for score in scores)
    assert answer_loss(model, batch)[0].item() == pytest.approx(nats, rel=1e-10)
    guide = Distillation(tiny(n_kv_heads=2).double(), 2.0, 0.5)
    assert guide(model, batch)[0].item() == pytest.approx(0.5 * nats, rel=1e-10)


def encode_turns(example, tokenizer, template=None):
    """Encode an example as three turns: its question and answer, a further question, its answer."""
    begin = tokenizer.encode(example["instruction"], bos=True)
    answer = tokenizer.encode(example["output"], eos=True)
    between = tokenizer.encode("And once more:")
    tail = tokenizer.encode("Thank you.")
    labels = [_] * len(begin) + answer + [_] * len(between) + answer + [_] * len(tail)
    return begin + answer + between + answer + tail, labels


@pytest.fixture
def turns(monkeypatch):
    """Every example has two answers and a masked tail."""
    monkeypatch.setattr(finetune.dataset, "encode_example", encode_turns)
    monkeypatch.setattr(finetune.exam, "encode_example", encode_turns)


def test_a_dataset_of_several_answers(turns, tokenizer):
    data = SupervisedDataset(EXAMPLES, tokenizer, 512)
    assert (data.cut, data.dropped, data.n_with_eos, data.n_empty) == (0, 0, 12, 0)
    assert class_answers(SupervisedDataset(EXAMPLES[:2] * 6, tokenizer), 512) is None
    tokens, labels = data[0]
    (_begin, first_end), (second_begin, _end) = answer_spans(labels)
    # The cut is in the second question, then before the first eos.
    for length, n_with_eos in ((second_begin - 1, 1), (first_end - 1, 0)):
        cut = SupervisedDataset(EXAMPLES[:1], tokenizer, length)
        assert (cut.cut, cut.dropped, cut.n_with_eos) == (1, 0, n_with_eos)
        assert cut[0] == (tokens[:length], labels[:length])
    with pytest.raises(ValueError, match="none of 1 examples has an answer token"):
        SupervisedDataset(EXAMPLES[:1], tokenizer, first_target(labels))


def test_held_out_loss_and_best_adapter_follow_the_labels(turns, run, base, data, tokenizer):
    rows = run("out", "--val-data", str(data), "--max-steps", "2", "--epochs", "2", "--dropout=0")
    model, _tokenizer = load_checkpoint(base)
    load_adapter(model.eval(), "out/best.pt")
    held_out = load_datasets([str(data)], [str(data)], None, 512, 0, tokenizer)[1]
    scores = [reference(model, row) for row in held_out.rows]
    expected = sum(score[0] for score in scores) / sum(score[1] for score in scores)
    lowest = min(row["val_loss"] for row in rows if "val_loss" in row)
    assert lowest == pytest.approx(expected, 1e-5)
    no_autocast = torch.autocast("cpu", enabled=False)
    assert evaluate(model, held_out, 200, no_autocast)["val_loss"] == pytest.approx(expected, 1e-5)


def test_an_exam_asks_for_the_last_answer_and_scores_all(turns, tokenizer, monkeypatch):
    prompts = []

    examples = EXAMPLES[:4]
    outputs = [example["output"] for example in examples]

    def answer_rightly(model, asked, limit, eos, pool):
        prompts.extend(asked)
        for k in range(len(asked)):
            for token in tokenizer.encode(outputs[k]):
                yield k, token

    monkeypatch.setattr(finetune.exam, "generate", answer_rightly)
    exam = Exam(examples, tokenizer, 512)
    model = tiny(tokenizer.vocab_size)
    table = exam.score(model)
    whole = [encode_turns(example, tokenizer) for example in examples]
    assert prompts == [tokens[: answer_spans(labels)[1][0]] for tokens, labels in whole]
    assert table["exact_match"].tolist() == table["ended"].tolist() == [1] * 4
    expected = [reference(model, row) for row in whole]
    assert table["nats"].tolist() == pytest.approx([score[0] for score in expected], rel=1e-5)
    assert exam.about()["answer_tokens"] == sum(score[1] for score in expected)
    assert exam.choices is None
    with pytest.raises(ValueError, match="--choices compares single answers"):
        Exam(examples, tokenizer, 512, outputs)


# --- forms of a file

ROWS = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "output": "d\u2028"}]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize("content", [
    LINES,
    "\ufeff\n\n" + LINES.replace("\n", "\r\n \r\n"),
    json.dumps(ROWS, indent=1),
    json.dumps({"version": "1.0", "n": 2, "train": ROWS}, indent=2),
])
def test_a_file_is_read_by_what_is_in_it(tmp_path, content):
    for name in ("a.json", "a.jsonl", "a.txt"):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        assert read_examples(tmp_path / name) == ROWS


GOOD = '{"instruction": "a", "output": "b"}'


def one(fields):
    """Return a file of one example with these fields, as JSON has them."""
    return f"[{{{fields}}}]"


@pytest.mark.parametrize("content, message", [
    (b"instruction,output\na,b\n", "begins with 'instruction,output\\na', which is not JSON: give"),
    (LINES.encode("utf-16"), "a.json is UTF-16 text; save it as UTF-8"),
    (b"\x1f\x8b\x08\0", "a.json is compressed with gzip; unpack it"),
    (b"PAR1\x15\x04", "a.json is a Parquet table; export its rows as JSON"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    (f"{GOOD},\n{GOOD}", "a.json, line 1, column 36: not JSON (there is more after the end"),
    (f"{GOOD}\n{GOOD}\n{{", "a.json, line 3: not JSON"),
    (one('"instruction": "a", "output": "b", "output": "c"'), "'output' stands twice in {"),
    ('{"train": [1], "test": [2]}', "a.json holds one object with the fields 'train', 'test'"),
    ('{"instruction": ["a"], "output": ["b"]}', "a.json holds columns, not rows: give a list"),
    ('{"system": "Be terse.", "data": [' + GOOD + "]}", "none of them has the text in 'system'"),
    (one('"text": "a"'), "example 1 has no 'instruction'; its fields are 'text'"),
    (one('"instruction": "a", "output": {"x": 1}'), "'output' is an object, not text"),
    (one('"instruction": "a", "output": NaN'), "'output' is null or NaN, as a blank cell is"),
    (one('"instruction": "a", "output": true'), "'output' is true, not text: is it True, true or"),
    (one('"instruction": "a", "output": 1e999'), "'output' is the number inf, not text"),
    (one('"instruction": " ", "input": "", "output": "b"'), "'instruction' is empty, and so is"),
    (one('"instruction": "\\ud83d", "output": "b"'), "has an incomplete character, such as half"),
    (one('"instruction": "a", "output": " "'), "a.json: every 'output' is empty"),
])
def test_a_file_that_is_refused(read, content, message):
    with pytest.raises(ValueError) as caught:
        read(content)
    assert message in str(caught.value)


@pytest.mark.parametrize("row, expected", [
    ({"instruction": "a", "input": float("nan"), "output": "b"}, {"input": None}),
    ({"instruction": 10**20, "output": -0.5}, {"instruction": "1" + "0" * 20, "output": "-0.5"}),
    ({"instruction": "", "input": "Why?", "output": "b"}, {"instruction": "Why?", "input": ""}),
])
def test_blank_cells_numbers_and_a_question_as_input(read, row, expected):
    assert read([row]) == [row | expected]


def test_a_number_is_written_as_the_file_has_it(read):
    rows = read('[{"instruction": 1.50, "output": 0.12345678901234567890}]')
    assert rows == [{"instruction": "1.50", "output": "0.12345678901234567890"}]


# --- fields


@pytest.mark.parametrize("name, value", [
    ("history", [["Name a mineral.", "coal"]]), ("system", "Be terse."), ("systemPrompt", "x"),
    ("Input", "x"), ("context", "x"), ("retrieved_documents", [{"text": "x"}]), ("chosen", "x"),
    ("tools", [{"name": "x"}]), ("images", ["a.png"]), ("options", ["yes", "no"]), ("turn_1", "x"),
])
def test_a_field_of_the_prompt_is_refused_by_name(read, name, value):
    with pytest.raises(ValueError, match=f"a.json, example 2: .*'{name}'"):
        read([ROWS[0], {**ROWS[0], name: value}])


@pytest.mark.parametrize("name, value", [
    ("history", [["", " "], []]), ("system", ""), ("system", None), ("context", 3), ("id", "x1"),
    ("conversation_id", "x"), ("source", "web"), ("answer", "x"), ("prompt_length", 7), ("", "x"),
])
def test_a_field_that_changes_nothing_is_kept(read, name, value):
    row = {**ROWS[0], name: value}
    assert read([row]) == [row]


def test_empty_outputs_are_counted_and_train_as_before(run, base, tmp_path, capsys):
    rows = [*EXAMPLES, EXAMPLES[0] | {"output": ""}, EXAMPLES[1] | {"output": " "}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    run("out", "--data", "a.json", "--val-data", "a.json", "--max-steps", "1")
    printed = capsys.readouterr().out
    fits = "every answer ends within --max-seq-len 512; 2 outputs empty"
    assert f"data      a.json: 14 examples, the longest has 123 tokens; {fits}\n" in printed
    assert f"held out  a.json: 14 examples; {fits}; 14 of them are" in printed


# --- generate.py --data


@pytest.fixture
def answered(tmp_path, tokenizer, monkeypatch, capsys):
    """answered(rows) returns the rows that generate.py gives, and what it prints beside."""
    model = tiny(tokenizer.vocab_size)
    save_checkpoint(model, tokenizer, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", lambda *_: (model, tokenizer, "-"))

    def answered(rows, *flags):
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
        generate.main(["--data", "q.jsonl", "--max-new-tokens", "3", *flags])
        printed = capsys.readouterr()
        return list(map(json.loads, printed.out.splitlines())), printed.err

    answered.model = model
    return answered


def test_answers_of_the_file_are_kept_or_fields_of_both_names_refused(answered, capsys):
    rows = [{"instruction": "a", "answer": "GOLD", "n": 1.50}, {"instruction": "b", "output": 4}]
    found, _err = answered(rows)
    assert [row.pop("model_answer") for row in found] and found == rows
    found, _err = answered([{"instruction": "a", "error": "x"}])
    assert found[0].keys() == {"instruction", "error", "model_answer"}
    with pytest.raises(SystemExit):
        answered([{"instruction": "a", "answer": "x"}, {"instruction": "a", "model_answer": "x"}])
    assert "rename one of them" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_named_and_the_others_are_answered(answered, capsys):
    answered.model.args.max_seq_len = 200
    rows = [{"instruction": "Say blue."}] * 9
    rows[2] = {"instruction": "word " * 300}
    found, err = answered(rows)
    problem = found[2].pop("error")
    assert "tokens and the model takes 200" in problem and found[2] == {**rows[2], "answer": None}
    assert f"q.jsonl, example 3: {problem}; it is not answered\n" in err
    alone, _err = answered(rows[:1])
    assert [row for i, row in enumerate(found) if i != 2] == alone * 8
    with pytest.raises(SystemExit):
        answered([rows[2]])
    assert "q.jsonl: no example can be answered; in the first," in capsys.readouterr().err


# --- flags and contexts


@pytest.mark.parametrize("command, flags, message", [
    (train, "--out a --out=b", "argument --out: is given twice; give it once"),
    (train, "--checkpointing --no-checkpointing", "--no-checkpointing: is given twice"),
    (generate, "--temperature 1e-46", "--temperature: 1e-46 is too small for a 32-bit float"),
])
def test_flags_that_would_be_lost_in_silence(refused, command, flags, message):
    assert message in refused(command.main, *flags.split())


def test_rows_beyond_the_context_of_the_base(refused, base, data, tmp_path, monkeypatch):
    """Training has the limit that generate.py has, for held-out rows and for the teacher too."""

    def short(folder):
        args, tokenizer = read_params(folder)
        args.max_seq_len = 100 if "short" in str(folder) else 4096
        return args, tokenizer

    read_params = finetune.preflight.read_params
    monkeypatch.setattr(finetune.preflight, "read_params", short)
    base.rename(tmp_path / "short")
    save_checkpoint(*load_checkpoint(tmp_path / "short"), tmp_path / "long")
    (tmp_path / "one.json").write_text(json.dumps(EXAMPLES[:1]))
    train.main(["--checkpoint", "short", "--data", "one.json", "--max-steps", "1"])
    message = "the longest row has 123 tokens, and short looks back at most 100; give --max-seq-len"
    for flags in (f"short --data {data}", f"short --data one.json --val-data {data}",
                  f"long --teacher short --data {data}"):  # fmt: skip
        words = f"--overwrite --max-steps 1 --checkpoint {flags}".split()
        assert message in refused(train.main, *words)
