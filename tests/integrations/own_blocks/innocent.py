"""Models without any experts that have lists of MLPs, stacks of matrices, and layers whose width is the length of such a list."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import Gated, Ungated

N = 6


class Detector(nn.Module):
    """A box head and a class head for each decoder layer, DETR-like; the class head has as many rows as there are heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(N))
        self.class_embed = nn.ModuleList(nn.Linear(32, N) for _ in range(N))
        self.bbox_embed = nn.ModuleList(Ungated(32, 16) for _ in range(N))
        self.query = nn.Embedding(N, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes, classes = [], []
        for layer, head, box in zip(self.layers, self.class_embed, self.bbox_embed, strict=True):
            x = layer(x)
            classes.append(head(x))
            boxes.append(box(x))
        return torch.stack(boxes), torch.stack(classes)


class Depth(nn.Module):
    """N feed-forward layers one after the other, and a classifier of N classes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(Gated(32, 16) for _ in range(N))
        self.head = nn.Linear(32, N)

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + mlp(x)
        return self.head(x)


class Heads(nn.Module):
    """The mean of N MLP heads on one trunk, with a task embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(32, 32)
        self.task = nn.Parameter(torch.randn(N, 32))
        self.heads = nn.ModuleList(Ungated(32, 16) for _ in range(N))

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        out = torch.zeros_like(x)
        for i, head in enumerate(self.heads):
            out = out + head(x + self.task[i])
        return out / N


class Adapters(nn.Module):
    """One bottleneck adapter per language, of which the caller picks one; a language classifier beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({f"language_{i}": Ungated(32, 8) for i in range(N)})
        self.classifier = nn.Linear(32, N)
        self.active = "language_0"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.adapters[self.active](x), self.classifier(x)


class Positions(nn.Module):
    """3-D parameters: position embeddings, a class token, relative positions per head."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.randn(1, 9, 32))
        self.relative = nn.Parameter(torch.randn(N, 9, 9))
        self.projection = nn.Linear(32, N)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x[:, :8]], dim=1) + self.pos_embed
        return torch.einsum("bqn,nqk,bkh->bqh", self.projection(x).softmax(-1), self.relative.softmax(-1), x)


class PerHead(nn.Module):
    """Attention with a matrix per head for queries, keys and values, `[N,H,D]`, and out `[N,D,H]`."""

    def __init__(self) -> None:
        super().__init__()
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.randn(N, 32, 8) * 0.2) for _ in range(3))
        self.w_o = nn.Parameter(torch.randn(N, 8, 32) * 0.2)
        self.gate = nn.Linear(32, N)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsh,nhd->bnsd", x, w) for w in (self.w_q, self.w_k, self.w_v))
        y = F.scaled_dot_product_attention(q, k, v) * self.gate(x).sigmoid().mT.unsqueeze(-1)
        return torch.einsum("bnsd,ndh->bsh", y, self.w_o)


class LowRank(nn.Module):
    """Two stacks per head, in a module that is called with three tensors, beside a layer of N rows: a low-rank attention."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(torch.randn(N, 32, 8) * 0.2)
            self.up = nn.Parameter(torch.randn(N, 8, 32) * 0.2)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            left = torch.einsum("bsh,nhd->bnsd", q, self.down)
            right = torch.einsum("bsh,ndh->bnsd", k, self.up)
            return torch.einsum("bnqd,bnkd,bkh->bqh", left, right, v)

    def __init__(self) -> None:
        super().__init__()
        self.scores = self.Scores()
        self.slopes = nn.Linear(32, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x, x, x) * self.slopes(x).mean(-1, keepdim=True)


class Convolutions(nn.Module):
    """1-D convolutions have 3-D weights; a stack of them, with a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(32, 32, 3, padding=1) for _ in range(N))
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.recurrent = nn.GRU(32, 32, batch_first=True)
        self.out = nn.Linear(32, N)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + F.relu(conv(x.mT)).mT
        x = x + self.attention(x, x, x)[0]
        return self.out(self.recurrent(x)[0])


class Bilinear(nn.Module):
    """Two bilinear forms with N results, called with two tensors."""

    class Form(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(N, 32, 32) * 0.2)
            self.second = nn.Parameter(torch.randn(N, 32, 32) * 0.2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.einsum("bsi,nij,njk,bsk->bsn", x, self.first, self.second, y)

    def __init__(self) -> None:
        super().__init__()
        self.form = self.Form()
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.left(x)) + self.right(x)


MODELS = (Detector, Depth, Heads, Adapters, Positions, PerHead, LowRank, Convolutions, Bilinear)
