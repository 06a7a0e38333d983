"""NEFTune (Jain et al. 2023): noise on the token embeddings while a model trains.

    x + alpha / sqrt(L D) u        u uniform in [-1, 1], drawn anew for each number

L is the number of tokens of the example, D the width of the model.
"""
import torch
import torch.nn as nn

from llama.layout import Layout


def add_embedding_noise(model: nn.Module, alpha: float | None):
    """Let a model add the noise in training mode, and nothing in eval mode.  No file stores this.

    model: with `tok_embeddings`, called with tokens (B, T) and layout=Layout or None.  alpha: None
    adds nothing.
    """
    if alpha is None:
        return
    layouts = []                                     # of the forward that runs

    def note_layout(_model, _args, kwargs):
        layouts[:] = [kwargs.get("layout")]

    def with_noise(_embedding, _args, x):
        if not model.training:
            return x
        layout, = layouts
        lengths = torch.tensor(x.shape[1]) if layout is None else example_lengths(layout)
        scale = alpha * (lengths * x.shape[-1]).rsqrt().to(x.device).view(-1, 1)       # (T, 1)
        noise = torch.empty_like(x, dtype=torch.float32).uniform_(-1, 1)
        return (x + scale * noise).type_as(x)

    model.register_forward_pre_hook(note_layout, with_kwargs=True)
    model.tok_embeddings.register_forward_hook(with_noise)


def example_lengths(layout: Layout) -> torch.Tensor:
    """Return for each token of a packed row the length of its example, (N,) int64.

    A beginning that several examples share has the length of the longest.
    """
    lengths = [0] * len(layout.segments)
    for end in layout.ends:
        _, context = layout.segments[end]
        chain = (*context, end)
        length = sum(layout.segments[i][0] for i in chain)
        for i in chain:
            lengths[i] = max(lengths[i], length)
    n_tokens = [n for n, _ in layout.segments]
    return torch.tensor(lengths).repeat_interleave(torch.tensor(n_tokens))
