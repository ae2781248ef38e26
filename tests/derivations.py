"""Plain derivations of the method: whole attention matrices, S_b in full, one image at a time, nothing clever."""

import copy

import torch


def plain_block_maps(model, image, target=None, importance=None, variant="paper"):
    """Return L_b `(L, h, w)` of one image `(3, H, W)`, Eqs. 1 to 5 as they stand."""
    model = copy.deepcopy(model).eval()  # backward() fills every .grad
    x = model.patch_embed(image[None])
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))

    decomposed = []
    for block in model.blocks:
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y)[0].reshape(-1, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)  # (H, N, d) each
        a = (attn.q_norm(q) @ attn.k_norm(k).transpose(1, 2) / attn.head_dim**0.5).softmax(-1)  # (H, N, N)
        T = (a @ v).transpose(0, 1).flatten(1)  # (N, C)
        T.retain_grad()
        S = (a[:, 0, :, None] * v).transpose(0, 1).flatten(1)  # (N, C), row of the class token
        decomposed.append((S.detach(), T))
        x = x + block.ls1(attn.proj(attn.norm(T))[None])
        x = x + block.ls2(block.mlp(block.norm2(x)))

    features = model.fc_norm(model.norm(x)[:, 0])[0]  # (D,)
    if importance is None:
        model.head(features)[target].backward()
    else:
        features.backward(importance.to(features))

    maps = []
    for S, T in decomposed:
        torch.testing.assert_close(S.sum(0), T[0].detach(), rtol=1e-4, atol=1e-5)
        C = T.grad[0].relu() if importance is None and variant == "paper" else T.grad[0]
        by_patch = (S * C).sum(1)
        if variant == "heads":
            by_patch = sum(part.sum(1).relu() for part in (S * C).chunk(attn.num_heads, 1))
        maps.append(by_patch.relu()[model.num_prefix_tokens :])
    patch = model.patch_embed.patch_size
    return torch.stack(maps).unflatten(1, [side // p for side, p in zip(image.shape[1:], patch)])


def plain_all_rows(model, image, target, importance):
    """Return ReLU(sum_c V[j]_c (A^T w(C))[j]_c) of one image, `(L, h, w)`."""
    model = copy.deepcopy(model)
    x, decomposed = model._pos_embed(model.patch_embed(image[None])), []
    for block in model.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))[0].permute(1, 2, 0, 3)
        A = (q @ k.transpose(1, 2) * attn.scale).softmax(-1)
        v.retain_grad()
        T = A @ v
        T.retain_grad()
        decomposed.append((A, v, T))
        x = x + block.ls1(attn.proj(T.transpose(0, 1).flatten(1)[None]))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    feature = model.forward_head(model.norm(x), pre_logits=True)[0]
    (model.head(feature)[target] if importance is None else feature @ importance).backward()
    w = torch.relu if importance is None else lambda c: c
    maps = [(v * (A.transpose(1, 2) @ w(T.grad))).sum((0, 2)).relu() for A, v, T in decomposed]
    if importance is not None:  # with w = identity it is V * dY/dV
        for (_, v, _), tokens in zip(decomposed, maps):
            torch.testing.assert_close(tokens, (v * v.grad).sum((0, 2)).relu(), rtol=1e-4, atol=1e-6)
    return torch.stack(maps)[:, model.num_prefix_tokens :].unflatten(1, (4, 4)).detach()


def assert_maps_match(flow, expected, tolerance=1e-5):
    """Compare block maps and their sums with `expected`, the block maps of each image, relative to each maximum."""
    filled = torch.stack([(plain.amax((-2, -1)) > 0).float().mean() for plain in expected])
    assert (filled > 0.5).all(), "most maps are empty: nothing to compare"
    for block_maps, accumulated, plain in zip(flow.block_maps, flow.accumulated, expected, strict=True):
        running = torch.zeros_like(plain[0])
        for b in range(len(plain)):
            running = running + plain[b]
            for actual, wanted in ((block_maps[b], plain[b]), (accumulated[b], running)):
                assert actual.shape == wanted.shape and actual.dtype == torch.float32
                assert (actual - wanted).abs().max() <= tolerance * wanted.max(), f"block {b}"


def assert_same_maps(actual, expected, tolerance=1e-5):
    """Compare maps relative to the largest value of each."""
    assert actual.shape == expected.shape and (expected > 0).any()
    largest = expected.flatten(2).amax(-1)[..., None, None]
    assert ((actual - expected).abs() <= tolerance * largest + 1e-12).all()
