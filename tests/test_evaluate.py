"""evaluate.py, measures.py, exam.py: exact likelihoods in any batch, honest intervals.

pytest -s tests/test_evaluate.py        prints how much faster scoring is than the slow reference
"""
import json
import math
import time

import pytest
import torch

import finetune.evaluate
import finetune.exam
import generate as command
from finetune.dataset import IGNORE, SupervisedDataset, encode_prompt
from finetune.evaluate import (Question, class_answers, distinct_classes, evaluate, lay_out,
                               log_likelihoods, score_answers)
from finetune.exam import Exam
from finetune.examples import read_examples
from finetune.measures import intervals, measures
from llama import load_checkpoint

from .helpers import ROOT, random_ids, tiny

DEMO = ROOT / "finetune" / "demo"
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


@torch.no_grad()
def slow(model, prompt, answer):
    """Return (log p of an answer, how many of its tokens are the first choice) in fp64."""
    logits = model(torch.tensor([prompt + answer]))[0].double()
    log_p = 0.0
    hits = 0
    for place, token in enumerate(answer, len(prompt) - 1):
        log_p += logits[place].log_softmax(-1)[token].item()
        hits += logits[place].argmax().item() == token
    return log_p, hits


def drawn(n=9, seed=0, beginning=()):
    """Return questions with 1 to 5 answers of 1 to 6 tokens, some of which begin alike."""
    draw = torch.Generator().manual_seed(seed)
    questions = []
    for i in range(n):
        answers = [[*random_ids(draw, 0, 6), 2] for _ in range(1 + i % 4)]
        if i % 3:
            answers.append([*answers[0][:-1], 7, 2])
        questions.append(Question([1, *beginning, *random_ids(draw, 1, 30)], answers))
    return questions


def fp64(values):
    return torch.tensor(values, dtype=torch.float64)


# --- likelihoods


def test_a_row_written_out_by_hand(monkeypatch):
    """Two prompts that begin with 1 5, with two answers each; eos is predicted, never read."""
    monkeypatch.setattr(finetune.evaluate, "MIN_SHARED", 2)
    tokens, layout, places, targets = lay_out([Question([1, 5, 5, 6], [[8, 9, 2], [2]]),
                                               Question([1, 5, 5], [[8, 2], [7, 2]])])
    # A prompt's last token is never shared.
    assert tokens.tolist() == [[1, 5, 5, 6, 8, 9, 5, 8, 7]]
    assert layout.segments == [(2, ()), (2, (0,)), (2, (0, 1)), (1, (0,)), (1, (0, 3)),
                               (1, (0, 3))]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 3] and layout.longest == 6
    assert places.tolist() == [3, 4, 5, 3, 6, 7, 6, 8]
    assert targets.tolist() == [8, 9, 2, 2, 8, 2, 7, 2]
    # 1 alone is less than MIN_SHARED.
    tokens, layout, places, _ = lay_out([Question([1, 5, 6], [[8, 9, 2]]),
                                         Question([1, 5], [[8, 2]])])
    assert tokens.tolist() == [[1, 5, 6, 8, 9, 1, 5, 8]] and places.tolist() == [2, 3, 4, 6, 7]
    assert layout.segments == [(3, ()), (2, (0,)), (2, ()), (1, (2,))]


@pytest.mark.parametrize("beginning", [(), range(20, 60)], ids=["apart", "alike"])
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_likelihoods_equal_the_slow_reference(dtype, off, beginning):
    """In one batch and one by one, also of the likeliest answer."""
    model = tiny(n_kv_heads=2).to(dtype)
    questions = drawn(beginning=beginning)
    expected = []
    alone = []
    for question in questions:
        likeliest = model(torch.tensor([question.prompt]))[0, -1].argmax().item()
        question.answers.append([likeliest, 2])
        expected += [slow(model, question.prompt, answer) for answer in question.answers]
        alone += log_likelihoods(model, [question])
    for scores in (log_likelihoods(model, questions), alone):
        assert [hits for _, hits in scores] == [hits for _, hits in expected]
        log_p = [p for p, _ in expected]
        assert [p for p, _ in scores] == pytest.approx(log_p, abs=off, rel=off)
    assert {0, 1} <= {hits for _, hits in expected}


def test_a_prompt_is_computed_once_for_all_its_answers():
    answers = [[50, 2], [51, 2], [52, 53, 2], [2]]
    question = Question([*range(1, 41)], answers)
    assert lay_out([question])[0].numel() == 40 + 1 + 1 + 2 + 0
    other = Question([*range(1, 40), 60], answers)
    assert lay_out([question, other])[0].numel() == 39 + 2 * (1 + 4)


def test_columns_do_not_depend_on_the_batch_and_equal_the_reference():
    model = tiny(n_kv_heads=2)
    choices = [[9, 2], [8, 11, 2], [8, 12, 30, 2]]
    rows = []
    for i, (prompt, *_) in enumerate(drawn(12, seed=3)):
        answer = choices[i % 3]
        rows.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    whole = score_answers(model, rows, choices, tokens=10 ** 6)
    free = score_answers(model, rows)
    assert "confusion" not in free
    for other in (free, *(score_answers(model, rows, choices, tokens=n) for n in (1, 60, 200))):
        for name, column in other.items():
            assert torch.allclose(column, whole[name], atol=1e-5, rtol=1e-5)
    for i, (tokens, labels) in enumerate(rows):
        n_prompt = labels.count(IGNORE)
        prompt, answer = tokens[:n_prompt], tokens[n_prompt:]
        scores = [slow(model, prompt, each) for each in choices]
        right = choices.index(answer)
        assert whole["nats"][i].item() == pytest.approx(-scores[right][0], abs=1e-5)
        assert whole["tokens"][i] == len(answer) and whole["hits"][i] == scores[right][1]
        assert whole["confusion"][i].nonzero().tolist() == [[right, scores.index(max(scores))]]
        assert whole["confusion"][i].sum() == 1


def test_it_is_faster_than_the_slow_reference():
    """On the demo's model, 12 questions with 9 answers; in turns, so all else slows both."""
    model, tokenizer = load_checkpoint(DEMO)
    words = "animal tool clothing vehicle fruit drink toy flower vegetable".split()
    answers = [tokenizer.encode(word, eos=True) for word in words]
    examples = read_examples(DEMO / "held_out.json")[:12]
    questions = [Question(encode_prompt(example, tokenizer), answers) for example in examples]
    ours = []
    reference = []
    for _ in range(2):
        began = time.perf_counter()
        with torch.no_grad():
            log_likelihoods(model, questions)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        for question in questions:
            for answer in answers:
                slow(model, question.prompt, answer)
        reference.append(time.perf_counter() - began)
    ratio = min(reference) / min(ours)
    print(f"\n12 questions with 9 answers each: {ratio:.1f} times as fast as one by one")
    assert ratio > 2


# --- measures


def sums(confusion):
    counts = fp64(confusion)
    one = fp64(1.0)
    return {"examples": counts.sum((-2, -1)), "tokens": one, "nats": one, "hits": one,
            "confusion": counts}


@pytest.mark.parametrize("confusion, accuracy, f1, mcc", [
    ([[50, 10], [5, 35]], 0.85, (100 / 115 + 70 / 85) / 2,
     (50 * 35 - 10 * 5) / math.sqrt(60 * 40 * 55 * 45)),         # the usual one
    ([[7, 0], [0, 3]], 1, 1, 1),
    ([[7, 0], [3, 0]], 0.7, 14 / 17 / 2, 0),         # the majority's answer to everything
    ([[5, 0], [0, 0]], 1, 1, 0),                     # a class that is neither right nor answered
    # Right 7 8 5, answered 8 7 5, of 20: (20 x 11 - 56 - 56 - 25) by the root of
    # (400 - 49 - 64 - 25) (400 - 64 - 49 - 25).
    ([[4, 2, 1], [3, 4, 1], [1, 1, 3]], 11 / 20, (8 / 15 + 8 / 15 + 6 / 10) / 3, 83 / 262),
])
def test_measures_of_classes_by_hand(confusion, accuracy, f1, mcc):
    """Also of several tables at once."""
    values = measures(sums(confusion))
    names = ("accuracy", "macro_f1", "mcc")
    expected = pytest.approx([accuracy, f1, mcc], abs=1e-12)
    assert [values[name].item() for name in names] == expected
    stacked = {name: torch.stack([value, value]) for name, value in sums(confusion).items()}
    for name, value in measures(stacked).items():
        assert torch.allclose(value, values[name].repeat(2), atol=1e-12)


def test_correlation_of_many_classes_is_the_correlation_of_their_indicators():
    """R_K by its definition: covariances of one-hot vectors, summed over the classes."""
    counts = torch.randint(0, 9, (5, 5), generator=torch.Generator().manual_seed(0))
    classes = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    pairs = classes.repeat_interleave(counts.flatten(), 0)
    right, answered = torch.eye(5, dtype=torch.float64)[pairs].unbind(1)
    right = right - right.mean(0)
    answered = answered - answered.mean(0)
    expected = (right * answered).sum() / (right.square().sum() * answered.square().sum()).sqrt()
    mcc = measures(sums(counts.tolist()))["mcc"]
    assert mcc.item() == pytest.approx(expected.item(), abs=1e-12)


def test_loss_is_per_token_and_the_rest_per_example():
    """Answers of 1 and 9 tokens: 2 nats and 3, in all 5 by 10, not the mean of 2 and a third."""
    columns = {"examples": [1, 1], "tokens": [1, 9], "nats": [2, 3], "hits": [0, 6],
               "exact_match": [0, 1], "ended": [1, 1]}
    values = measures({name: fp64(column).sum() for name, column in columns.items()})
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {"loss": 0.5, "perplexity": math.exp(0.5), "token_accuracy": 0.6, "exact_match": 0.5,
         "ended": 1})


def test_classes_are_a_small_set_of_answers():
    assert distinct_classes(["yes", "no", "yes", "yes"]) == ["no", "yes"]
    assert distinct_classes(["yes", "no", "no answer"]) is None    # fewer than two examples to each
    assert distinct_classes([str(i) for i in range(21)] * 9) is None


def test_classes_of_encoded_examples_are_whole_and_fit(tokenizer):
    words = ("happy", "sad and sad")
    examples = [{"instruction": "Happy?", "input": "word " * (i // 2), "output": words[i % 2]}
                for i in range(6)]
    whole = SupervisedDataset(examples, tokenizer)
    longest = max(len(tokens) for tokens, _ in whole.rows)
    choices = class_answers(whole, 512)
    assert choices == sorted(tokenizer.encode(word, eos=True) for word in words)
    assert class_answers(whole, longest) == choices and class_answers(whole, longest - 1) is None


# --- intervals


def table(n=200, shift=0.0, noise=1.0, seed=0):
    """Return columns of n examples; what is hard is so for every seed."""
    draw = torch.Generator().manual_seed(seed)
    hard = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    nats = 10 + hard + shift + noise * torch.randn(n, dtype=torch.float64, generator=draw)
    ones = torch.ones(n, dtype=torch.float64)
    return {"examples": ones, "tokens": ones, "nats": nats, "hits": (nats < 10).double()}


def test_a_difference_is_paired():
    """What is hard for both is no noise of the difference."""
    base = table(noise=0.1)
    adapter = table(shift=-0.05, noise=0.1, seed=1)
    values = intervals({"base": base, "adapter": adapter})
    value, low, high = values["difference"]["loss"]
    error = 1.96 * (adapter["nats"] - base["nats"]).std().item() / math.sqrt(200)
    assert value == pytest.approx(values["adapter"]["loss"][0] - values["base"]["loss"][0])
    assert (value - low, high - value) == pytest.approx((error, error), rel=0.15)
    _, base_low, base_high = values["base"]["loss"]
    assert base_high - base_low > 5 * (high - low)
    same = intervals({"base": base, "adapter": base})["difference"]
    assert all(entry == [0, 0, 0] for entry in same.values())


def test_intervals_hold_what_they_promise():
    """Of 200 samples of 60, from a world where the difference is 0.1, about 95 % hold it."""
    draw = torch.Generator().manual_seed(0)
    n_right = 0
    for _ in range(200):
        hard = torch.rand(60, generator=draw)
        tables = {}
        for name, limit in (("base", 1), ("adapter", 2 - 0.8 ** 0.5)):   # right in 0.5 and 0.6
            hits = (hard + torch.rand(60, generator=draw) < limit).double()
            tables[name] = dict.fromkeys(["examples", "tokens", "nats"], torch.ones_like(hits))
            tables[name]["hits"] = hits
        _, low, high = intervals(tables, resamples=200)["difference"]["token_accuracy"]
        n_right += low <= 0.1 <= high
    assert 0.9 <= n_right / 200 <= 0.99


# --- exams

INPUTS = ("sky blue", "cold", "grass green grass", "one two", "blue", "three cold")
FEELINGS = [{"instruction": "Happy or sad?", "input": words, "output": ("happy", "sad")[i % 2]}
            for i, words in enumerate(INPUTS)]


def test_greedy_answers_are_right_when_they_are_the_same_and_end(monkeypatch, tokenizer):
    """Right but for a space; another; right but not at an end; right but for what comes after."""
    answers = ["blue", "green", "one two three", "cold cold"]
    outputs = ["blue ", "blue", "one two three", "cold"]
    examples = [{"instruction": f"Say {i}", "output": text} for i, text in enumerate(outputs)]
    exam = Exam(examples, tokenizer, 512, limit=len(tokenizer.encode("one two three")))
    asked = []
    heard = []

    def scripted(model, prompts, limit, eos, pool):
        asked.append((len(prompts), limit, len(pool)))
        pool.put([len(asked)], [5])
        pairs = []
        for k, prompt in enumerate(prompts):
            number = int(tokenizer.decode(prompt).split("Say ")[1][0])
            pairs += [(k, token) for token in tokenizer.encode(answers[number])]
        return pairs

    monkeypatch.setattr(finetune.exam, "generate", scripted)
    monkeypatch.setattr(finetune.exam, "ANSWERED_AT_ONCE", 3)
    columns = exam.score(tiny(), heard.append)
    assert columns["exact_match"].tolist() == [1, 0, 0, 0]
    assert columns["ended"].tolist() == [1, 1, 0, 1]
    assert asked == [(3, exam.limit, 0), (1, exam.limit, 1)] and heard == [3, 4]


def test_what_an_exam_knows_and_refuses(tokenizer):
    exam = Exam(FEELINGS[:5], tokenizer, 512)
    answers = [tokenizer.encode(example["output"], eos=True) for example in FEELINGS[:5]]
    assert exam.about() == {
        "examples": 5, "answer_tokens": sum(map(len, answers)), "limit": exam.limit,
        "choices": ["happy", "sad"], "majority": {"answer": "happy", "accuracy": 0.6}}
    message = "file.json, example 2: its output 'sad' is not one of the choices 'happy', ' sad'"
    with pytest.raises(ValueError, match=message):   # "happy, sad" was typed.
        Exam(FEELINGS, tokenizer, 512, ["happy", " sad"], name="file.json")
    longest = max(len(tokens) for tokens, _ in Exam(FEELINGS, tokenizer, 512).rows)
    message = f"prompt and answer have {longest} tokens and the model takes {longest - 1}"
    with pytest.raises(ValueError, match=f"the data, example 3: {message}"):
        Exam(FEELINGS, tokenizer, longest - 1)


@pytest.mark.parametrize("world_size", [3, 14])
def test_the_ranks_shares_add_up(monkeypatch, tokenizer, world_size):
    """Also where there are more ranks than examples."""
    model = tiny()
    data = SupervisedDataset(FEELINGS * 2, tokenizer)
    whole = evaluate(model, data, 10 ** 6, NO_AUTOCAST)
    assert list(whole) == ["val_loss", "val_accuracy", "val_mcc"] and model.training
    columns = []

    def noting(column):
        columns.append(column)
        return column

    monkeypatch.setattr(finetune.evaluate, "sum_over_ranks", noting)
    for rank in range(world_size):
        evaluate(model, data, 100, NO_AUTOCAST, rank, world_size)
    names = list(score_answers(model, data.rows, class_answers(data, 512)))
    totals = {name: sum(columns[i::len(names)]) for i, name in enumerate(names)}
    assert totals["examples"] == 12
    values = measures(totals)
    for name in ("loss", "accuracy", "mcc"):
        assert values[name].item() == pytest.approx(whole[f"val_{name}"], rel=1e-5)


def test_train_and_generate_agree(run, base, tmp_path, capsys):
    """Also on the base alone, and with the adapter merged."""
    def score(*flags):
        command.main(["--data", "feelings.json", "--score", *flags])
        line, = capsys.readouterr().out.splitlines()
        return json.loads(line)

    (tmp_path / "feelings.json").write_text(json.dumps(FEELINGS))
    rows = run("out", "--data", "feelings.json", "--val-data", "feelings.json", "--targets", "all",
               "--accumulation-steps", "1", "--batch-size", "6", "--max-steps", "2",
               "--epochs", "2", "--dropout", "0")
    printed = capsys.readouterr().out
    assert "held out  feelings.json: 6 examples" in printed
    assert "; answers of 2 classes\n" in printed
    scores = score()
    about = {"data": "feelings.json", "examples": 6, "choices": ["happy", "sad"], "seed": 0,
             "majority": {"answer": "happy", "accuracy": 0.5}}
    assert scores.items() >= about.items()
    for name in ("loss", "accuracy", "mcc"):
        assert scores["adapter"][name][0] == pytest.approx(rows[-1][f"val_{name}"], rel=1e-5)
    assert f"before    held-out loss {scores['base']['loss'][0]:.4f} | accuracy " in printed
    for name in ("base", "adapter", "difference"):
        assert scores[name].keys() == {"loss", "perplexity", "token_accuracy", "accuracy",
                                       "macro_f1", "mcc", "exact_match", "ended"}
        assert all(low <= high for _, low, high in scores[name].values())
    for name, (value, *_) in scores["difference"].items():
        assert value == pytest.approx(scores["adapter"][name][0] - scores["base"][name][0])
    assert scores["difference"]["loss"][0] < 0
    alone = score("--adapter", "none", "--checkpoint", str(base))
    merged = score("--merge")
    assert alone["base"] == scores["base"] == merged["base"]
    assert not {"adapter", "difference"} & alone.keys()
    for name, values in scores["adapter"].items():
        assert merged["adapter"][name] == pytest.approx(values, rel=1e-4)
    named = score("--choices", "sad,happy,yes")
    assert named["choices"] == ["sad", "happy", "yes"]
    assert named["base"]["loss"] == pytest.approx(scores["base"]["loss"], rel=1e-5)
