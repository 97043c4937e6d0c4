"""Train a hand-written encoder with `BertSparseSelfAttention`, on this file: `python examples/own_model.py [STEPS]`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsa_export import BertSparseSelfAttention
from bsa_export.sparsity.configs import WindowedSparsityConfig

LENGTH, GAP = 1024, 256  # bytes in a text; the number that stands for a hidden byte


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        sparsity = WindowedSparsityConfig(num_heads=heads, block=32, num_local_blocks=4, num_sliding_window_blocks=5)
        config = SimpleNamespace(hidden_size=width, num_attention_heads=heads)
        self.attention = BertSparseSelfAttention(config, sparsity, max_seq_length=LENGTH)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.output(self.attention(self.norm(x)))  # [batch, seq, width]
        return x + self.mlp(x)


class Encoder(nn.Module):
    def __init__(self, width: int = 64, heads: int = 2, layers: int = 2):
        super().__init__()
        self.bytes = nn.Embedding(257, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # [batch, seq, 256]


def main(steps: int = 100) -> None:
    torch.manual_seed(0)
    source = torch.tensor(list(Path(__file__).read_bytes()))
    texts = source.unfold(0, LENGTH, LENGTH // 2)  # [texts, LENGTH], each half in the next one too
    model = Encoder()
    layout = model.layers[0].attention.sparse_self_attention.master_layout
    print(f"{LENGTH} bytes a text, {layout.float().mean():.1%} of the score blocks are computed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        hidden = torch.rand(texts.shape) < 0.15
        loss = F.cross_entropy(model(texts.masked_fill(hidden, GAP))[hidden], texts[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}: {loss.item():.3f} nats a hidden byte")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
