"""What the backends are tried on: one plain case, and each of its properties changed in turn."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

import torch

from bsa_export.sparsity.configs import MODES

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call of attention. `blocks` is the number of blocks in a row, of which the last lacks `short` tokens; `apart`
    is how large the keys of the masked tokens are, or, where none are masked, those of the second half."""

    pattern: str = "bigbird"
    block: int = 16
    blocks: int = 8
    short: int = 0
    head_dim: int = 64
    heads: int = 2
    batch: int = 2
    dtype: str = "fp16"
    padding: str = "none"
    attn_mask: str = "none"
    rpe: str = "none"
    strides: str = "contiguous"
    alike: bool = False
    apart: int = 0
    window: tuple[int, int] | None = None

    @property
    def seq(self) -> int:
        return self.block * self.blocks - self.short

    def __str__(self) -> str:
        """What differs from the plain case, for pytest's ids."""
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "plain"


def cases() -> list[Case]:
    plain = Case()
    padding = ("bool", "additive", "finite", "whole", "whole-finite")
    return [
        plain,
        *(replace(plain, pattern=p, heads=3, head_dim=32) for p in PATTERNS if p != plain.pattern),
        *(replace(plain, block=b, blocks=4, pattern=p) for b in (32, 64, 128) for p in ("fixed", "windowed")),
        *(replace(plain, head_dim=d) for d in (16, 32, 80, 96, 128)),
        *(replace(plain, dtype=t, pattern=p) for t in ("bf16", "fp32") for p in ("bigbird", "random")),
        *(replace(plain, dtype=t, block=b, blocks=4, head_dim=128) for t in ("bf16", "fp32") for b in (64, 128)),
        *(replace(plain, short=s, dtype=t) for s in (1, 15) for t in DTYPES),
        replace(plain, block=64, blocks=3, short=37, pattern="random"),
        replace(plain, block=128, blocks=2, short=65, pattern="all"),
        replace(plain, block=128, blocks=1, short=111, pattern="all"),
        replace(plain, padding="bool", short=5, block=32, blocks=5),
        *(replace(plain, padding=p, pattern=pattern) for p in padding for pattern in ("bigbird", "one")),
        replace(plain, padding="whole", dtype="bf16", block=64, blocks=3),
        *(replace(plain, padding=p, pattern="random", block=b) for p in ("left", "both") for b in (16, 32, 64, 128)),
        *(replace(plain, padding=p, pattern="all", short=9) for p in ("left", "both")),
        *(replace(plain, strides=s, heads=3, padding="bool") for s in STRIDES if s != plain.strides),
        replace(plain, strides="surrounded", short=7, block=32, blocks=3, dtype="bf16", padding="bool"),
        *(replace(plain, attn_mask=m, padding="bool") for m in ("bool", "additive")),
        *(replace(plain, rpe=r, padding="finite") for r in ("shared", "batch")),
        replace(plain, attn_mask="heads", rpe="heads", short=3, dtype="fp32", block=32, blocks=5),
        replace(plain, attn_mask="heads", rpe="heads", short=3, dtype="fp32", pattern="windowed"),
        replace(plain, padding="whole", short=5, pattern="windowed", strides="surrounded"),
        replace(plain, padding="finite", rpe="shared", pattern="dense"),
        *(replace(plain, alike=True, dtype=t, pattern="all", padding=p) for t in DTYPES for p in ("none", "bool")),
        replace(plain, alike=True, block=64, blocks=4, pattern="bigbird"),
        *(replace(plain, apart=a, dtype=t, pattern="all", padding="bool") for t in DTYPES for a in (3, 1000)),
        *(replace(plain, apart=3, block=b, blocks=n, pattern="halves") for b, n in ((16, 6), (64, 4), (128, 2))),
        *(replace(plain, apart=3, padding="finite", pattern=p) for p in ("all", "windowed")),
        *(replace(plain, window=w, dtype=t, pattern="all") for w in ((20, 20), (0, 3), (-1, 5)) for t in DTYPES),
        *(
            replace(plain, window=(70, 30), block=b, blocks=4, short=7, pattern=p)
            for b in (64, 128)
            for p in ("all", "random")
        ),
        *(replace(plain, window=(40, 10), padding=p, pattern="random", short=3) for p in padding),
        *(
            replace(plain, window=(20, 90), padding=p, pattern="all", block=b, blocks=5)
            for p in ("left", "both")
            for b in (32, 64)
        ),
        replace(plain, window=(9, 30), attn_mask="heads", rpe="heads", short=3, dtype="fp32"),
        replace(plain, window=(9, 30), attn_mask="bool", pattern="random"),
        *(replace(plain, window=(5, 5), pattern=p) for p in ("one", "windowed")),
        *(replace(plain, window=(64, r), alike=True, pattern="all", block=b) for r in (64, 0) for b in (16, 64)),
        replace(plain, batch=1, heads=1),
        replace(plain, batch=3, heads=4, pattern="variable", block=32),
    ]


MODE_OPTIONS = {
    "windowed": {"num_local_blocks": 3, "num_sliding_window_blocks": 3},
    "fixed": {"different_layout_per_head": True, "num_different_global_patterns": 2},
    "variable": {"num_random_blocks": 1, "local_window_blocks": [1, 2], "horizontal_global_attention": True},
    "bigbird": {"different_layout_per_head": True},
    "local": {"attention": "unidirectional"},
}
MODE_PATTERNS = ("windowed", "dense", "fixed", "variable", "bigbird", "bslongformer", "local")
PATTERNS = (*MODE_PATTERNS, "random", "one", "all", "halves", "shared")


def make_layout(case: Case, rng: random.Random) -> torch.Tensor:
    """uint8 `[heads or 1, blocks, blocks]`: a mode of sparsity.py, `random` (a third, and one a row at least), `one`
    random block a row, `all`, `halves` that do not see each other, or `shared` (random, one layout for all heads)."""
    if case.pattern in MODE_PATTERNS:
        options = MODE_OPTIONS.get(case.pattern, {})
        config = MODES[case.pattern](num_heads=case.heads, block=case.block, **options)
        return torch.from_numpy(config.make_layout(case.block * case.blocks, rng))
    heads = 1 if case.pattern == "shared" else case.heads
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = (heads, case.blocks, case.blocks)
    if case.pattern == "all":
        return torch.ones(shape, dtype=torch.uint8)
    if case.pattern == "halves":
        second = torch.arange(case.blocks) >= case.blocks // 2
        return (second[:, None] == second[None, :]).to(torch.uint8).repeat(heads, 1, 1)
    layout = torch.zeros(shape, dtype=torch.uint8)
    layout.scatter_(2, torch.randint(case.blocks, (heads, case.blocks, 1), generator=generator), 1)
    if case.pattern != "one":
        layout |= torch.rand(shape, generator=generator) < 1 / 3
    return layout


def _contiguous(x):
    return x.contiguous()


def _bert(x):
    """A view of `[batch, seq, heads, head_dim]`."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(x):
    """A view of `[batch, seq, 3, heads, head_dim]`, as one projection for q, k and v leaves it."""
    return x.transpose(1, 2)[:, :, None].repeat(1, 1, 3, 1, 1)[:, :, 1].transpose(1, 2)


def _columns(x):
    """A view of `[batch, heads, head_dim, seq]`: head_dim is not the contiguous dimension."""
    return x.mT.contiguous().mT


def _surrounded(x):
    """NaN before, behind and between the rows of every head."""
    batch, heads, seq, head_dim = x.shape
    room = x.new_full((batch + 2, heads + 2, seq + 32, head_dim + 16), float("nan"))
    view = room[1:-1, 1:-1, 16 : seq + 16, 8 : head_dim + 8]
    view.copy_(x)
    return view


STRIDES = {
    "contiguous": _contiguous,
    "bert": _bert,
    "packed": _packed,
    "columns": _columns,
    "surrounded": _surrounded,
}


def make_inputs(case: Case, seed: int, device: str) -> dict:
    """The arguments of `judge` for a case: normal random numbers, masks as the case says."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.heads, case.seq, case.head_dim)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    place = STRIDES[case.strides]
    names = ("query", "key", "value", "grad_output")
    made = {name: normal(*shape) for name in names}
    layout = make_layout(case, rng)
    padding = None if case.padding == "none" else _padding(case, rng)
    if case.alike or case.apart:
        # As in real models: small scores, and most of each key and value is what all tokens have in common.
        made["query"] *= 0.3
        for name in ("value",) if case.apart else ("key", "value"):
            made[name] = 0.3 * made[name] + normal(case.heads, 1, case.head_dim)
    if case.apart:
        far = torch.arange(case.seq) >= case.blocks // 2 * case.block
        if padding is not None:
            far = ~padding if padding.dtype == torch.bool else padding < -1000
        far = far.expand(case.batch, case.seq)[:, None, :, None]
        made["key"] = torch.where(far, case.apart * normal(case.heads, 1, case.head_dim).sign(), made["key"])
    inputs = {name: place(x.to(device, DTYPES[case.dtype])) for name, x in made.items()}
    inputs |= {"layout": layout.to(device), "block": case.block}
    if padding is not None:
        inputs["key_padding_mask"] = padding.to(device)
    seq = case.seq
    mask_shape = (case.batch, case.heads, seq, seq) if "heads" in (case.attn_mask, case.rpe) else (seq, seq)
    if case.window is not None:
        inputs["window"] = case.window
    if case.attn_mask != "none":
        kept = torch.rand(mask_shape, generator=generator) < 0.8
        inputs["attn_mask"] = (kept if case.attn_mask == "bool" else _added(kept)).to(device)
    if case.rpe != "none":
        rpe_shape = {"shared": (seq, seq), "batch": (case.batch, 1, seq, seq), "heads": (case.heads, seq, seq)}[
            case.rpe
        ]
        inputs["rpe"] = normal(*rpe_shape).to(device, DTYPES[case.dtype])
    return inputs


def within(seq: int, window: tuple[int, int], device: str | torch.device = "cpu") -> torch.Tensor:
    """bool `[seq, seq]`: which keys (columns) are in the window of a query (row), from the distance of the tokens."""
    at = torch.arange(seq, device=device)
    to_the_right = at[None, :] - at[:, None]
    inside = torch.ones(seq, seq, dtype=torch.bool, device=device)
    for side, distance in zip(window, (-to_the_right, to_the_right), strict=True):
        if side >= 0:
            inside &= distance <= side
    return inside


def _added(kept: torch.Tensor, removed: float = float("-inf")) -> torch.Tensor:
    return torch.zeros(kept.shape).masked_fill(~kept, removed)


def _padding(case: Case, rng: random.Random) -> torch.Tensor:
    """Every second sequence is padded by whole blocks and more: at its end, with `left` at its beginning, with `both`
    at both, with `whole` from its first token to its last. One hole is in the others, and in additive masks random
    numbers are elsewhere."""
    kept = torch.ones(case.batch, case.seq, dtype=torch.bool)
    kept[0::2, rng.randrange(case.seq)] = False
    padded = kept[1::2]
    if case.padding in ("left", "both"):
        padded[:, : rng.randrange(1, case.seq // 2)] = False
    if case.padding != "left":
        end = (
            rng.randrange(case.seq // 2, case.seq)
            if case.padding == "both"
            else rng.randrange(1, max(2, case.seq // 2))
        )
        padded[:, 0 if case.padding.startswith("whole") else end :] = False
    if case.padding in ("bool", "left", "both", "whole"):
        return kept
    if case.padding == "additive":
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        return _added(kept) + torch.randn(kept.shape, generator=generator)
    return _added(kept, -10000.0 if case.padding == "finite" else torch.finfo(torch.float32).min)
