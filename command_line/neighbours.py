"""Neighbours of the photos in a memory bank: the search, what the manifest says of them, and a picture."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from command_line.names import drawn_name, short
from daam_vit.fonts import write
from memorybank import MemoryBank, Vote
from models.images import read_image, resize_longest_side

SCORES = ("importance", "log_odds")
"""What a bank explains of a class: Eqs. 7 and 8 of the paper, or `MemoryBank.log_odds`."""


class NeighbourSearch:
    """Search a bank for the neighbours of a batch: their votes, the classes to explain, and the importance for each.

        search = NeighbourSearch(bank, targets)
        flow = attention_flow(model, images, importance=search.importance)
        search.classes, search.vote

    The flow asks for the importance, and the search finds classes and votes on the way, so it reads the bank once.
    "log_odds" reads it once more for each class.
    """

    vote: Vote
    """Vote of the k nearest neighbours on the class."""
    searched: Vote
    """Vote of all neighbours that were searched; more than `vote` if classes were named."""
    classes: Tensor
    """`(B, K)` int64: the classes to explain. If fewer than K classes have votes, the first one fills the row."""

    def __init__(
        self,
        bank: MemoryBank,
        targets: list[int] | int,
        k: int = 20,
        temperature: float = 0.07,
        target_k: int = 200,
        score: str = "importance",
    ):
        """Prepare a search.

        Args:
            bank: the memory bank.
            targets: from `find_targets`: class indices, or N for the N classes with the most votes.
            k: number of neighbours that vote.
            temperature: temperature of the votes.
            target_k: number of neighbours that are searched for the classes in `targets`. With "importance", each of
                them must have one there; with "log_odds", all rows of the bank vote, so one anywhere is enough.
            score: what is explained of a class, one of `SCORES`.
        """
        self.bank, self.targets, self.k, self.temperature, self.target_k = bank, targets, k, temperature, target_k
        self.score = score

    @property
    def by_name(self) -> bool:
        """Return whether classes were named, as opposed to those with the most votes."""
        return not isinstance(self.targets, int)

    def importance(self, features: Tensor) -> Tensor:
        """Return what is sent back from features `(B, D)` for the classes to explain: `(B, K, D)`."""
        bank = self.bank
        count = min(max(self.k, self.target_k), len(bank.labels)) if self.by_name else self.k
        similarities, rows = bank.nearest(features, count)
        self.vote = bank.vote(similarities[:, : self.k], rows[:, : self.k], self.temperature)
        self.searched = bank.vote(similarities, rows, self.temperature)
        if self.by_name:
            self.classes = torch.tensor(self.targets).expand(len(features), -1)
        else:
            votes, classes = self.vote.votes.topk(self.targets)
            self.classes = torch.where(votes > 0, classes, classes[:, :1])
        return torch.stack([self._importance_of(features, c) for c in self.classes.unbind(1)], 1)

    def _importance_of(self, features: Tensor, classes: Tensor) -> Tensor:
        """Return what is sent back from features for one class each, `(B,)`: `(B, D)`."""
        if self.score == "log_odds":
            return self.bank.log_odds(features, temperature=self.temperature, target=classes)
        return self.bank.importance_of(features, self.searched, classes)

    def votes(self, features: Tensor) -> Tensor:
        """Return the votes on the features of every block, `(B, L, D)` -> `(B, L, num_classes)`."""
        votes = self.bank.classify(features.flatten(0, 1), self.k, self.temperature).votes
        return votes.unflatten(0, features.shape[:2])


def describe_neighbours(bank: MemoryBank, vote: Vote, index: int) -> list[dict]:
    """Return what flow.json lists for each neighbour of one image.

    Returns:
        `row` in the bank, `index` and `name` of the class, `similarity` and, if the bank knows it, the `file`.
    """
    rows = zip(vote.neighbours[index].tolist(), vote.labels[index].tolist(), vote.similarities[index].tolist())
    return [
        {"row": row, "index": label, "name": bank.class_name(label), "similarity": similarity}
        | ({"file": str(bank.file(row))} if bank.files else {})
        for row, label, similarity in rows
    ]


def draw_neighbours(
    photo: Image.Image,
    headline: str,
    neighbours: list[dict],
    explained: list[int],
    columns: int = 5,
    max_count: int = 40,
) -> Image.Image:
    """Draw a photo beside its neighbours.

    Args:
        photo: the photo.
        headline: text above it.
        neighbours: from `describe_neighbours`; a neighbour without a readable file is drawn as its name.
        explained: classes whose neighbours have a green frame.
        columns: number of neighbours in a row.
        max_count: largest number of neighbours that are drawn.
    """
    side, gap, line, left = 150, 10, 22, 320
    neighbours = neighbours[:max_count]
    rows = -(-len(neighbours) // columns)
    query = resize_longest_side(photo, left, Image.Resampling.LANCZOS)
    top = 2 * gap + line
    height = top + max(query.height + gap, rows * (side + line + gap))
    page = Image.new("RGB", (left + columns * (side + gap) + 2 * gap, height), "white")
    draw = ImageDraw.Draw(page)
    write(draw, (gap, gap), headline, 17, max_width=page.width - 2 * gap)
    page.paste(query, (gap, top))
    for i, neighbour in enumerate(neighbours):
        x = left + 2 * gap + i % columns * (side + gap)
        y = top + i // columns * (side + line + gap)
        page.paste(_tile(neighbour, side), (x, y))
        colour = "limegreen" if neighbour["index"] in explained else "silver"
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=colour, width=3)
        write(draw, (x, y + side + 3), _label(neighbour), 14, max_width=side - 40)
        write(draw, (x + side, y + side + 3), f"{neighbour['similarity']:.2f}", 14, anchor="ra")
    return page


def _label(neighbour: dict) -> str:
    """Return the name of the class as it is drawn."""
    return drawn_name(short(neighbour["name"]), neighbour["index"])


def _tile(neighbour: dict, side: int) -> Image.Image:
    tile = Image.new("RGB", (side, side), "whitesmoke")
    try:
        picture = resize_longest_side(read_image(neighbour.get("file", "")), side, Image.Resampling.LANCZOS)
        tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    except ValueError:  # the file is unknown, or no longer there
        write(ImageDraw.Draw(tile), (side / 2, side / 2), _label(neighbour), 14, anchor="mm", max_width=side - 12)
    return tile
