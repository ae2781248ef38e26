"""Train the classifier with rotary positions, `vit_small_patch14_rope_caltech101.safetensors`.

    python pretrainedmodels/train_rope.py --data 101_ObjectCategories

It is a copy of the embedded classifier in another architecture: timm's `Eva` in the form of RoPE-ViT (Heo et al. 2024,
https://arxiv.org/abs/2403.13298), with rotary positions beside the learned ones, with registers, and with one block
less. `convert` sets its weights from those of the embedded classifier. The model then learns from the labels, from the
probabilities of the embedded classifier, and from its tokens after `MIDDLE` blocks. The photos and the split are those
of `train_caltech101.py`.

Tokens and probabilities are computed only once. The model sees some of the patches and, in the last epoch, half of
them. The state is saved in the folder `--work` after every epoch, and the same command resumes from there. The results
are in `vit_small_patch14_rope_caltech101.md`.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import normalize, pil_to_tensor
from tqdm import tqdm
from train_caltech101 import (
    HERE,
    Photos,
    Training,
    add_classifier_options,
    encode,
    evaluate,
    options,
    scores,
    set_learning_rates,
    split,
    store,
)

from daam_vit.files import atomic_write
from models import LoadedModel, load

ARCHITECTURE = "vit_small_patch16_rope_ape_224"
ARGUMENTS = {"patch_size": 14, "depth": 11, "init_values": 1.0, "num_reg_tokens": 4}
BLOCKS = (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11)
"""Block of the teacher from which each block of the student begins."""
MIDDLE = 8
"""Number of blocks of the teacher after which its tokens are a target; the last of these blocks is in BLOCKS."""


class Pixels(Dataset):
    """Dataset of (image, 0) from pixels `(M, 3, H, W)`, normalised as a model wants them."""

    def __init__(self, pixels: np.ndarray, mean, std):
        self.pixels, self.colours = pixels, {"mean": list(mean), "std": list(std)}

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return normalize(torch.from_numpy(np.array(self.pixels[i])) / 255, **self.colours), 0


def decode(photos: list, size: int, path: Path) -> np.ndarray:
    """Return whole photos as pixels `(M, 3, size, size)` uint8, memory-mapped from `path`.

    They are computed if the file does not exist.
    """
    if not path.exists():
        with atomic_write(path) as part:
            pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(photos), 3, size, size))
            for i, (photo, _) in enumerate(tqdm(photos, desc=path.name, unit="photo")):
                image = Image.open(photo).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
                pixels[i] = pil_to_tensor(image).numpy()
            pixels.flush()
    return np.load(path, mmap_mode="r")


@torch.inference_mode()
def predict(teacher: nn.Module, tokens: np.ndarray, path: Path, device: str) -> Tensor:
    """Return the log-probabilities `(M, K)` of the teacher from its tokens after MIDDLE blocks, stored in `path`.

    They are computed if the file does not exist.
    """
    if not path.exists():
        batches = (torch.from_numpy(np.array(tokens[i : i + 64])).to(device).float() for i in range(0, len(tokens), 64))
        logits = torch.cat([scores(teacher, MIDDLE, batch).float().cpu() for batch in batches])
        with atomic_write(path) as part:
            torch.save(logits.log_softmax(1), part)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def convert(teacher: nn.Module, student: nn.Module) -> None:
    """Set the weights of the student, an `Eva`, from those of the teacher, a `VisionTransformer`.

    The registers stay as they are, and have no learned position.
    """
    position = teacher.pos_embed
    student.patch_embed.load_state_dict(teacher.patch_embed.state_dict())
    student.pos_embed.copy_(position[:, 1:])
    student.cls_token.copy_(teacher.cls_token + position[:, :1])
    for block, i in zip(student.blocks, BLOCKS):
        weights = teacher.blocks[i].state_dict()
        weights |= {"gamma_1": weights.pop("ls1.gamma"), "gamma_2": weights.pop("ls2.gamma")}
        block.load_state_dict(weights)
    student.norm.load_state_dict(teacher.norm.state_dict())
    student.head.load_state_dict(teacher.head.state_dict())


class Distillation(Training):
    """Training of all weights of the student, epoch by epoch."""

    layer_decay = 1.0
    finish = 0.5

    def __init__(
        self, student: nn.Module, args: argparse.Namespace, photos: Pixels, labels: Tensor, tokens: np.ndarray,
        log_probabilities: Tensor,
    ):  # fmt: skip
        super().__init__(student, args, [tokens], labels)
        self.photos, self.tokens, self.log_probabilities = photos, tokens, log_probabilities
        for block in student.blocks:
            block.attn.fused_attn = False  # with few tokens, the backward of fused attention is slow on a CPU

    def run_step(self, step: int, index: Tensor, epoch: int) -> float:
        """Train on the photos `index`, `(B,)`, half of them mirrored, with random patches; return the loss."""
        set_learning_rates(self.optimizer, self.peak, step, self.per_epoch, self.epochs * self.per_epoch)
        device = self.args.device
        rows, columns = self.model.patch_embed.grid_size
        patches = torch.randperm(rows * columns)[: self.kept_patches(epoch)].sort().values
        flip = torch.rand(len(index)) < 0.5
        images = torch.stack([self.photos[n][0] for n in index])
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        images = images * (0.7 + 0.6 * torch.rand(len(index), 1, 1, 1)) + 0.6 * torch.rand(len(index), 1, 1, 1) - 0.3
        kept = [
            F.pad(1 + (mirror(patches, columns) if f else patches), (1, 0)) for f in flip
        ]  # the class token is first
        target = torch.from_numpy(np.stack([self.tokens[n][k] for n, k in zip(index, kept)])).to(device).float()

        with torch.autocast(torch.device(device).type, torch.bfloat16):
            middle, logits = run_student(self.model, images.to(device), patches.to(device))
        losses = (
            F.cross_entropy(logits.float(), self.labels[index].to(device), label_smoothing=0.1),
            F.kl_div(
                logits.float().log_softmax(1), self.log_probabilities[index].to(device),
                reduction="batchmean", log_target=True,
            ),
            F.mse_loss(*(F.layer_norm(x.float(), x.shape[-1:]) for x in (middle, target))),
        )  # fmt: skip
        loss = 0.5 * losses[0] + losses[1] + losses[2]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.model, step)
        return loss.item()


def mirror(patches: Tensor, columns: int) -> Tensor:
    """Return the patches of a photo that are at these places in its mirror image."""
    return patches // columns * columns + (columns - 1 - patches % columns)


def run_student(student: nn.Module, images: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Run a student on some of its patches; return the tokens in the middle, `(B, 1 + n, C)`, and logits `(B, K)`.

    The registers are not among the tokens.
    """
    x, rope = student._pos_embed(student.patch_embed(images))
    prefix, middle = student.num_prefix_tokens, None
    x, rope = torch.cat([x[:, :prefix], x[:, prefix:][:, patches]], 1), rope[patches]
    if torch.is_autocast_enabled(images.device.type):
        rope = rope.bfloat16()  # else queries and keys become float32
    for b, block in enumerate(student.blocks):
        x = block(x, rope=rope)
        if BLOCKS[b] == MIDDLE - 1:
            middle = torch.cat([x[:, :1], x[:, prefix:]], 1)
    return middle, student.forward_head(student.norm(x))


@torch.inference_mode()
def predict_photos(student: nn.Module, photos: Photos, device: str, workers: int) -> Tensor:
    """Predict the classes `(M,)` of photos."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        batches = DataLoader(photos, batch_size=64, num_workers=workers)
        return torch.cat([student.eval()(images.to(device)).argmax(1).cpu() for images, _ in batches])


def parse_options() -> argparse.Namespace:
    """Return the options of this script."""
    parser = options(__doc__.split("\n")[0], "vit_small_patch14_rope_caltech101", 2.6)
    parser.set_defaults(work=Path("train_rope"))
    parser.add_argument(
        "--teacher", type=Path, default=HERE / "vit_small_patch14_caltech101.safetensors", help="embedded classifier"
    )
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    add_classifier_options(parser, epochs=1, keep=0.375, batch=32)
    return parser.parse_args()


def build_student(args: argparse.Namespace, teacher: LoadedModel) -> nn.Module:
    """Return the student as `convert` sets it."""
    student = timm.create_model(ARCHITECTURE, **ARGUMENTS, img_size=teacher.size, num_classes=teacher.num_classes)
    student.to(args.device)
    convert(teacher.model, student)
    return student


def main() -> None:
    """Train and evaluate the classifier."""
    args = parse_options()
    classes, train, held_out = split(args.data)
    if args.evaluate:
        return evaluate(args.out, held_out, args.device, args.workers)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)

    teacher = load(None, args.teacher, args.device)
    colours = {name: teacher.model.pretrained_cfg[name] for name in ("mean", "std")}
    photos = Pixels(decode(train, teacher.size[0], args.work / "pixels.npy"), **colours)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16):
        tokens = encode(teacher.model, MIDDLE, photos, args.work / "tokens.npy", args.device, args.workers)
        log_probabilities = predict(teacher.model, tokens, args.work / "predictions.pth", args.device)
    labels, test_labels = (torch.tensor([label for _, label in items]) for items in (train, held_out))
    training = Distillation(build_student(args, teacher), args, photos, labels, tokens, log_probabilities)
    shown = Photos(held_out, teacher.transform)
    training.fit(lambda average: predict_photos(average, shown, args.device, args.workers), test_labels)
    arguments = ARGUMENTS | {"img_size": teacher.size[0], "num_classes": len(classes)}
    store(training.ema.module, args.out, arguments, architecture=ARCHITECTURE, class_names=json.dumps(classes))
    evaluate(args.out, held_out, args.device, args.workers)


if __name__ == "__main__":
    main()
