"""Plain derivation of the relevance flow: module by module, forward and back by hand, without autograd.

Every function below returns the output of a module and its `pull`, which takes dY / d output to dY / d input by the
rules: `x * pull(gradient)` is the relevance of x.
"""

import torch
from torch import nn


def plain_relevance(model, image, target, score):
    """Return R_b of all tokens, `(L, N)`, of one image `(3, H, W)` and a timm ViT or Eva that reads its class token."""
    with torch.no_grad():
        x, rope = model._pos_embed(model.patch_embed(image[None])), None
        if isinstance(x, tuple):  # Eva
            x, rope = x
        x = model.norm_pre(x)[0]  # (N, C)
        entered, pulls = [], []
        for block in model.blocks:
            entered.append(x)
            x, pull = plain_block(block, x, rope)
            pulls.append(pull)
        feature, pull_norm = norm(model.norm, x)
        feature, pull_fc_norm = norm(model.fc_norm, feature[0])
        z, pull_head = linear(model.head, feature)

        dz = torch.zeros_like(z)
        if score == "log_odds":  # Y = z_c - log sum over the others of exp z_k
            others = [k for k in range(len(z)) if k != target]
            dz[others] = -z[others].exp() / z[others].exp().sum()
        dz[target] = 1
        gradient = torch.zeros_like(x)
        gradient[0] = pull_fc_norm(pull_head(dz))
        gradient = pull_norm(gradient)
        R = []
        for x, pull in zip(reversed(entered), reversed(pulls)):
            gradient = pull(gradient)
            R.append((x * gradient).sum(1))
    return torch.stack(R[::-1])


def plain_block(block, x, rope):
    """x + scale_1 attention(norm x), then the same with the MLP."""
    pulls = []
    for part, normed, scale in (("attn", block.norm1, "1"), ("mlp", block.norm2, "2")):
        y, pull_norm = norm(normed, x)
        y, pull_part = attention(block.attn, y, rope) if part == "attn" else mlp(block.mlp, y)
        gamma = getattr(block, f"gamma_{scale}", getattr(getattr(block, f"ls{scale}", None), "gamma", None))
        gamma = 1 if gamma is None else gamma
        pulls.append(lambda g, norm=pull_norm, part=pull_part, gamma=gamma: g + norm(part(g * gamma)))
        x = x + gamma * y
    return x, lambda g: pulls[0](pulls[1](g))


def linear(layer, x):
    return layer(x), lambda g: g @ layer.weight


def norm(layer, x):
    """The scale, 1 / std or 1 / rms, is a constant."""
    if isinstance(layer, nn.Identity):
        return x, lambda g: g
    if not isinstance(layer, nn.LayerNorm):  # RMSNorm
        scale = layer.weight / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        return layer(x), lambda g: g * scale
    scale = layer.weight / (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    return layer(x), lambda g: g * scale - (g * scale).mean(-1, keepdim=True)


def gate(function, x):
    """f(x) / x is a constant."""
    y = function(x)
    return y, lambda g: g * y / x


def mlp(module, x):
    """fc2(norm(act(fc1 x))), or fc2(norm(act(fc1_g x) * fc1_x x))."""
    if hasattr(module, "fc1_g"):  # SwiGLU
        (a, pull_a), (b, pull_b) = linear(module.fc1_g, x), linear(module.fc1_x, x)
        a, pull_gate = gate(module.act, a)
        y = a * b

        def pull_first(g):  # half of the gradient to each factor
            return pull_a(pull_gate(g / 2 * b)) + pull_b(g / 2 * a)
    else:
        u, pull_u = linear(module.fc1, x)
        y, pull_gate = gate(module.act, u)

        def pull_first(g):
            return pull_u(pull_gate(g))

    y, pull_norm = norm(module.norm, y)
    y, pull_last = linear(module.fc2, y)
    return y, lambda g: pull_first(pull_norm(pull_last(g)))


def attention(module, x, rope):
    """T = A V with A = softmax(scale q k^T): half of the gradient to V, half to A, of which q and k get half each."""
    N, H = len(x), module.num_heads
    if module.qkv is not None:
        weights = module.qkv.weight.chunk(3)
        bias = module.qkv.bias if getattr(module, "q_bias", None) is None else (
            torch.cat((module.q_bias, module.k_bias, module.v_bias)))  # fmt: skip
        biases = [0] * 3 if bias is None else bias.chunk(3)
    else:
        layers = module.q_proj, module.k_proj, module.v_proj
        weights = [layer.weight for layer in layers]
        biases = [0 if layer.bias is None else layer.bias for layer in layers]
    q, k, v = ((x @ W.T + b).view(N, H, -1).transpose(0, 1) for W, b in zip(weights, biases))  # (H, N, d) each
    (q, pull_q), (k, pull_k) = norm(module.q_norm, q), norm(module.k_norm, k)
    if rope is not None:
        (q, turn_q), (k, turn_k) = (rotated(u, rope, module.num_prefix_tokens) for u in (q, k))
        pull_q, pull_k = (lambda g, a=a, b=b: a(b(g)) for a, b in ((pull_q, turn_q), (pull_k, turn_k)))
    A = (q @ k.transpose(1, 2) * module.scale).softmax(-1)  # (H, N, N)
    y, pull_norm = norm(module.norm, (A @ v).transpose(0, 1).flatten(1))  # (N, C)
    y, pull_proj = linear(module.proj, y)

    def pull(g):
        dT = pull_norm(pull_proj(g)).view(N, H, -1).transpose(0, 1)  # (H, N, d)
        dV = A.transpose(1, 2) @ dT / 2
        dA = dT @ v.transpose(1, 2) / 2
        dS = A * (dA - (A * dA).sum(-1, keepdim=True))  # softmax
        dq = pull_q(dS @ k * module.scale / 2)
        dk = pull_k(dS.transpose(1, 2) @ q * module.scale / 2)
        return sum(u.transpose(0, 1).flatten(1) @ W for u, W in zip((dq, dk, dV), weights))

    return y, pull


def rotated(x, rope, prefix):
    """Rotary position embedding of the patches: pairs (a, b) -> (a cos - b sin, b cos + a sin)."""
    sin, cos = (part[..., ::2] for part in rope.chunk(2, -1))  # (n, d / 2) each

    def turn(x, sin):
        a, b = x[:, prefix:, ::2], x[:, prefix:, 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([x[:, :prefix], turned], 1)

    return turn(x, sin), lambda g: turn(g, -sin)
