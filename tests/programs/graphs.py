"""A program on graphs: batches are objects of a plain class with attributes, layers hold their own weight matrices."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from programs_harness import Program, Refused
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from groundwire import Fields


class Data:
    """A graph, or several ones side by side: node features, edges, a label for each graph."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def to(self, device, non_blocking=False):
        for key, value in list(vars(self).items()):
            if isinstance(value, torch.Tensor):
                setattr(self, key, value.to(device, non_blocking=non_blocking))
        return self

    @property
    def num_graphs(self):
        return len(self.y)


def graphs(rows, seed):
    """Rings of three to six nodes; the label is whether their features point up on average."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rows):
        nodes = int(torch.randint(3, 7, (), generator=generator))
        x = torch.randn(nodes, 5, generator=generator)
        ring = torch.arange(nodes)
        made.append(Data(x=x, edge_index=torch.stack([ring, ring.roll(1)]), y=(x.mean() > 0).long().reshape(1)))
    return made


def side_by_side(items):
    """One large graph; ``batch`` tells of which graph a node is."""
    starts = torch.tensor([0, *[len(g.x) for g in items]]).cumsum(0)
    return Data(
        x=torch.cat([g.x for g in items]),
        edge_index=torch.cat([g.edge_index + start for g, start in zip(items, starts, strict=False)], dim=1),
        y=torch.cat([g.y for g in items]),
        batch=torch.cat([torch.full((len(g.x),), i) for i, g in enumerate(items)]),
    )


class OwnLinear(nn.Module):
    """A linear layer of a library of its own: not torch's class, though its product."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class GraphConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.own, self.neighbours = OwnLinear(inputs, outputs), OwnLinear(inputs, outputs)

    def forward(self, x, edge_index):
        source, target = edge_index
        gathered = torch.zeros_like(x).index_add(0, target, x[source])
        return self.own(x) + self.neighbours(gathered)


class GraphClassifier(pl.LightningModule):
    """Features are normalised in the batch object itself, as transforms of graph libraries do."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = GraphConv(5, 12), GraphConv(12, 12)
        self.norm = nn.BatchNorm1d(12)
        self.head = OwnLinear(12, 2)
        self.accuracy = MulticlassAccuracy(2)

    def forward(self, data):
        x = F.relu(self.norm(self.conv1(data.x, data.edge_index)))
        x = F.relu(self.conv2(x, data.edge_index))
        sums = torch.zeros(data.num_graphs, 12).index_add(0, data.batch, x)
        return self.head(F.dropout(sums, 0.2, self.training))

    def training_step(self, data, batch_idx):
        data.x = 0.5 * data.x + 0.1
        loss = F.cross_entropy(self(data), data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs)
        return loss

    def validation_step(self, data, batch_idx):
        data.x = 0.5 * data.x + 0.1
        logits = self(data)
        self.accuracy(logits, data.y)
        self.log("val_acc", self.accuracy, batch_size=data.num_graphs)
        self.log("val_loss", F.cross_entropy(logits, data.y), batch_size=data.num_graphs)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=5e-4)


def graph_loaders():
    train = DataLoader(graphs(64, 1), 16, shuffle=True, collate_fn=side_by_side)
    return train, DataLoader(graphs(32, 2), 16, collate_fn=side_by_side)


PROGRAMS = {
    "graph classifier": Program(
        GraphClassifier,
        graph_loaders,
        fields=lambda data: Fields(data, data.y) if isinstance(data, Data) else None,
        groups=lambda data: torch.bincount(data.batch) > 4,
        plugins={
            "AOL": Refused("no Linear or convolution layer"),
            "FLEA": Refused("inputs of type Data are no numbers", "embed="),
        },
    ),
}
