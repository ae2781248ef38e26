"""Models with something odd about them, and models of no library, around the layers of a tiny ViT."""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Heads and forwards of timm's VisionTransformer
# ----------------------------------------------------------------------------------------------------------------------


class ReadsPatches(VisionTransformer):
    """Says global_pool='token' and reads the mean of the patches."""

    def forward_head(self, x, pre_logits=False):
        x = x[:, self.num_prefix_tokens :].mean(1)
        return x if pre_logits else self.head(x)


class InfiniteGradient(VisionTransformer):
    """Computes finite scores with infinite gradients."""

    def forward_head(self, x, pre_logits=False):
        x = x[:, 0] + (x[:, 0] - x[:, 0]).sqrt()
        return x if pre_logits else self.head(x)


class ReturnsTokens(VisionTransformer):
    """Scores every token."""

    def forward(self, x):
        return self.head(self.forward_features(x))


class NoGrad(VisionTransformer):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class NoAttention(VisionTransformer):
    """Skips its blocks."""

    def forward_features(self, x, **options):
        return self.norm(self._pos_embed(self.patch_embed(x)))


class Detour(VisionTransformer):
    """Reads the class token by functions that could also read other tokens."""

    def forward_head(self, x, pre_logits=False):
        x = x.flip(1)[:, -1]
        return x if pre_logits else self.head(x)


class MixesAtTheEnd(VisionTransformer):
    """Adds the mean of all tokens to every token."""

    def forward_features(self, x, **options):
        x = super().forward_features(x, **options)
        return x + x.mean(1, keepdim=True)


class Neighbour(VisionTransformer):
    """Reads the second token, a patch."""

    def forward_head(self, x, pre_logits=False):
        return x[:, 1] if pre_logits else self.head(x[:, 1])


class Subclass(VisionTransformer):
    """User's class on top of timm's."""


class FrozenStem(VisionTransformer):
    def _pos_embed(self, x):
        with torch.no_grad():
            return super()._pos_embed(x)


class Augments(VisionTransformer):
    __module__ = "timm.models.mine"  # the patch order is checked only for classes outside of timm, see Turned

    def forward(self, x):
        return super().forward(torch.cat([x, x.flip(3)])).unflatten(0, (2, -1)).mean(0)


class Turned(VisionTransformer):
    def _pos_embed(self, x):
        x = super()._pos_embed(x)
        return torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)


class Early(VisionTransformer):
    """Scores the output of the second block."""

    def forward(self, x):
        x = self._pos_embed(self.patch_embed(x))
        x = self.blocks[1](self.blocks[0](x))
        self.blocks[2](x)
        return self.head(self.norm(x)[:, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Attentions and other parts of a block
# ----------------------------------------------------------------------------------------------------------------------


class DropsAlways(Attention):
    """Drops attention even in eval mode: T is not A V."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        with torch.random.fork_rng(devices=[]):
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        return self.proj(x.transpose(1, 2).flatten(2))


class AlsoOfKeys(Attention):
    """Adds A K to A V."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        matrix = (q @ k.transpose(2, 3) * self.scale).softmax(-1)
        return self.proj((matrix @ v + matrix @ k).transpose(1, 2).flatten(2))


class Grouped(Attention):
    """Shares the keys and values of the first head among all (grouped-query attention)."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        else:
            x = (q @ k[:, :1].transpose(2, 3) * self.scale).softmax(-1) @ v[:, :1].expand_as(v)
        return self.proj(x.transpose(1, 2).flatten(2))


class InPlace(Attention):
    """Scales its output in place, or out of place."""

    fused, in_place = True, True

    def forward(self, x, **options):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            T = F.scaled_dot_product_attention(q, k, v)
        else:
            T = (self.scale * q @ k.transpose(-2, -1)).softmax(-1) @ v
        T = T.mul_(1.5) if self.in_place else T * 1.5
        return self.proj(T.transpose(1, 2).flatten(2))


class NamedLikeCheckpoint(nn.Module):
    """A block with arguments of the names that `torch.utils.checkpoint` has."""

    def __init__(self, block):
        super().__init__()
        self.block, self.attn = block, block.attn

    def forward(self, x, *, function, debug, use_reentrant, context_fn):
        return self.block(x)


class ChecksItself(nn.Module):
    """A block that runs another one under `torch.utils.checkpoint`."""

    def __init__(self, block):
        super().__init__()
        self.block, self.attn = block, block.attn

    def forward(self, x, **options):
        return checkpoint(self.block, x, use_reentrant=False)


class AttendsMore(nn.Module):
    """An MLP that attends, too, but not in the first pass."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        if self.runs > 1:
            heads = x[:, None]
            x = x + 0 * F.scaled_dot_product_attention(heads, heads, heads)[:, 0]
        return x.exp()


class SecondToken(nn.Module):
    """Adds half of the previous token to each token."""

    def forward(self, x):
        return x + 0.5 * x.roll(1, 1)


class RootMeanSquare(nn.RMSNorm):
    """Writes the norm out, as timm does."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * self.weight


class OnceMore(nn.Module):
    """Keeps something for the backward in the first pass, and not in the second."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x.exp().log() if self.runs == 1 else x


class DiffAugment(nn.Identity):
    """Named like timm's differential attention."""


# ----------------------------------------------------------------------------------------------------------------------
# ViTs of no library
# ----------------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Writes the forward of a ViT once more, around its layers."""

    def __init__(self, vit, fused=True):
        super().__init__()
        self.layers, self.fused = vit, fused

    def attend(self, q, k, v):
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1) @ v

    def tokens(self, x):
        x = self.layers.patch_embed(x)
        return torch.cat([self.layers.cls_token.expand(len(x), -1, -1), x], 1) + self.layers.pos_embed

    def pool(self, x):
        return x[:, 0]

    def forward(self, x):
        x = self.tokens(x)
        for block in self.layers.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
            x = x + block.attn.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return self.layers.head(self.pool(self.layers.norm(x)))


class PlainMean(Plain):
    def pool(self, x):
        return x[:, 1:].mean(1)


class PlainBoth(Plain):
    def pool(self, x):
        return x[:, 0] + x[:, 1:].mean(1)


class PlainClassLast(Plain):
    def tokens(self, x):
        return super().tokens(x).roll(-1, 1)

    def pool(self, x):
        return x[:, -1]


class PlainRegister(Plain):
    def tokens(self, x):
        x = super().tokens(x)
        return torch.cat([x, x[:, :1]], 1)


class PlainWithoutConvolution(Plain):
    def tokens(self, x):
        conv = self.layers.patch_embed.proj
        x = F.unfold(x, 8, stride=8).transpose(1, 2) @ conv.weight.flatten(1).T + conv.bias
        return torch.cat([self.layers.cls_token.expand(len(x), -1, -1), x], 1) + self.layers.pos_embed


class PlainLastUnread(Plain):
    """Computes one more attention, without effect."""

    def pool(self, x):
        q = x.unsqueeze(1)
        self.attend(q, q, q)
        return x[:, 0]


class PlainColumns(Plain):
    def tokens(self, x):
        x = self.layers.patch_embed.proj(x).transpose(2, 3).flatten(2).transpose(1, 2)
        return torch.cat([self.layers.cls_token.expand(len(x), -1, -1), x], 1) + self.layers.pos_embed


class PlainReversed(Plain):
    def tokens(self, x):
        x = super().tokens(x)
        return torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)


class PlainOtherKeys(Plain):
    """Reorders keys and values, which does not change the output."""

    def attend(self, q, k, v):
        return super().attend(q, *(torch.cat([x[:, :, :1], x[:, :, 1:].flip(2)], 2) for x in (k, v)))


class PlainHeadsFirst(Plain):
    """Attends with (H, B, N, d) instead of (B, H, N, d), both of which are 2."""

    def attend(self, q, k, v):
        return super().attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1)


class PlainFlipped(Plain):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(3))


class PlainPartlyEinsum(Plain):
    calls = 0

    def attend(self, q, k, v):
        PlainPartlyEinsum.calls += 1
        if self.calls % 3 != 1:
            return super().attend(q, k, v)
        return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(q @ k.transpose(2, 3) / 12**0.5, -1), v)


class PlainChannels(Plain):
    """Attends between channels, as XCiT."""

    def attend(self, q, k, v):
        return super().attend(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)).transpose(2, 3)


class Crop(nn.Module):
    """Passes a part of the image on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x[..., :32, :32])


class Block(nn.Module):
    """Block as tutorials write it, with an nn.MultiheadAttention that also returns its weights."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(24), nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        y, weights = self.attention(y, y, y)
        assert weights.shape == (len(x), 17, 17)
        return x + y


class Tutorial(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 24, 8, 8), nn.Parameter(torch.zeros(1, 1, 24))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(24, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        token = self.token if len(x) == 1 else self.token.expand(len(x), -1, -1)
        return self.head(self.blocks(torch.cat([token, x], 1))[:, 0])
