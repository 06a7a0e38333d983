"""Logits to text.  Without a KV cache each token is one forward over the whole row: simple, and right."""
import torch


def generate(model, prompt, max_new_tokens, eos_id, temperature=0.0, generator=None):
    """Iterate over the ids that `model` puts after `prompt` (list of ids); eos ends it and is not among them.

    temperature 0 takes the likeliest token; above it, softmax(logits / temperature) is drawn from with
    `generator` (a torch.Generator on the CPU).  Ends at model.args.max_seq_len as well.
    Raises ValueError, at once, when the prompt leaves no room for an answer.
    """
    limit = model.args.max_seq_len
    if len(prompt) >= limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens and the model takes {limit}")
    return _next_tokens(model, list(prompt), min(max_new_tokens, limit - len(prompt)), eos_id, temperature, generator)


@torch.inference_mode()
def _next_tokens(model, ids, max_new_tokens, eos_id, temperature, generator):
    device = next(model.parameters()).device
    for _ in range(max_new_tokens):
        tokens = torch.tensor([ids], device=device)
        last = torch.zeros_like(tokens, dtype=torch.bool)
        last[:, -1] = True
        logits = model(tokens, rows=last)[0].float()                       # (V,): only the last position's
        if temperature > 0:
            # On the CPU, so that a seed gives one text on every device.
            token = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator).item()
        else:
            token = logits.argmax().item()
        if token == eos_id:
            return
        ids.append(token)
        yield token


def stream(tokenizer, ids):
    """Yield text as the ids come: joined, exactly tokenizer.decode(all of them).

    Each time all ids are decoded and what is new is given out: alone, a piece loses its leading space.  A
    character of several byte pieces decodes to U+FFFD until it is whole, so a tail of those waits.
    """
    seen, given = [], ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        whole = text.rstrip("\ufffd")
        if len(whole) > len(given):
            yield whole[len(given):]
            given = whole
    text = tokenizer.decode(seen)
    if len(text) > len(given):
        yield text[len(given):]
