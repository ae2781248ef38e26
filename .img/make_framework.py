"""Draw FrameworkDAAM.png: the method from the photo to the attention flow.

    python .img/make_framework.py [--image PATH] [--out PATH]

All pictures come from one run, which explains the predicted class of the photo with the embedded model. The figure
shows the inside of one block, by default the one that adds most to the flow; this is derived here a second time, with
plain attention and hooks, and must agree with `daam_core`. Only the picture of the memory bank is a symbol.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import models  # noqa: E402
from daam_core import attention_flow, block_labels, overlay, render  # noqa: E402
from daam_vit.files import atomic_write  # noqa: E402
from models.images import read_image  # noqa: E402

WIDTH, HEIGHT = 2000, 1065  # pixels; y points down
INK, GREY, LINE, NONE, PANEL = "#1f2933", "#5f6c7b", "#8a97a6", "#cfd4dc", "#f4f6f8"
CLASS, ATTENTION, SEMANTIC, IMPORTANCE, TINT, FLOW = "#e07b00", "#00857c", "#2563c9", "#8e3bbd", "#faf5fd", "#c8102e"


def look_inside(model, x, b, target):
    """Return a_b `(N,)`, averaged over heads, S_b `(N, C)` and C_b `(C,)` of block b for one image."""
    attn, seen = model.blocks[b].attn, {}
    attn.fused_attn = False  # then the softmax passes through attn_drop
    hooks = [
        attn.qkv.register_forward_hook(lambda m, args, out: seen.update(qkv=out)),
        attn.attn_drop.register_forward_hook(lambda m, args, out: seen.update(attention=out)),
        attn.proj.register_forward_pre_hook(lambda m, args: seen.update(tokens=args[0])),
    ]
    score = model(x)[0, target]
    for hook in hooks:
        hook.remove()
    importance = torch.autograd.grad(score, seen["tokens"])[0][0, 0]  # (C,)
    a = seen["attention"][0, :, 0].detach().T  # (N, H)
    v = seen["qkv"].detach().view(len(a), 3, attn.num_heads, -1)[:, 2]  # (N, H, d)
    return a.mean(1), (a[..., None] * v).flatten(1), importance


class Canvas:
    """White page; lengths are in pixels, and y points down."""

    def __init__(self):
        self.figure = Figure((WIDTH / 100, HEIGHT / 100), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")

    def text(self, x, y, text, size=22, colour=INK, ha="center", **style):
        """Write a line of text; `size` is its height."""
        self.axes.text(x, y, text, fontsize=0.72 * size, color=colour, ha=ha, va="center", **style)

    def heading(self, number, x, y, text, colour):
        """Write the heading of a step, with its number in a circle."""
        self.axes.plot(x + 17, y, "o", markersize=24, color=colour, zorder=3)
        self.text(x + 17, y + 1, str(number), 23, "white", weight="bold")
        self.text(x + 44, y, text, 25, colour, "left", weight="bold")

    def box(self, x, y, w, h, edge, face, rounding=12):
        """Draw a box with round corners."""
        style = f"round,pad=0,rounding_size={rounding}"
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, style, edgecolor=edge, facecolor=face, linewidth=1.8))

    def bars(self, x, y, w, heights, width, colours):
        """Draw bars that stand on y, spread over the width w."""
        self.axes.vlines(np.linspace(x, x + w, len(heights)), y, y - np.asarray(heights), colours, linewidth=width)

    def arrow(self, start, end, colour=LINE, **style):
        """Draw an arrow."""
        style = {"arrowstyle": "-|>", "mutation_scale": 22, "linewidth": 3.2, "shrinkA": 0, "shrinkB": 0} | style
        self.axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))

    def picture(self, x, y, side, values, colour, **style):
        """Draw a square picture with a frame."""
        self.axes.imshow(values, extent=(x, x + side, y + side, y), aspect="auto", zorder=2, **style)
        self.axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=colour, linewidth=1.6, zorder=2))

    def save(self, path):
        """Save the page as a PNG with fewer colours, which is a third smaller and looks the same."""
        self.axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        coarse = (np.rint(pixels / 3) * 3).astype(np.uint8)
        with atomic_write(path) as part:
            Image.fromarray(coarse).save(part, "PNG", optimize=True)


def ramp(colour):
    """Return a colour map from white to a colour."""
    return LinearSegmentedColormap.from_list("", ["white", colour])


def draw(photo, loaded, b):
    """Draw the whole figure for the predicted class of a photo; b counts from 0, None: the block that adds most."""
    page, x = Canvas(), loaded.transform(photo).unsqueeze(0)
    flow = attention_flow(loaded.model, x)
    blocks, (h, w), target = flow.block_maps.shape[1], flow.block_maps.shape[2:], flow.target.item()
    b = flow.block_maps[0].sum((1, 2)).argmax().item() if b is None else b
    a, S, C = look_inside(loaded.model, x, b, target)
    prefix = loaded.model.num_prefix_tokens
    again = (S @ C.relu()).relu()[prefix:].view(h, w)
    torch.testing.assert_close(again, flow.block_maps[0, b], rtol=1e-3, atol=1e-5)
    photo = photo.resize((420, 420), Image.Resampling.BICUBIC)
    heat = render(flow.accumulated[0])

    page.text(30, 36, "Dynamic Accumulated Attention Map (DAAM)", 36, INK, "left", weight="bold")
    page.text(970, 39, "how a Vision Transformer reaches its decision, block by block", 25, GREY, "left")
    draw_tokens(page, photo, h, w)
    draw_block(page, a[prefix:].view(h, w), S[prefix:].unflatten(0, (h, w)), C, b, blocks)
    draw_importance(page, flow.output[0], loaded.class_names[target], C)
    draw_block_map(page, flow.block_maps[0, b])
    draw_accumulation(page, flow.block_maps[0], overlay(photo, heat), b)
    draw_flow(page, overlay(photo, heat, block_labels(blocks)), blocks)
    return page


def draw_tokens(page, photo, h, w):
    """Draw the image and its tokens."""
    page.text(135, 122, "image", 25, INK, weight="bold")
    page.text(135, 160, f"{h} × {w} patches", 22, GREY)
    page.picture(30, 190, 210, photo, INK)
    page.axes.vlines(np.linspace(30, 240, w + 1)[1:-1], 190, 400, "white", linewidth=0.5, zorder=3)
    page.axes.hlines(np.linspace(190, 400, h + 1)[1:-1], 30, 240, "white", linewidth=0.5, zorder=3)
    page.arrow((248, 295), (282, 295))
    page.text(313, 122, "tokens", 25, INK, weight="bold")
    page.box(291, 144, 44, 44, CLASS, CLASS)
    for i, patch in enumerate((3, 5, 7, 9)):  # along the diagonal
        crop = photo.crop([round(420 * edge / 16) for edge in (patch, patch, patch + 1, patch + 1)])
        page.picture(291, 200 + 54 * i, 44, crop, GREY)
    page.text(313, 434, "⋮", 30, GREY)
    page.box(34, 420, 22, 22, CLASS, CLASS, rounding=5)
    page.text(68, 431, "class token", 23, CLASS, "left")
    page.arrow((343, 295), (384, 295))


def draw_block(page, a, S, C, b, blocks):
    """Draw attention row `(h, w)` and decomposition `(h, w, C)` of block b."""
    for shift in (18, 9, 0):
        page.box(390 + shift, 92 - shift, 630, 382, LINE, PANEL)
    page.heading(1, 410, 124, "attention row", ATTENTION)
    page.text(545, 162, r"$a_b=\mathrm{softmax}(q_{\mathrm{cls}}K^{\top}\!/\sqrt{d}\,)$", 25, ATTENTION)
    page.picture(440, 190, 200, a, ATTENTION, cmap=ramp(ATTENTION))
    page.text(540, 415, "of the class token", 22, CLASS)
    page.arrow((656, 290), (758, 290), SEMANTIC)
    page.text(704, 262, r"$\times\,V_b$", 28, SEMANTIC)
    page.heading(2, 730, 124, "decomposition", SEMANTIC)
    page.text(873, 162, r"$S_b[j]=a_b[j]\;V_b[j]$", 27, SEMANTIC)
    for i, c in enumerate((S.sum((0, 1)) * C.relu()).topk(4).indices):
        channel = S[..., c]
        limit = 0.8 * channel.abs().max()
        corner = 772 + 104 * (i % 2), 190 + 104 * (i // 2)
        page.picture(*corner, 97, channel, SEMANTIC, cmap="RdBu", vmin=-limit, vmax=limit)
    page.text(873, 415, f"4 of {len(C)} channels", 22, GREY)
    page.text(410, 449, f"block b = {b + 1} of {blocks}", 24, INK, "left", weight="bold")
    page.text(873, 449, r"$T_b=\Sigma_j\,S_b[j]$", 26, SEMANTIC)


def draw_importance(page, output, class_name, C):
    """Draw the two origins of the importance coefficients C `(C,)`: class scores and memory bank."""
    for y, name, kind, origin, weight in (
        (494, "class score", "supervised", rf"$Y$ = score of “{class_name}”", r"$w=\mathrm{ReLU}$"),
        (602, "memory bank", "self-supervised", r"$Y=p\cdot f$, $p$ from nearest neighbours", r"$w=\mathrm{identity}$"),
    ):
        page.box(30, y, 800, 96, IMPORTANCE, TINT)
        page.text(50, y + 28, name, 25, IMPORTANCE, "left", weight="bold")
        page.text(258, y + 29, kind, 22, GREY, "left")
        page.text(50, y + 67, origin, 25, INK, "left")
        page.text(735, y + 48, weight, 27, IMPORTANCE)
        page.arrow((838, y + 48), (886, 582 if y < 600 else 616), IMPORTANCE)
    scores = (output - output.min()).topk(6).values
    page.bars(551, 578, 75, 70 * scores / scores[0], 8, [IMPORTANCE] + [NONE] * 5)
    for row, column in np.ndindex(5, 6):  # two of the stored features are near
        colour = IMPORTANCE if row in (1, 3) else NONE
        page.box(545 + 15 * column, 615 + 15 * row, 11, 10, colour, colour, rounding=2)
    page.heading(3, 900, 518, "importance", IMPORTANCE)
    page.text(910, 558, r"$C_b=\partial Y/\partial T_b$", 27, IMPORTANCE, "left")
    page.bars(900, 626, 420, 46 * C / C.abs().max(), 0.9, np.where(C > 0, IMPORTANCE, LINE))
    page.text(1110, 692, f"{len(C)} channels; grey: negative", 22, GREY)
    page.arrow((1124, 492), (1124, 326), IMPORTANCE)


def draw_block_map(page, block_map):
    """Draw the map of the block, `(h, w)`."""
    page.arrow((1040, 290), (1088, 290), SEMANTIC)
    page.axes.plot(1124, 290, "o", markersize=45, color="white", markeredgecolor=INK, markeredgewidth=1.8)
    page.text(1124, 289, r"$\Sigma_c$", 30)
    page.arrow((1160, 290), (1226, 290), FLOW)
    page.heading(4, 1232, 124, "map of the block", FLOW)
    page.text(1337, 162, r"$L_b=\mathrm{ReLU}\left(\Sigma_c\,w(C_b)_c\,S_b[\cdot,c]\right)$", 27, FLOW)
    page.picture(1234, 190, 206, block_map, FLOW, cmap=ramp(FLOW))


def draw_accumulation(page, block_maps, frames, b):
    """Draw the maps of all blocks `(L, h, w)`, and the frames of their running sum; block b stands out."""
    blocks = len(block_maps)
    pitch, small, large, slim = 1940 / blocks, 88, 134, {"mutation_scale": 16, "linewidth": 2.5}
    down = 30 + pitch * (b + 0.5)
    left = 30 if down > 600 else 1380  # out of the way of the arrow
    page.heading(5, left, 738, "accumulation", FLOW)
    page.text(left + 260, 739, r"$A_b=L_1+\cdots+L_b$", 27, FLOW, "left")
    for i in range(blocks):
        centre, edge = 30 + pitch * (i + 0.5), FLOW if i == b else GREY
        page.picture(centre - small / 2, 768, small, block_maps[i], edge, cmap=ramp(FLOW))
        page.text(centre - small / 2 - 20, 812, f"$L_{{{i + 1}}}$", 25, FLOW)
        page.text(centre + 20, 871, "+", 24)
        page.arrow((centre, 860), (centre, 886), **slim)
        page.picture(centre - large / 2, 889, large, frames[i], edge)
        page.text(centre, 1043, f"$A_{{{i + 1}}}$", 26, FLOW)
        if i:
            page.arrow((centre - pitch + large / 2 + 3, 956), (centre - large / 2 - 3, 956), **slim)
    page.axes.plot([1337, 1337, down, down], [400, 738, 738, 750], color=FLOW, linewidth=3.2)
    page.arrow((down, 745), (down, 765), FLOW)


def draw_flow(page, frames, blocks):
    """Draw the last frames of the GIF."""
    page.heading(6, 1550, 124, "attention flow (GIF)", FLOW)
    for shift, frame in zip((28, 14, 0), frames[-3:]):
        page.picture(1550 + shift, 190 - shift, 390, frame, FLOW)
    page.text(1550, 618, r"frame $b$ shows $A_b$;", 24, GREY, "left")
    page.text(1550, 652, f"$A_{{{blocks}}}$ is the explanation", 24, GREY, "left")
    page.arrow((1945, 887), (1945, 590), FLOW)


def main():
    """Draw the figure and save it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image", default=HERE / "coffee.png", help="photo to explain (default: coffee.png)")
    parser.add_argument("--out", type=Path, default=HERE / "FrameworkDAAM.png", help="default: next to this script")
    parser.add_argument("--block", type=int, help="the block to show, from 1 (default: the one that adds most)")
    parser.add_argument("--checkpoint", type=Path, help="draw with these weights instead of the embedded ones")
    args = parser.parse_args()

    loaded = models.load(None if args.checkpoint else "vit_small_patch14_caltech101", checkpoint=args.checkpoint)
    with rc_context({"mathtext.fontset": "stix"}):
        draw(read_image(args.image), loaded, args.block and args.block - 1).save(args.out)


if __name__ == "__main__":
    main()
