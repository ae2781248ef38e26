"""At the input of the first block, the relevance is that of the reference library of AttnLRP, `lxt`.

Its explicit functions hand relevance on, where ours hand on a gradient; they stabilise denominators with 1e-6. The
library pulls in far more than the one file that is used here: `pip install --no-deps lxt==2.1`.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_images, tiny_torchvision

from daam_core import SCORES, attention_flow, score_gradient

lf = pytest.importorskip("lxt.explicit.functional", reason="lxt is not installed: pip install --no-deps lxt==2.1")
identity = pytest.importorskip("lxt.explicit.rules").identity


def norm(layer, x):
    return lf.layer_norm(x, layer.weight, layer.bias, layer.eps)


def linear(x, weight, bias):
    return lf.linear_epsilon(x, weight, bias)


def block(layer, x):
    attention, y = layer.self_attention, norm(layer.ln_1, x)
    parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
    q, k, v = (linear(y, W, b).unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for W, b in parts)
    A = lf.softmax(lf.matmul(q, k.transpose(2, 3)), -1, temperature=q.shape[-1] ** 0.5)
    T = lf.matmul(A, v).transpose(1, 2).flatten(2)
    x = lf.add2(x, linear(T, attention.out_proj.weight, attention.out_proj.bias))
    y = linear(norm(layer.ln_2, x), layer.mlp[0].weight, layer.mlp[0].bias)
    return lf.add2(x, linear(identity(F.gelu, y), layer.mlp[3].weight, layer.mlp[3].bias))


@pytest.mark.parametrize("score", SCORES)
def test_relevance_is_that_of_lxt(score):
    model, images, targets = tiny_torchvision().double(), random_images(2, 3, 32, 32).double(), torch.tensor([3, 1])
    flow = attention_flow(model, images, targets, variant="relevance", score=score)

    entered = []
    handle = model.encoder.layers[0].register_forward_pre_hook(lambda layer, args: entered.append(args[0]))
    model(images)
    handle.remove()
    tokens = x = entered[0].detach().requires_grad_()
    for layer in model.encoder.layers:
        x = block(layer, x)
    feature, head = norm(model.encoder.ln, x)[:, 0], model.heads.head
    z = linear(feature, head.weight, head.bias)
    torch.testing.assert_close(z, flow.output)
    (relevance,) = torch.autograd.grad(z, tokens, z.detach() * score_gradient(z.detach(), targets, score).double())
    R = relevance.sum(2).float()
    largest = R.abs().max()
    assert largest > 0.1
    torch.testing.assert_close(flow.block_maps[:, 0].flatten(1), R[:, 1:], rtol=1e-3, atol=1e-3 * largest.item())
    torch.testing.assert_close(flow.class_share[:, 0], R[:, 0].abs() / R.abs().sum(1), rtol=1e-3, atol=1e-3)
