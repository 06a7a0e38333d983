"""LLaMA 2 a second time, slowly: one position, one head, one pair at a time, nothing of llama/."""
import cmath
import math

import torch


def norm(x, weight, eps):
    return x / math.sqrt((x * x).mean().item() + eps) * weight


def turn(vector, position, theta):
    turned = vector.clone()
    for j in range(len(vector) // 2):
        angle = position * theta ** (-2 * j / len(vector))
        pair = complex(vector[2 * j], vector[2 * j + 1]) * cmath.exp(1j * angle)
        turned[2 * j] = pair.real
        turned[2 * j + 1] = pair.imag
    return turned


def attended(query, keys, values):
    """Return the sum of the values, weighed by the softmax of query times keys."""
    scores = [(query @ key).item() / math.sqrt(len(query)) for key in keys]
    exps = [math.exp(score - max(scores)) for score in scores]
    return sum(e / sum(exps) * value for e, value in zip(exps, values, strict=True))


def naive_logits(weights, args, tokens):
    """weights: a state dict; tokens: list of ids -> logits (T, V) of one row."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
    hd = args.dim // args.n_heads
    stream = [w["tok_embeddings"][t] for t in tokens]
    for i in range(args.n_layers):
        layer = f"layers.{i}"
        normed = [norm(x, w[f"{layer}.attention_norm"], args.norm_eps) for x in stream]
        q, k, v = ([w[f"{layer}.attention.{name}"] @ x for x in normed]
                   for name in ("wq", "wk", "wv"))
        q = [[turn(head, t, args.rope_theta) for head in x.split(hd)] for t, x in enumerate(q)]
        k = [[turn(head, t, args.rope_theta) for head in x.split(hd)] for t, x in enumerate(k)]
        v = [x.split(hd) for x in v]
        for t in range(len(tokens)):
            heads = []
            for h in range(args.n_heads):
                g = h // (args.n_heads // args.n_kv_heads)
                keys = [k[s][g] for s in range(t + 1)]
                heads.append(attended(q[t][h], keys, [v[s][g] for s in range(t + 1)]))
            h = stream[t] + w[f"{layer}.attention.wo"] @ torch.cat(heads)
            x = norm(h, w[f"{layer}.ffn_norm"], args.norm_eps)
            gate = w[f"{layer}.feed_forward.w1"] @ x
            swiglu = gate / (1 + torch.exp(-gate)) * (w[f"{layer}.feed_forward.w3"] @ x)
            stream[t] = h + w[f"{layer}.feed_forward.w2"] @ swiglu
    return torch.stack([w["output"] @ norm(x, w["norm"], args.norm_eps) for x in stream])
