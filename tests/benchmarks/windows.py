"""What a window of tokens costs the fused kernel, on one GPU: ModernBERT's local layers, next to other kernels.

    python tests/benchmarks/windows.py [--lengths 8192 32768]

Prints a row a length and kind of call: milliseconds forward, and forward and backward, with the layout alone and with a
window, and the ratio; then FlexAttention with the same window, and dense SDPA. The two calls that are compared take
turns, five each, and medians are shown. Results and gradients with the window are compared with float64 first.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median

import torch
from attention import _compiled_flex, both_ways, check, tensors
from torch.nn.functional import scaled_dot_product_attention

from bsa_export.ops import block_sparse_attention, block_sparse_attention_varlen

BLOCK = 64
BAND = 3  # blocks of a row that are kept
WINDOW = (64, 64)
TURNS = 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--tokens", type=int, default=65536, help="in the batch")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    return parser.parse_args()


def times(calls, inputs, grad) -> list[tuple[float, float]]:
    """Milliseconds forward, and forward and backward, of each of some calls, which take turns."""
    turns = [[both_ways(call, inputs, grad) for call in calls] for _ in range(TURNS)]
    return [(median(f for f, _ in of_call), median(f + b for f, b in of_call)) for of_call in zip(*turns, strict=True)]


def flex(seq: int):
    """FlexAttention with the window."""
    from torch.nn.attention.flex_attention import create_block_mask

    def kept(b, h, q, k):
        return (k >= q - WINDOW[0]) & (k <= q + WINDOW[1])

    mask = create_block_mask(kept, None, None, seq, seq, device="cuda")
    return partial(_compiled_flex(), block_mask=mask)


def shown(measure) -> str:
    """`1.23 / 4.56`, or why the call cannot be measured."""
    try:
        return "{:.3f} / {:.3f}".format(*measure()[0])
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def main() -> None:
    args = arguments()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}, window {WINDOW}, block {BLOCK}")
    print(
        "| tokens | call | layout alone | with the window | ratio | FlexAttention | dense SDPA |\n" + "|---" * 7 + "|"
    )
    for seq in args.lengths:
        *inputs, grad = tensors(seq, args)
        at = torch.arange(seq // BLOCK, device="cuda")
        layout = ((at[:, None] - at[None, :]).abs() <= BAND // 2).to(torch.uint8)[None]
        given = {"layout": layout, "block": BLOCK, "backend": "triton"}
        batch = partial(block_sparse_attention, **given)
        check(partial(batch, window=WINDOW), inputs, grad, layout, BLOCK, window=WINDOW)
        bounds = torch.arange(len(grad) + 1, device="cuda", dtype=torch.int32) * seq
        packed = partial(block_sparse_attention_varlen, **given, cu_seqlens=bounds, max_seqlen=seq)
        flat = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (*inputs, grad)]
        for name, call, (*its_inputs, its_grad) in (("batch", batch, (*inputs, grad)), ("packed", packed, flat)):
            alone, window = times([call, partial(call, window=WINDOW)], its_inputs, its_grad)
            peers = ["", ""]
            if name == "batch":
                peers = [
                    shown(lambda inputs=inputs, grad=grad, seq=seq: times([flex(seq)], inputs, grad)),
                    shown(lambda inputs=inputs, grad=grad: times([scaled_dot_product_attention], inputs, grad)),
                ]
            ratios = " / ".join(f"{w / a:.2f}" for w, a in zip(window, alone, strict=True))
            figures = [f"{f:.3f} / {b:.3f}" for f, b in (alone, window)]
            print(f"| {seq:,} | {name} | {' | '.join([*figures, ratios, *peers])} |", flush=True)


if __name__ == "__main__":
    main()
