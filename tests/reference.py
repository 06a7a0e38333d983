"""LLaMA 2 written a second time, slowly: one position, one head, one pair at a time, nothing shared with llama/."""
import cmath
import math

import torch


def norm(x, weight, eps):
    return x / math.sqrt((x * x).mean().item() + eps) * weight


def turn(vector, position, theta):
    hd, out = len(vector), vector.clone()
    for j in range(hd // 2):
        pair = complex(vector[2 * j].item(), vector[2 * j + 1].item())
        pair *= cmath.exp(1j * position * theta ** (-2 * j / hd))
        out[2 * j], out[2 * j + 1] = pair.real, pair.imag
    return out


def naive_logits(weights, args, tokens):
    """weights: a state dict; tokens: list of ids -> logits (T, V) of one row."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    hd, group = args.dim // args.n_heads, args.n_heads // args.n_kv_heads
    stream = [w["tok_embeddings.weight"][t] for t in tokens]
    for i in range(args.n_layers):
        def of(name):
            return w[f"layers.{i}.{name}.weight"]
        normed = [norm(x, of("attention_norm"), args.norm_eps) for x in stream]
        q, k, v = ([of(f"attention.{name}") @ x for x in normed] for name in ("wq", "wk", "wv"))
        for t in range(len(tokens)):
            heads = []
            for h in range(args.n_heads):
                mine, theirs = slice(h * hd, (h + 1) * hd), slice(h // group * hd, (h // group + 1) * hd)
                query = turn(q[t][mine], t, args.rope_theta)
                scores = [(query @ turn(k[s][theirs], s, args.rope_theta)).item() / math.sqrt(hd) for s in range(t + 1)]
                exps = [math.exp(score - max(scores)) for score in scores]
                heads.append(sum(e / sum(exps) * v[s][theirs] for s, e in enumerate(exps)))
            h = stream[t] + of("attention.wo") @ torch.cat(heads)
            x = norm(h, of("ffn_norm"), args.norm_eps)
            gate = of("feed_forward.w1") @ x
            stream[t] = h + of("feed_forward.w2") @ (gate / (1 + torch.exp(-gate)) * (of("feed_forward.w3") @ x))
    return torch.stack([w["output.weight"] @ norm(x, w["norm.weight"], args.norm_eps) for x in stream])
