"""The relevance flow of a small ViT of timm, by a forward whose plain gradient follows the rules."""

import torch
from torch.nn.functional import gelu


def share(x, kept):
    """The identity, whose gradient is multiplied by a number."""
    return kept * x + (1 - kept) * x.detach()


def constant(x, rule=True):
    return x.detach() if rule else x


class PlainRelevance:
    """What flows through a model to the log-odds, or the logit, of the classes.

    `kept_qk` and `kept_v` are the shares of the gradient that q and k, and v, get.
    """

    def __init__(self, model, images, classes, norm=True, act=True, kept_qk=0.25, kept_v=0.5, score="log_odds"):
        def normed(module, x):
            centred = x - x.mean(-1, keepdim=True)
            scale = (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
            return centred / constant(scale, norm) * module.weight + module.bias

        x = model._pos_embed(model.patch_embed(images))
        self.x, self.A, self.V, self.T = [], [], [], []
        for block in model.blocks:
            self.x.append(x)
            q, k, v = block.attn.qkv(normed(block.norm1, x)).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
            A = (share(q, kept_qk) @ share(k, kept_qk).transpose(2, 3) / 12**0.5).softmax(3)  # (B, H, N, N)
            T = A @ share(v, kept_v)
            self.A.append(A), self.V.append(v), self.T.append(T)
            x = x + block.ls1(block.attn.proj(T.transpose(1, 2).flatten(2)))
            hidden = block.mlp.fc1(normed(block.norm2, x))
            hidden = hidden * constant(gelu(hidden) / hidden) if act else gelu(hidden)
            x = x + block.ls2(block.mlp.fc2(hidden))
        z = model.head(normed(model.norm, x)[:, 0])
        p = z.softmax(1)
        Y = z if score == "logit" else p.log() - (1 - p).log()
        self.Y = Y[range(len(classes)), classes].sum()

    def gradients(self, tensors):
        return torch.autograd.grad(self.Y, tensors, retain_graph=True)

    def tokens(self):
        """R_b of all tokens, `(B, L, N)`."""
        return torch.stack([(x * g).sum(2) for x, g in zip(self.x, self.gradients(self.x))], 1)

    def values(self):
        """sum_h ReLU(V . A^T dY/dT), `(B, L, N)`."""
        flows = [A.transpose(2, 3) @ C for A, C in zip(self.A, self.gradients(self.T))]
        return torch.stack([(V * flow).sum(3).clamp(min=0).sum(1) for V, flow in zip(self.V, flows)], 1)

    def paper(self):
        """S_b . C_b of the class token, `(B, L, N)`."""
        C = [C[:, :, :1] for C in self.gradients(self.T)]
        return torch.stack([(A[:, :, 0, :, None] * V * c).sum((1, 3)) for A, V, c in zip(self.A, self.V, C)], 1)
