"""llama/sampling.py and generate.py: the right tokens, whole characters, base and adapter and merged."""
import pytest
import torch

import generate as command
import train
from llama import load_checkpoint
from llama.sampling import generate, stream

from .conftest import tiny


class Scripted(torch.nn.Module):
    """A model whose next token is scripted by the length of the row; counts forwards and logits asked for."""

    def __init__(self, script, max_seq_len=64):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.args = type("Args", (), dict(max_seq_len=max_seq_len))
        self.script, self.rows = script, []

    def forward(self, tokens, rows):
        self.rows.append(rows[0].tolist())
        return torch.nn.functional.one_hot(torch.tensor([self.script[tokens.shape[1]]]), 50).float()


def test_greedy_follows_the_likeliest_token_and_stops_at_eos():
    model = Scripted({3: 7, 4: 8, 5: 2, 6: 9})
    assert list(generate(model, [1, 5, 6], 10, eos_id=2)) == [7, 8]
    assert model.rows == [[False] * n + [True] for n in (2, 3, 4)]           # logits at the last position only
    assert list(generate(model, [1, 5, 6], 1, eos_id=2)) == [7]


def test_greedy_equals_taking_the_argmax_of_all_logits():
    model, ids = tiny(n_kv_heads=2), [1, 5, 9]
    for _ in range(12):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    assert list(generate(model, [1, 5, 9], 12, eos_id=-1)) == ids[3:]


def test_the_context_ends_it():
    model = Scripted({n: 7 for n in range(64)}, max_seq_len=6)
    assert list(generate(model, [1, 5, 6], 10, eos_id=2)) == [7, 7, 7]
    with pytest.raises(ValueError, match="the prompt has 6 tokens and the model takes 6"):
        list(generate(model, [1] * 6, 10, eos_id=2))


def test_temperature_draws_from_the_softmax():
    class Three(Scripted):
        def forward(self, tokens, rows):
            return torch.tensor([[0.0, 1.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        drawn = [next(generate(Three({}), [1], 1, -1, temperature, generator)) for _ in range(4000)]
        expected = (torch.tensor([0.0, 1.0, 2.0]) / temperature).softmax(-1)
        assert torch.allclose(torch.bincount(torch.tensor(drawn), minlength=3) / 4000, expected, atol=0.03)
    again = [list(generate(tiny(), [1, 5], 8, -1, 1.0, torch.Generator().manual_seed(s))) for s in (3, 3, 4)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize("text", ["blue green", "two  spaces\n\nand lines ", "ünï 🦙🦙 多", " leading", "a\ufffdb", "ends in \ufffd", ""])
def test_streamed_text_is_the_decoded_whole_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = list(stream(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)               # no half of a character, ever
        assert len(pieces) > 1 or len(ids) < 3                              # and not all at the end


def test_half_a_character_at_the_end_is_shown_not_lost(tokenizer):
    ids = tokenizer.encode("a🦙")[:-1]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) != "a"


@pytest.fixture
def trained(base, data, tmp_path, monkeypatch, capsys):
    """A run in ./out whose adapter says something else than the base."""
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint", str(base), "--data", str(data), "--targets", "all", "--lr", "1e-2",
                "--epochs", "40", "--accumulation-steps", "1", "--dropout", "0"])
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
    assert "base base, 2 layers, fp32 on cpu; adapter out/adapter.pt, lora r 16 on all" in adapted.err
    assert "merged: 100.0 % of the update survives in fp32" in merged.err
    assert "; adapter" not in alone.err


def test_the_adapter_file_names_its_base_and_layers(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint", str(base), "--data", str(data), "--layers", "1", "--max-steps", "1", "--out", "one"])
    command.main(["--adapter", "one/adapter.pt", "--instruction", "Say", "--max-new-tokens", "1"])
    assert "1 layers" in capsys.readouterr().err


def test_input_goes_into_the_prompt(trained):
    with_input = trained("--instruction", "Say cold again please.", "--input", "quietly")
    assert with_input.out.startswith("\n### Say cold again please.\n# quietly\ncold")


def test_a_seed_repeats_a_drawn_text(trained):
    texts = [trained("--instruction", "Say", "--temperature", "3", "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_several_dtypes_answer(trained):
    for precision in ("bf16", "fp16"):
        assert f"{precision} on cpu" in trained("--instruction", "Say blue please.", "--precision", precision).err


def test_generation_leaves_the_model_as_it_was(base):
    model, tokenizer = load_checkpoint(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(generate(model.eval(), [1, 2, 3], 5, -1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
