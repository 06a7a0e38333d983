"""finetune/evaluate.py: exact likelihoods in any batch, measures computed by hand, intervals that mean what they say.

    pytest -s tests/test_evaluate.py        prints how much faster scoring is than the slow reference
"""
import json
import math
import time

import pytest
import torch

import generate as command
import finetune.evaluate as module
import train
from llama import load_checkpoint
from finetune.dataset import encode_prompt, IGNORE, read_examples, SupervisedDataset
from finetune.evaluate import (class_answers, distinct_classes, evaluate, Exam, group_questions, intervals, lay_out,
                               log_likelihoods, measures, Question, score_answers)

from .helpers import EXAMPLES, ROOT, metrics, tiny

DEMO = ROOT / "finetune" / "demo"
nothing = torch.autocast("cpu", enabled=False)


@torch.no_grad()
def slow(model, prompt, answer):
    """(log p of the answer, how many of its tokens are the first choice): one example, one answer, all logits in fp64."""
    logits = model(torch.tensor([prompt + answer]))[0].double()
    log_p = [logits[len(prompt) + i - 1].log_softmax(-1)[token].item() for i, token in enumerate(answer)]
    return sum(log_p), sum(logits[len(prompt) + i - 1].argmax().item() == token for i, token in enumerate(answer))


def drawn(n=9, seed=0, beginning=()):
    """Questions with 1 to 5 answers of 1 to 6 tokens, some with an answer that begins like another, or is it."""
    draw = torch.Generator().manual_seed(seed)

    def some(low, high):
        return torch.randint(3, 390, (int(torch.randint(low, high, (), generator=draw)),), generator=draw).tolist()
    asked = []
    for i in range(n):
        answers = [[*some(0, 6), 2] for _ in range(1 + i % 4)]
        asked.append(Question([1, *beginning, *some(1, 30)], [*answers, [*answers[0][:-1], 7, 2]] if i % 3 else answers))
    return asked


# --- likelihoods ---

def test_a_row_written_out_by_hand(monkeypatch):
    """Two prompts that both begin with 1 5, with two answers each; eos is predicted and never read."""
    monkeypatch.setattr(module, "MIN_SHARED", 2)
    tokens, layout, places, targets = lay_out([Question([1, 5, 5, 6], [[8, 9, 2], [2]]), Question([1, 5, 5], [[8, 2], [7, 2]])])
    assert tokens.tolist() == [[1, 5, 5, 6, 8, 9, 5, 8, 7]]                    # a prompt's last token is never shared
    assert layout.segments == [(2, ()), (2, (0,)), (2, (0, 1)), (1, (0,)), (1, (0, 3)), (1, (0, 3))]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 3] and layout.longest == 6
    assert places.tolist() == [3, 4, 5, 3, 6, 7, 6, 8] and targets.tolist() == [8, 9, 2, 2, 8, 2, 7, 2]
    tokens, layout, places, _ = lay_out([Question([1, 5, 6], [[8, 9, 2]]), Question([1, 5], [[8, 2]])])      # 1 alone is less than MIN_SHARED
    assert tokens.tolist() == [[1, 5, 6, 8, 9, 1, 5, 8]] and places.tolist() == [2, 3, 4, 6, 7]
    assert layout.segments == [(3, ()), (2, (0,)), (2, ()), (1, (2,))]


@pytest.mark.parametrize("beginning", [(), range(20, 60)], ids=["apart", "alike"])
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_likelihoods_equal_the_slow_reference(dtype, off, beginning):
    model = tiny(n_kv_heads=2).to(dtype)
    asked = [Question(prompt, [*answers, [model(torch.tensor([prompt]))[0, -1].argmax().item(), 2]]) for prompt, answers, _ in drawn(beginning=beginning)]
    expected = [slow(model, prompt, answer) for prompt, answers, _ in asked for answer in answers]
    found = log_likelihoods(model, asked)
    assert [hits for _, hits in found] == [hits for _, hits in expected]
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=off, rel=off)
    alone = [score for question in asked for score in log_likelihoods(model, [question])]
    assert [p for p, _ in alone] == pytest.approx([p for p, _ in expected], abs=off, rel=off)
    assert {0, 1} <= {hits for _, hits in expected}                            # some are first choices, some are not


def test_probabilities_of_all_answers_add_up_to_one():
    """Of a vocabulary of 5 every answer of up to two tokens, and every beginning of two others."""
    model = tiny(vocab_size=5)
    answers = [[2], *([a, 2] for a in (0, 1, 3, 4)), *([a, b] for a in (0, 1, 3, 4) for b in (0, 1, 3, 4))]
    assert sum(math.exp(p) for p, _ in log_likelihoods(model, [Question([1, 3], answers)])) == pytest.approx(1, abs=1e-6)


def test_a_prompt_is_computed_once_for_all_its_answers():
    prompt, answers = list(range(1, 41)), [[50, 2], [51, 2], [52, 53, 2], [2]]
    assert lay_out([Question(prompt, answers)])[0].numel() == len(prompt) + 1 + 1 + 2 + 0
    other = [*prompt[:-1], 60]
    assert lay_out([Question(prompt, answers), Question(other, answers)])[0].numel() == 39 + 2 * (1 + 4)


def test_groups_hold_everything_once_within_their_room():
    asked = drawn(40)
    sizes = [len(prompt) + sum(map(len, answers)) for prompt, answers, _ in asked]
    for room in 1, 50, 10 ** 6:
        groups = group_questions(asked, room)
        assert sorted(i for group in groups for i in group) == list(range(40))
        assert all(len(group) == 1 or sum(sizes[i] for i in group) <= room for group in groups)
    assert group_questions([], 10) == [] and len(group_questions(asked, 1)) == 40 and len(group_questions(asked, 10 ** 6)) == 1


def encoded(n=12, seed=3, classes=3):
    """(rows, choices): prompts of random lengths, answers of 2 to 4 tokens, each from one of a few."""
    choices = [[9, 2], [8, 11, 2], [8, 12, 30, 2]][:classes]
    asked = drawn(n, seed)
    return [(prompt + choices[i % classes], [IGNORE] * len(prompt) + choices[i % classes]) for i, (prompt, *_) in enumerate(asked)], choices


def test_columns_do_not_depend_on_the_batch_and_equal_the_reference():
    model, (rows, choices) = tiny(n_kv_heads=2), encoded()
    whole = score_answers(model, rows, choices, tokens=10 ** 6)
    for tokens in 1, 60, 200:
        other = score_answers(model, rows, choices, tokens=tokens)
        assert other.keys() == whole.keys() and all(torch.allclose(other[name], whole[name], atol=1e-5, rtol=1e-5) for name in whole)
    for i, (tokens, labels) in enumerate(rows):
        own = [token for token in labels if token != IGNORE]
        prompt = tokens[:-len(own)]
        log_p = [slow(model, prompt, answer)[0] for answer in choices]
        assert whole["nats"][i].item() == pytest.approx(-log_p[choices.index(own)], abs=1e-5)
        assert whole["tokens"][i] == len(own) and whole["hits"][i] == slow(model, prompt, own)[1]
        assert whole["confusion"][i].nonzero().tolist() == [[choices.index(own), log_p.index(max(log_p))]]
    assert torch.equal(whole["confusion"].sum((1, 2)), torch.ones(12, dtype=torch.float64))
    free = score_answers(model, rows)
    assert "confusion" not in free and all(torch.allclose(free[name], whole[name], atol=1e-5) for name in free)


def test_it_is_faster_than_the_slow_reference():
    """On the demo's model, 12 questions with 9 answers; in turns, so that what else runs slows both."""
    model, tokenizer = load_checkpoint(DEMO)
    answers = [tokenizer.encode(word, eos=True) for word in "animal tool clothing vehicle fruit drink toy flower vegetable".split()]
    asked = [Question(encode_prompt(example, tokenizer), answers) for example in read_examples(DEMO / "held_out.json")[:12]]
    taken = {True: [], False: []}
    for batched in (True, False) * 2:
        began = time.perf_counter()
        if batched:
            with torch.no_grad():
                log_likelihoods(model, asked)
        else:
            for prompt, answers, _ in asked:
                for answer in answers:
                    slow(model, prompt, answer)
        taken[batched].append(time.perf_counter() - began)
    ratio = min(taken[False]) / min(taken[True])
    print(f"\n{len(asked)} questions with {len(answers)} answers each: {ratio:.1f} times as fast as one by one")
    assert ratio > 2


# --- measures ---

def sums(confusion, **columns):
    counts = torch.tensor(confusion, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    return {"examples": counts.sum((-2, -1)), "tokens": one, "nats": one, "hits": one, "confusion": counts}


@pytest.mark.parametrize("confusion, accuracy, f1, mcc", [
    ([[50, 10], [5, 35]], 0.85, (100 / 115 + 70 / 85) / 2, (50 * 35 - 10 * 5) / math.sqrt(60 * 40 * 55 * 45)),     # the usual one
    ([[7, 0], [0, 3]], 1, 1, 1),
    ([[0, 7], [3, 0]], 0, 0, -1),
    ([[7, 0], [3, 0]], 0.7, 14 / 17 / 2, 0),                                   # the majority's answer to everything
    ([[5, 0], [0, 0]], 1, 1, 0),                                               # a class that is neither there nor said
    ([[0, 0], [2, 3]], 0.6, 6 / 8 / 2, 0),                                     # one that is said and not there
    # own 7 8 5, said 8 7 5 of 20: (20 * 11 - 56 - 56 - 25) / sqrt((400 - 49 - 64 - 25) (400 - 64 - 49 - 25))
    ([[4, 2, 1], [3, 4, 1], [1, 1, 3]], 11 / 20, (8 / 15 + 8 / 15 + 6 / 10) / 3, 83 / 262),
    # own 4 4 2, said 4 3 3 of 10: (10 * 6 - 16 - 12 - 6) / sqrt((100 - 16 - 16 - 4) (100 - 16 - 9 - 9))
    ([[3, 1, 0], [0, 2, 2], [1, 0, 1]], 0.6, (6 / 8 + 4 / 7 + 2 / 5) / 3, 26 / math.sqrt(64 * 66)),
])
def test_measures_of_classes_by_hand(confusion, accuracy, f1, mcc):
    found = measures(sums(confusion))
    assert [found[name].item() for name in ("accuracy", "macro_f1", "mcc")] == pytest.approx([accuracy, f1, mcc], abs=1e-12)
    stacked = measures({name: torch.stack([value, value]) for name, value in sums(confusion).items()})
    assert all(torch.allclose(stacked[name], found[name].repeat(2), atol=1e-12) for name in found)


def test_correlation_of_many_classes_is_the_correlation_of_their_indicators():
    """R_K by its definition: covariances of the one-hot vectors of own and said, summed over the classes."""
    counts = torch.randint(0, 9, (5, 5), generator=torch.Generator().manual_seed(0))
    pairs = [(i, j) for i in range(5) for j in range(5) for _ in range(counts[i, j])]
    own, said = (torch.eye(5, dtype=torch.float64)[[pair[k] for pair in pairs]] for k in (0, 1))
    own, said = own - own.mean(0), said - said.mean(0)
    expected = (own * said).sum() / ((own ** 2).sum() * (said ** 2).sum()).sqrt()
    assert measures(sums(counts.tolist()))["mcc"].item() == pytest.approx(expected.item(), abs=1e-12)


def test_loss_is_per_token_and_the_rest_per_example():
    """Answers of 1 and 9 tokens: 2 nats and 3, in all 5 by 10, not the mean of 2 and a third."""
    columns = dict(examples=[1, 1], tokens=[1, 9], nats=[2, 3], hits=[0, 6], exact_match=[0, 1], ended=[1, 1])
    found = measures({name: torch.tensor(values, dtype=torch.float64).sum() for name, values in columns.items()})
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        dict(loss=0.5, perplexity=math.exp(0.5), token_accuracy=0.6, exact_match=0.5, ended=1))


@pytest.mark.parametrize("answers, classes", [
    (["yes", "no", "yes", "yes"], ["no", "yes"]),
    (["yes"] * 9, None),                                                       # nothing to choose
    (["yes", "no", "no answer"], None),                                        # fewer than two examples to each
    ([str(i) for i in range(20)] * 2, sorted(map(str, range(20)))),
    ([str(i) for i in range(21)] * 9, None),
])
def test_classes_are_a_small_set_of_answers(answers, classes):
    assert distinct_classes(answers) == classes


def test_classes_of_encoded_examples_are_whole_and_have_room(tokenizer):
    examples = [{"instruction": "Happy or sad?", "input": "word " * i, "output": word} for i in (1, 2, 9) for word in ("happy", "sad and sad")]
    whole = SupervisedDataset(examples, tokenizer)
    longest, choices = max(len(tokens) for tokens, _ in whole.rows), class_answers(whole, 512)
    assert choices == sorted(tokenizer.encode(word, eos=True) for word in ("happy", "sad and sad"))
    assert class_answers(whole, longest) == choices and class_answers(whole, longest - 1) is None
    assert class_answers(SupervisedDataset(examples, tokenizer, longest - 1), 512) is None         # one is cut: no answer of its own
    assert class_answers(SupervisedDataset(EXAMPLES, tokenizer), 512) is None


# --- intervals ---

def table(n=200, shift=0.0, noise=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hard = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(99))       # for both
    nats = 10 + hard + shift + noise * torch.randn(n, dtype=torch.float64, generator=draw)
    right = (nats < 10).double()
    return dict(examples=torch.ones(n, dtype=torch.float64), tokens=torch.ones(n, dtype=torch.float64), nats=nats, hits=right)


def test_an_interval_is_the_normal_one_where_that_is_right():
    """Of a mean: the value and 1.96 standard errors to each side, to a few per cent."""
    columns = table(400)
    value, low, high = intervals({"base": columns})["base"]["loss"]
    error = columns["nats"].std().item() / 20
    assert value == pytest.approx(columns["nats"].mean().item())
    assert (value - low, high - value) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)


def test_a_difference_is_paired():
    """What is hard for both is no noise of the difference: its interval is that of the differences."""
    base, adapter = table(noise=0.1), table(shift=-0.05, noise=0.1, seed=1)
    found = intervals({"base": base, "adapter": adapter})
    value, low, high = found["difference"]["loss"]
    error = (adapter["nats"] - base["nats"]).std().item() / math.sqrt(200)
    assert value == pytest.approx(found["adapter"]["loss"][0] - found["base"]["loss"][0])
    assert (value - low, high - value) == pytest.approx((1.96 * error, 1.96 * error), rel=0.15)
    assert found["base"]["loss"][2] - found["base"]["loss"][1] > 5 * (high - low)                  # either alone is far less certain
    same = intervals({"base": base, "adapter": base})["difference"]
    assert all(entry == [0, 0, 0] for entry in same.values())


def test_intervals_by_seed():
    tables = {"base": table(30), "adapter": table(30, shift=-1, seed=1)}
    assert intervals(tables, 1, 200) == intervals(tables, 1, 200) != intervals(tables, 2, 200)


def test_what_is_no_number_is_none():
    columns = table(5)
    columns["nats"] *= 1000
    found = intervals({"base": columns, "adapter": columns}, resamples=100)
    assert found["base"]["perplexity"] == found["difference"]["perplexity"] == [None] * 3
    json.dumps(found, allow_nan=False)


def test_intervals_hold_what_they_promise():
    """Of 200 samples of 60 from a world where the difference in accuracy is 0.1, the intervals of about 95 % hold it."""
    draw, held = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        hard = torch.rand(60, generator=draw)
        base, adapter = ((hard + torch.rand(60, generator=draw) < limit).double() for limit in (1, 2 - 0.8 ** 0.5))      # 0.5 and 0.6
        ones = torch.ones(60, dtype=torch.float64)
        tables = {name: dict(examples=ones, tokens=ones, nats=ones, hits=hits) for name, hits in (("base", base), ("adapter", adapter))}
        _, low, high = intervals(tables, resamples=200)["difference"]["token_accuracy"]
        held += low <= 0.1 <= high
    assert 0.9 <= held / 200 <= 0.99


# --- exams ---

FEELINGS = [{"instruction": "Happy or sad?", "input": " ".join(words), "output": ("happy", "sad")[i % 2]}
            for i, words in enumerate((["sky", "blue"], ["cold"], ["grass", "green", "grass"], ["one", "two"], ["blue"], ["three", "cold"]))]


def test_greedy_answers_are_right_when_they_are_the_same_and_end(monkeypatch, tokenizer):
    """Right but for a space at its end; another; right as far as it goes, but not at an end; right but for what comes after."""
    said = ["blue", "green", "one two three", "cold cold"]
    examples = [{"instruction": f"Say {i}", "output": output} for i, output in enumerate(["blue ", "blue", "one two three", "cold"])]
    exam = Exam(examples, tokenizer, 512, limit=len(tokenizer.encode("one two three")))
    asked, heard = [], []

    def scripted(model, prompts, limit, eos, pool):
        asked.append((len(prompts), limit, len(pool)))
        pool.put([len(asked)], [5])
        return ((k, token) for k, prompt in enumerate(prompts)
                for token in tokenizer.encode(said[int(tokenizer.decode(prompt).split("Say ")[1][0])]))
    monkeypatch.setattr(module, "generate", scripted)
    monkeypatch.setattr(module, "ANSWERED_AT_ONCE", 3)
    columns = exam.score(tiny(), heard.append)
    assert columns["exact_match"].tolist() == [1, 0, 0, 0] and columns["ended"].tolist() == [1, 1, 0, 1]
    assert asked == [(3, exam.limit, 0), (1, exam.limit, 1)] and heard == [3, 4]      # one pool for both
    exam.score(tiny())
    assert [in_pool for *_, in_pool in asked] == [0, 1, 0, 1]                      # and another for the base, say
    assert Exam(examples, tokenizer, 512).limit == 2 * (1 + len(tokenizer.encode("one two three")))


def test_what_an_exam_knows_and_refuses(tokenizer):
    exam = Exam(FEELINGS[:5], tokenizer, 512)
    assert exam.about() == {"examples": 5, "answer_tokens": sum(len(tokenizer.encode(e["output"], eos=True)) for e in FEELINGS[:5]),
                            "limit": exam.limit, "choices": ["happy", "sad"], "majority": {"answer": "happy", "accuracy": 0.6}}
    assert Exam(EXAMPLES, tokenizer, 512).about()["choices"] is None and "majority" not in Exam(EXAMPLES, tokenizer, 512).about()
    assert Exam(FEELINGS[:3], tokenizer, 512, ["sad", "so so", "happy"]).about()["choices"] == ["sad", "so so", "happy"]
    with pytest.raises(ValueError, match="file.json, example 2: its output 'sad' is not one of the choices 'happy', ' sad'"):     # "happy, sad" was typed
        Exam(FEELINGS, tokenizer, 512, ["happy", " sad"], name="file.json")
    longest = max(len(tokens) for tokens, _ in Exam(FEELINGS, tokenizer, 512).rows)
    with pytest.raises(ValueError, match=rf"the data, example 3: prompt and answer have {longest} tokens and the model takes {longest - 1}"):
        Exam(FEELINGS, tokenizer, longest - 1)
    broken = tiny()
    torch.nn.init.constant_(broken.norm.weight, math.nan)
    with pytest.raises(ValueError, match="the model's logits are not numbers"):
        exam.score(broken)


def test_the_ranks_shares_add_up(monkeypatch, tokenizer):
    """Three ranks, and more ranks than examples, of which some have none."""
    model, data, shares = tiny(), SupervisedDataset(FEELINGS * 2, tokenizer), []
    whole = evaluate(model, data, 10 ** 6, nothing)
    assert list(whole) == ["val_loss", "val_accuracy", "val_mcc"] and model.training
    monkeypatch.setattr(module, "sum_over_ranks", lambda column: shares[-1].append(column) or column)
    for world_size in 3, 14:
        shares.clear()
        for rank in range(world_size):
            shares.append([])
            evaluate(model, data, 100, nothing, rank, world_size)
        names = score_answers(model, data.rows, class_answers(data, 512))
        found = measures({name: sum(share[i] for share in shares) for i, name in enumerate(names)})
        assert sum(share[0] for share in shares) == 12                         # examples, each on one rank
        assert {f"val_{name}": found[name].item() for name in ("loss", "accuracy", "mcc")} == pytest.approx(whole, rel=1e-5)


@pytest.fixture
def feelings(base, tmp_path, monkeypatch, capsys):
    """(rows of metrics.jsonl, what was printed) of a run in ./out on questions whose answers are happy and sad."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "feelings.json").write_text(json.dumps(FEELINGS))
    train.main(["--checkpoint", str(base), "--data", "feelings.json", "--val-data", "feelings.json", "--targets", "all", "--lr", "1e-2",
                "--accumulation-steps", "1", "--batch-size", "6", "--max-steps", "2", "--epochs", "2", "--dropout", "0"])
    return metrics(tmp_path / "out"), capsys.readouterr().out


def score(capsys, *flags):
    capsys.readouterr()
    command.main(["--data", "feelings.json", "--score", *flags])
    line, = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_train_and_generate_agree(feelings, base, capsys):
    rows, printed = feelings
    assert "held out  feelings.json: 6 examples; every answer ends within --max-seq-len 512; answers of 2 classes\n" in printed
    found = score(capsys)
    assert [found[key] for key in ("data", "examples", "choices", "seed")] == ["feelings.json", 6, ["happy", "sad"], 0]
    assert found["majority"] == {"answer": "happy", "accuracy": 0.5}
    for name in "loss", "accuracy", "mcc":
        assert found["adapter"][name][0] == pytest.approx(rows[-1][f"val_{name}"], rel=1e-5)
    for name, place in ("base", "before    "), ("adapter", "left | "):
        loss, accuracy, mcc = (found[name][measure][0] for measure in ("loss", "accuracy", "mcc"))
        assert f"{place}held-out loss {loss:.4f} | accuracy {accuracy:.1%} | MCC {mcc:.3f}\n" in printed
    measured = ["loss", "perplexity", "token_accuracy", "accuracy", "macro_f1", "mcc", "exact_match", "ended"]
    for name in "base", "adapter", "difference":
        assert sorted(found[name]) == sorted(measured)
        assert all(low <= high for _, low, high in found[name].values())
    for measure, (value, *_) in found["difference"].items():
        assert value == pytest.approx(found["adapter"][measure][0] - found["base"][measure][0])
    assert found["difference"]["loss"][0] < 0


def test_base_alone_and_merged(feelings, base, capsys):
    both, alone, merged = score(capsys), score(capsys, "--adapter", "none", "--checkpoint", str(base)), score(capsys, "--merge")
    assert alone["base"] == both["base"] == merged["base"] and "adapter" not in alone and "difference" not in alone
    for measure, values in both["adapter"].items():
        assert merged["adapter"][measure] == pytest.approx(values, rel=1e-4)
    named = score(capsys, "--choices", "sad,happy,yes")
    assert named["choices"] == ["sad", "happy", "yes"] and named["base"]["loss"] == pytest.approx(both["base"]["loss"], rel=1e-5)
    assert score(capsys, "--seed", "1")["base"]["loss"][1:] != both["base"]["loss"][1:]
