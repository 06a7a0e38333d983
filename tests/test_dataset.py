"""finetune/dataset.py: prompts to the letter, ids and labels written out by hand, files that are wrong."""
import json

import pytest

from finetune.dataset import encode_example, encode_prompt, SupervisedDataset, truncate
from finetune.templates.alpaca import format_prompt
from finetune.examples import read_examples

_ = -100


class Words:
    """A tokenizer with a number a word, bos 1 and eos 2; a prompt is its third line from the end."""
    bos_id, eos_id, pad_id = 1, 2, 0

    def encode(self, text, bos=False, eos=False):
        words = text.split("### Instruction:\n")[-1].split("\n\n### Response:")[0].split()
        return [1] * bos + [int(word) for word in words] + [2] * eos

    def decode(self, ids):
        return " ".join(map(str, ids))


def example(prompt, answer):
    return {"instruction": prompt, "input": "", "output": answer}


def test_stanfords_prompts_to_the_letter():
    assert format_prompt({"instruction": "Add.", "input": "1 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    for empty in ({"input": ""}, {"input": None}, {}):
        assert format_prompt({"instruction": "Add {1}.", **empty}) == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd {1}.\n\n### Response:")


@pytest.mark.parametrize("prompt, answer, max_seq_len, tokens, labels", [
    ("10 11", "20", 9, [1, 10, 11, 20, 2], [_, _, _, 20, 2]),                # eos is a target
    ("10 11", "20", 5, [1, 10, 11, 20, 2], [_, _, _, 20, 2]),                # fits to the last
    ("10 11", "20 21", 5, [1, 10, 11, 20, 21], [_, _, _, 20, 21]),           # a cut answer gets no eos
    ("10 11", "20 21", 4, [1, 10, 11, 20], [_, _, _, 20]),
    ("10 11", "20 21", 3, [1, 10, 11], [_, _, _]),                           # no answer left: will be dropped
    ("10 11", "", 9, [1, 10, 11, 2], [_, _, _, 2]),                          # an empty answer still ends
])
def test_ids_and_labels_by_hand(prompt, answer, max_seq_len, tokens, labels):
    assert truncate(encode_example(example(prompt, answer), Words()), max_seq_len) == (tokens, labels)


def test_dataset_counts_what_it_cut_and_dropped():
    examples = [example("10", "20"), example("10", "20 21 22"), example("10 11 12 13", "20"), example("10", "")]
    data = SupervisedDataset(examples, Words(), max_seq_len=4)
    assert (len(data), data.cut, data.dropped, data.n_with_eos, data.n_empty) == (3, 1, 1, 2, 1)
    assert data.numbers == [1, 2, 4]
    assert data[1] == ([1, 10, 20, 21], [_, _, 20, 21])
    with pytest.raises(ValueError, match="none of 4 examples has an answer token within 2 tokens"):
        SupervisedDataset(examples[1:3] * 2, Words(), max_seq_len=2)


def test_prompt_and_answer_never_share_a_piece(tokenizer):
    """Encoded as one text, ":" and "- blue" can melt into one piece, half prompt and half answer."""
    for answer in ("- blue", "blue", ": cold", ""):
        item = {"instruction": "Name a colour.", "input": "", "output": answer}
        tokens, labels = encode_example(item, tokenizer)
        prompt = encode_prompt(item, tokenizer)
        assert tokens[:len(prompt)] == prompt and tokens.count(1) == 1         # one bos
        assert labels == [_] * len(prompt) + tokens[len(prompt):]
        assert tokenizer.decode(tokens[len(prompt):]) == answer and tokens[-1] == tokenizer.eos_id


def test_json_and_jsonl_give_the_same(tmp_path):
    examples = [{"instruction": "a", "input": "", "output": "b\u2028c"}, {"instruction": "ü", "output": ""}]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(examples, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(e, ensure_ascii=False) for e in examples) + "\n", encoding="utf-8")
    assert read_examples(tmp_path / "a.json") == read_examples(tmp_path / "a.jsonl") == examples


GOOD = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize("name, content, message", [
    ("a.json", "[" + GOOD + ",\n{]", "a.json, line 2, column 2: not JSON"),
    ("a.json", "", "a.json holds no example"),
    ("a.json", "[" * 100_000, "a.json: not JSON (nested too deeply)"),
    ("a.json", "[" + "9" * 5000 + "]", "a.json: not JSON (Exceeds the limit"),
    ("a.json", '[{"instruction": "\\ud800", "output": ""}]', "a.json, example 1: 'instruction' has an incomplete character, such as half of an emoji"),
    ("a.json", "7", "a.json begins with '7', which is not JSON"),
    ("a.json", "[]", "a.json holds no example"),
    ("a.jsonl", "\n \n", "a.jsonl holds no example"),
    ("a.jsonl", GOOD + "\n\n{'a'}", "a.jsonl, line 3: not JSON"),
    ("a.json", f"[{GOOD}, 7]", "a.json, example 2 is the number 7, not an object"),
    ("a.json", f'[{GOOD}, {{"instruction": "a"}}]', "a.json, example 2 has no 'output'"),
    ("a.json", '[{"output": "a"}]', "a.json, example 1 has no 'instruction'"),
    ("a.json", '[{"instruction": "a", "input": ["b"], "output": "c"}]', "a.json, example 1: 'input' is a list, not text"),
    ("a.json", '[{"instruction": " ", "output": "c"}]', "a.json, example 1: 'instruction' is empty"),
])
def test_a_wrong_file_is_named_with_its_line_or_example(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        read_examples(tmp_path / name)
    assert message in str(caught.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="a.json is not UTF-8 text: byte 2"):
        read_examples(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="no data file at .*nowhere.json"):
        read_examples(tmp_path / "nowhere.json")
