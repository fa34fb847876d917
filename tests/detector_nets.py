"""In: nothing. Out: small detectors whose decoders are part of the network, one of each kind that INT8 breaks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 16
PIXELS = 640.0
"""What the boxes are given in: the picture counts as scaled up to it."""


class Body(nn.Module):
    """Two convolutions: pictures of 16 to maps of 8 pixels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.body = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(F.relu(self.stem(x))))


def centres(side: int) -> Tensor:
    """Return (side * side, 2) centres of cells, in cells."""
    steps = torch.arange(side) + 0.5
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)


class Ssd(nn.Module):
    """Anchors, boxes decoded to pixels with an exponential, beside the scores in one Concat."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = Body()
        self.boxes = nn.Conv2d(16, 4, 3, padding=1)
        self.scores = nn.Conv2d(16, classes, 3, padding=1)
        self.register_buffer("anchors", centres(SIDE // 2) * PIXELS / (SIDE // 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        codes, scores = (head(x).flatten(2).transpose(1, 2) for head in (self.boxes, self.scores))
        centre, size = self.anchors + 8 * codes[..., :2], 32 * codes[..., 2:].exp()
        return torch.cat([centre - size / 2, centre + size / 2, scores.softmax(-1)], -1)


class Yolo(nn.Module):
    """Distances as expectations over 16 bins, boxes in pixels, in one Concat with the sigmoids of the classes."""

    def __init__(self, classes: int = 3, bins: int = 16) -> None:
        super().__init__()
        self.bins = bins
        self.features = Body()
        self.distances = nn.Conv2d(16, 4 * bins, 1)
        self.scores = nn.Conv2d(16, classes, 1)
        self.expected = nn.Conv2d(bins, 1, 1, bias=False)
        self.expected.weight.data[:] = torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1)
        self.register_buffer("cells", centres(SIDE // 2).T)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        bins = self.distances(x).flatten(2).unflatten(1, (4, self.bins)).transpose(1, 2).softmax(1)
        before, behind = self.expected(bins).squeeze(1).chunk(2, 1)
        low, high = self.cells - before, self.cells + behind
        boxes = torch.cat([(low + high) / 2, high - low], 1) * (PIXELS / (SIDE // 2))
        return torch.cat([boxes, self.scores(x).flatten(2).sigmoid()], 1)


class Detr(nn.Module):
    """The best cells by TopK become queries; one decoder layer samples the map around their boxes and refines them."""

    def __init__(self, classes: int = 3, width: int = 16, queries: int = 8) -> None:
        super().__init__()
        self.queries = queries
        self.features = Body(width)
        self.wide = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.narrow = nn.Conv2d(4 * width, width, 3, padding=1)
        self.first_scores, self.first_boxes = nn.Linear(width, classes), nn.Linear(width, 4)
        self.offsets, self.mix, self.norm = nn.Linear(width, 2), nn.Linear(width, width), nn.LayerNorm(width)
        self.scores, self.boxes = nn.Linear(width, classes), nn.Linear(width, 4)
        self.register_buffer("cells", torch.logit(centres(SIDE // 2) / (SIDE // 2)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = F.relu(self.narrow(F.relu(self.wide(self.features(x)))))
        tokens = maps.flatten(2).transpose(1, 2)
        codes = self.first_boxes(tokens) + torch.cat([self.cells, torch.zeros_like(self.cells)], -1)
        best = self.first_scores(tokens).amax(-1).topk(self.queries, 1).indices.unsqueeze(-1)
        query = tokens.gather(1, best.expand(-1, -1, tokens.shape[-1]))
        places = codes.gather(1, best.expand(-1, -1, 4)).sigmoid()
        grid = 2 * (places[..., :2] + 0.1 * self.offsets(query) * places[..., 2:]) - 1
        seen = F.grid_sample(maps, grid.unsqueeze(2), align_corners=False).squeeze(-1).transpose(1, 2)
        query = self.norm(query + self.mix(seen))
        before = torch.log(places.clamp(1e-5, 1) / (1 - places).clamp(1e-5, 1))
        return {"logits": self.scores(query), "boxes": (self.boxes(query) + before).sigmoid()}


class Centres(nn.Module):
    """Heat maps of centres, whose peaks a MaxPool leaves, and sizes as exponentials."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = Body()
        self.heat, self.size = nn.Conv2d(16, classes, 1), nn.Conv2d(16, 2, 1)
        self.heat.weight.data *= 20  # as in a trained one, most places are surely empty
        self.heat.bias.data -= 6

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.features(x)
        heat = self.heat(x).sigmoid()
        peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()
        return {"heat": peaks, "size": 16 * self.size(x).exp()}


class Masks(nn.Module):
    """A segmentation network: its logits are made larger, and decode nothing."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = Body()
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.features(x)), scale_factor=2.0, mode="bilinear")


class Gated(nn.Module):
    """Features without a classifier: a swish, a gate and an average follow the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Body()
        self.squeeze, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.silu(self.last(x)) * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x.mean((2, 3))
