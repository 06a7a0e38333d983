"""finetune/dataset.py: prompts to the letter, ids and labels by hand, files that are wrong."""
import json

import pytest

from finetune.dataset import SupervisedDataset, encode_example, truncate
from finetune.templates.alpaca import format_prompt
from finetune.examples import read_examples

_ = -100


class Words:
    """A tokenizer with a number per word; a prompt is its third line from the end."""

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
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    for empty in ({"input": ""}, {"input": None}, {}):
        assert format_prompt({"instruction": "Add {1}.", **empty}) == (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nAdd {1}.\n\n### Response:")


@pytest.mark.parametrize("prompt, answer, max_seq_len, tokens, labels", [
    ("10 11", "20", 9, [1, 10, 11, 20, 2], [_, _, _, 20, 2]),    # eos is a target
    ("10 11", "20", 5, [1, 10, 11, 20, 2], [_, _, _, 20, 2]),    # fits to the last
    ("10 11", "20 21", 5, [1, 10, 11, 20, 21], [_, _, _, 20, 21]),    # no eos after a cut
    ("10 11", "20 21", 4, [1, 10, 11, 20], [_, _, _, 20]),
    ("10 11", "20 21", 3, [1, 10, 11], [_, _, _]),   # will be dropped
    ("10 11", "", 9, [1, 10, 11, 2], [_, _, _, 2]),  # An empty answer still ends.
])
def test_ids_and_labels_by_hand(prompt, answer, max_seq_len, tokens, labels):
    row = encode_example(example(prompt, answer), Words())
    assert truncate(row, max_seq_len) == (tokens, labels)


def test_dataset_counts_what_it_cut_and_dropped():
    texts = [("10", "20"), ("10", "20 21 22"), ("10 11 12 13", "20"), ("10", "")]
    examples = [example(prompt, answer) for prompt, answer in texts]
    data = SupervisedDataset(examples, Words(), max_seq_len=4)
    assert (len(data), data.cut, data.dropped, data.n_with_eos, data.n_empty) == (3, 1, 1, 2, 1)
    assert data.numbers == [1, 2, 4]
    assert data[1] == ([1, 10, 20, 21], [_, _, 20, 21])
    with pytest.raises(ValueError, match="none of 4 examples has an answer token within 2 tokens"):
        SupervisedDataset(examples[1:3] * 2, Words(), max_seq_len=2)


def test_json_and_jsonl_give_the_same(tmp_path):
    examples = [{"instruction": "a", "input": "", "output": "b\u2028c"},
                {"instruction": "ü", "output": ""}]
    lines = [json.dumps(each, ensure_ascii=False) for each in examples]
    whole = f"\ufeff[{', '.join(lines)}]"
    (tmp_path / "a.json").write_text(whole, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n\n".join([*lines, ""]), encoding="utf-8")
    assert read_examples(tmp_path / "a.json") == read_examples(tmp_path / "a.jsonl") == examples


GOOD = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize("name, content, message", [
    ("a.json", "[" + GOOD + ",\n{]", "a.json, line 2, column 2: not JSON"),
    ("a.json", "", "a.json holds no example"),
    ("a.json", "[" * 100_000, "a.json: not JSON (nested too deeply)"),
    ("a.json", "[" + "9" * 5000 + "]", "a.json: not JSON (Exceeds the limit"),
    ("a.json", '[{"instruction": "\\ud800", "output": ""}]',
     "a.json, example 1: 'instruction' has an incomplete character, such as half of an emoji"),
    ("a.json", "7", "a.json begins with '7', which is not JSON"),
    ("a.json", "[]", "a.json holds no example"),
    ("a.jsonl", "\n \n", "a.jsonl holds no example"),
    ("a.jsonl", GOOD + "\n\n{'a'}", "a.jsonl, line 3: not JSON"),
    ("a.json", f"[{GOOD}, 7]", "a.json, example 2 is the number 7, not an object"),
    ("a.json", f'[{GOOD}, {{"instruction": "a"}}]', "a.json, example 2 has no 'output'"),
    ("a.json", '[{"output": "a"}]', "a.json, example 1 has no 'instruction'"),
    ("a.json", '[{"instruction": "a", "input": ["b"], "output": "c"}]',
     "a.json, example 1: 'input' is a list, not text"),
    ("a.json", '[{"instruction": " ", "output": "c"}]', "example 1: 'instruction' is empty"),
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
