"""What a key padding mask costs the fused kernel, on one GPU.

    python tests/benchmarks/key_masks.py [--length 4096] [--patterns windowed fixed] [--blocks 16 64]

Prints a table: milliseconds forward / backward without a mask; with one that masks nothing; with sequences padded to
different lengths, their padding removed or masked by an added number; with a tenth of all keys removed, anywhere; and
with the same texts packed, without padding. Each is compared with float64 on a part of the batch before it is timed.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from attention import OPTIONS, both_ways, tensors

from bsa_export.ops import block_sparse_attention, block_sparse_attention_varlen
from bsa_export.sparsity.configs import MODES
from bsa_export.verify.tolerance import judge

HEADS_CHECKED = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--patterns", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=32768, help="in the batch")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    return parser.parse_args()


def masks(batch: int, seq: int) -> tuple[dict[str, torch.Tensor | None], list[int]]:
    """Key padding masks by what they do, and the padded lengths: from all tokens down to an eighth of them."""
    lengths = [max(1, seq * (batch - i) // batch) for i in range(batch)]
    real = torch.arange(seq, device="cuda")[None] < torch.tensor(lengths, device="cuda")[:, None]
    some = torch.rand(batch, seq, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) < 0.9
    return {
        "no mask": None,
        "nothing masked": torch.zeros(batch, seq, device="cuda"),
        "padded": real,
        "padded, -10,000": torch.zeros(batch, seq, device="cuda").masked_fill(~real, -10000.0),
        "a tenth anywhere": some,
    }, lengths


def check(inputs, grad, layout, block, mask) -> None:
    """Raises AssertionError unless the last sequence is right, by the rule of `bsa_export.verify.tolerance`."""
    query, key, value, grad = (x[-1:, :HEADS_CHECKED] for x in (*inputs, grad))
    given = {"query": query, "key": key, "value": value, "grad_output": grad, "block": block}
    given |= {"layout": layout[:HEADS_CHECKED], "key_padding_mask": None if mask is None else mask[-1:]}
    for name, e in judge(partial(block_sparse_attention, backend="triton"), given).items():
        assert e.passed, f"wrong: {name} off by {e.largest:.2g}, plain PyTorch {e.plain_largest:.2g}, x {e.ratio:.1f}"


def main() -> None:
    args = arguments()
    *inputs, grad = tensors(args.length, args)
    by_name, lengths = masks(len(grad), args.length)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {args.length:,} tokens x {len(grad)}, {args.dtype}"
    )
    print(f"padded to {args.length:,} tokens: texts of {', '.join(map(str, lengths))}")
    print(
        "| pattern | block | " + " | ".join([*by_name, "in a row"]) + " |\n|" + "---|" * (len(by_name) + 3), flush=True
    )
    row = [x.transpose(1, 2).flatten(0, 1)[None, : sum(lengths)].transpose(1, 2) for x in (*inputs, grad)]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    for pattern in args.patterns:
        for block in args.blocks:
            config = MODES[pattern](args.heads, block=block, **OPTIONS[pattern](block))
            layout = torch.from_numpy(config.make_layout(args.length)).cuda()
            cells = []
            for mask in by_name.values():
                check(inputs, grad, layout, block, mask)
                ours = partial(
                    block_sparse_attention, layout=layout, block=block, key_padding_mask=mask, backend="triton"
                )
                cells.append(both_ways(ours, inputs, grad))
            texts = partial(
                block_sparse_attention_varlen, layout=layout, block=block, cu_seqlens=bounds, max_seqlen=args.length
            )
            cells.append(both_ways(texts, row[:3], row[3]))
            print(f"| {pattern} | {block} | " + " | ".join(f"{f:.3f} / {b:.3f}" for f, b in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
