"""llama/tokenizer.py: ids of bos and eos, no pad id, errors."""
import pytest

from llama import Tokenizer


def test_bos_and_eos_are_ids(tokenizer):
    plain = tokenizer.encode("The sky is blue")
    assert tokenizer.encode("The sky is blue", bos=True, eos=True) == [1, *plain, 2]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_text_comes_back_whole(tokenizer):
    for text in ("The sky is blue.", "two  spaces\nand a line", "ünïcödé 🦙 多", ""):
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_ids_past_the_pieces_give_no_text(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("blue"), tokenizer.vocab_size + 5]) == "blue"


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*nowhere"):
        Tokenizer(tmp_path / "nowhere")
    for content, message in ((b"", "is empty"), (b"nothing", "is not a sentencepiece model")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Tokenizer(tmp_path / "tokenizer.model")
