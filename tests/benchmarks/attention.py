"""Attention on one GPU: the fused kernel next to DeepSpeed's kernels, FlexAttention and SDPA, forward and backward.

    python tests/benchmarks/attention.py [--lengths 4096 16384] [--patterns windowed fixed] [--blocks 64]

Prints a table for each length: pattern, block, density, milliseconds and TFLOP/s on kept blocks (`4 * batch * heads *
seq^2 * head_dim * density` forward, 2.5 times that backward), and how far each goal is met; then some rows in other
dtypes and head dims. Times are the GPU's, medians of CUDA graph replays; the CPU's time for a call is below. Each
result and its gradients are first compared with float64 on some query rows, and not timed if they are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from functools import partial

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bsa_export.ops import backends, block_sparse_attention
from bsa_export.sparsity.configs import MODES
from bsa_export.verify.tolerance import errors

# The windows of a model that read 512 tokens; elsewhere what shared measurements of DeepSpeed's patterns use.
OPTIONS = {
    "windowed": lambda block: {"num_local_blocks": 512 // block, "num_sliding_window_blocks": 512 // block + 1},
    "fixed": lambda block: {"num_local_blocks": 4, "num_global_blocks": 1},
    "bigbird": lambda block: {"num_random_blocks": 3, "num_sliding_window_blocks": 3, "num_global_blocks": 2},
    "bslongformer": lambda block: {"num_sliding_window_blocks": 7, "global_block_indices": [0]},
    "local": lambda block: {"num_sliding_window_blocks": 512 // block + 1},
}
COPIED = 3.0e12  # bytes a second, an H100's memory
CHECKED_ROWS = 256
NAMES = ("output", "query", "key", "value")
FEWEST_BLOCKS = 8  # in a row

# Beside the tables: (dtype, head_dim) of rows at this length, in these patterns and blocks.
FURTHER = [("bfloat16", 64), ("bfloat16", 128), ("float16", 32), ("float16", 128)]
FURTHER_AT = {"lengths": [4096], "patterns": ["windowed", "bigbird"], "blocks": [16, 64, 128], "peers_at": []}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--patterns", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--tokens", type=int, default=32768, help="in the batch, or one sequence if that is longer")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument(
        "--peers-at", type=int, nargs="*", default=[4096], help="lengths at which DeepSpeed and FlexAttention run too"
    )
    parser.add_argument("--peer-blocks", type=int, nargs="*", default=[16, 64, 128])
    parser.add_argument("--no-further", action="store_true", help="no rows in other dtypes and head dims")
    return parser.parse_args()


def measured(call) -> float:
    """Milliseconds of a call on the GPU, the median of CUDA graph replays, without Python's time; negative
    where a call cannot be captured and was timed with events."""
    try:
        return triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median")
    except RuntimeError:
        torch.cuda.synchronize()
        return -triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")


def both_ways(attention, inputs, grad) -> tuple[float, float]:
    """Milliseconds forward, and of a step forward and back less those."""
    with torch.no_grad():
        forward = measured(lambda: attention(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    whole = measured(lambda: torch.autograd.grad(attention(*leaves), leaves, grad))
    return abs(forward), abs(whole) - abs(forward)


def host_microseconds(attention, inputs, grad) -> tuple[float, float]:
    """What a call costs the CPU, forward and a step forward and back."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    times = []
    for call in (
        lambda: attention(*inputs),
        lambda: torch.autograd.grad(attention(*leaves), leaves, grad),
    ):
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(50):
            call()
        times.append((time.perf_counter() - started) / 50 * 1e6)
        torch.cuda.synchronize()
    return times[0], times[1]


@contextlib.contextmanager
def _packed():
    from bsa_export.ops import deepspeed_backend

    with deepspeed_backend.packed_tables():
        yield


def flex(layout: torch.Tensor, block: int, seq: int):
    """Compiled FlexAttention under the layout, its BlockMask built once; units of 16 need one compilation for all."""
    from torch.nn.attention.flex_attention import create_block_mask

    units = layout.bool().repeat_interleave(block // 16, 1).repeat_interleave(block // 16, 2)

    def kept(b, h, q, k):
        return units[h, q // 16, k // 16]

    mask = create_block_mask(kept, None, layout.shape[0], seq, seq, device="cuda", BLOCK_SIZE=128)
    return partial(_compiled_flex(), block_mask=mask)


_flex = None


def _compiled_flex():
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _flex = torch.compile(flex_attention, dynamic=False)
    return _flex


def dense(q, k, v, grad, kept, dtype, in_half=False) -> dict[str, torch.Tensor]:
    """Plain attention of some rows and its gradients in `dtype`; the softmax in float32 at least, or `in_half`.

    Args:
        q, grad: `[heads, rows, head_dim]`.
        k, v: `[heads, seq, head_dim]`.
        kept: bool `[heads, rows, seq]`.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    scores = (leaves[0] @ leaves[1].mT) * q.shape[-1] ** -0.5
    scores = scores.to(dtype if in_half else torch.promote_types(dtype, torch.float32))
    out = scores.masked_fill(~kept, float("-inf")).softmax(-1).to(dtype) @ leaves[2]
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))), strict=True))


def check(attention, inputs, grad, layout, block, in_half=False, window=None) -> None:
    """Raises AssertionError unless result and gradients are right by the rule of `verify.tolerance`, where the
    gradient of the result is that of some rows and 0 elsewhere: rows of the first, the middle and the last block, and
        others. `window` is (left, right), in tokens."""
    batch, heads, seq, _ = inputs[0].shape
    part = CHECKED_ROWS // 4
    rows = [torch.arange(start, min(start + part, seq)) for start in (0, seq // 2, max(0, seq - part))]
    rows = torch.cat([*rows, torch.randperm(seq, generator=torch.Generator().manual_seed(0))[:part]]).unique()
    rows = rows.to(grad.device)
    kept = layout.bool().expand(heads, -1, -1)[:, rows // block].repeat_interleave(block, 2)[:, :, :seq]
    if window is not None:
        to_the_right = torch.arange(seq, device=rows.device) - rows[:, None]
        kept = kept & (to_the_right >= -window[0]) & (to_the_right <= window[1])

    some = torch.zeros_like(grad)
    some[-1:, :, rows] = grad[-1:, :, rows]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    found = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, some)), strict=True))
    others = torch.ones(batch, seq, dtype=torch.bool, device=rows.device)
    others[-1, rows] = False
    assert not (found["query"].abs().amax((1, 3)) * others).any(), "wrong: a row without a gradient gets one"
    actual = {name: x[-1][:, rows] if name in ("output", "query") else x[-1] for name, x in found.items()}

    given = inputs[0][-1][:, rows], inputs[1][-1], inputs[2][-1], grad[-1][:, rows], kept
    exact, plain = dense(*given, torch.float64), dense(*given, inputs[0].dtype, in_half)
    for name in NAMES:
        e = errors(actual[name], plain[name], exact[name])
        assert e.passed, f"wrong: {name} off by {e.largest:.2g}, plain PyTorch {e.plain_largest:.2g}, x {e.ratio:.1f}"


def tensors(seq: int, args) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the result, `[batch, heads, seq, head_dim]`, as views of BERT's order."""
    shape = (max(1, args.tokens // seq), seq, args.heads, args.head_dim)
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, args.dtype)
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype).transpose(1, 2) for _ in range(4)]


def main() -> None:
    args = arguments()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {args.heads} heads")
    print("backends:", ", ".join(f"{name} {reason or 'yes'}" for name, reason in backends().items()), flush=True)
    for seq in args.lengths:
        table(seq, args)
    if not args.no_further:
        for dtype, head_dim in FURTHER:
            others = argparse.Namespace(**vars(args) | FURTHER_AT | {"dtype": dtype, "head_dim": head_dim})
            for seq in others.lengths:
                table(seq, others)
    layout = torch.ones(args.heads, 1024 // 64, 1024 // 64, dtype=torch.uint8, device="cuda")
    *inputs, grad = (x[:1] for x in tensors(1024, args))
    ours = partial(block_sparse_attention, layout=layout, block=64, backend="triton")
    figures = host_microseconds(ours, inputs, grad)
    print(f"\nCPU time of a call: forward {figures[0]:.0f} us, step forward and back {figures[1]:.0f} us")


def table(seq: int, args) -> None:
    """Measures dense attention at a length, then prints a row for each pattern and block."""
    *inputs, grad = tensors(seq, args)
    batch = len(grad)
    work = 4 * batch * args.heads * seq**2 * args.head_dim / 1e9
    print(f"\n{seq:,} tokens x {batch}, {args.dtype}, head_dim {args.head_dim}; dense SDPA, ms and TFLOP/s, ", end="")
    print("forward / backward:", end=" ")
    best = None
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                times = both_ways(scaled_dot_product_attention, inputs, grad)
        except RuntimeError as error:
            print(f"{backend.name} cannot: {str(error).splitlines()[0]}", end="; ")
            continue
        rates = work / times[0], 2.5 * work / times[1]
        print(f"{backend.name} {times[0]:.2f} / {times[1]:.2f} ({rates[0]:.0f} / {rates[1]:.0f})", end="; ")
        if best is None or rates[0] > best[0]:
            best = rates
    print(
        "\n| pattern | block | density | ms forward | backward | TFLOP/s forward | backward | of dense | floor "
        "| DeepSpeed | FlexAttention |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.patterns:
        for block in args.blocks:
            if seq // block >= FEWEST_BLOCKS:
                row(name, block, seq, args, inputs, grad, work, best)


def row(name, block, seq, args, inputs, grad, work, best) -> None:
    """Checks, measures and prints one row."""
    config = MODES[name](args.heads, block=block, **OPTIONS[name](block))
    layout = torch.from_numpy(config.make_layout(seq)).cuda()
    density = layout.float().mean().item()
    started = time.perf_counter()
    ours = partial(block_sparse_attention, layout=layout, block=block, backend="triton")
    try:
        check(ours, inputs, grad, layout, block)
        times = both_ways(ours, inputs, grad)
    except Exception as error:
        print(f"| {name} | {block} | {density:.3f} | {type(error).__name__}: {str(error)[:200]} |", flush=True)
        return
    rates = work * density / times[0], 2.5 * work * density / times[1]
    shares = [f"{rate / dense:.2f}" for rate, dense in zip(rates, best, strict=True)] if best else ["", ""]
    item = inputs[0].element_size()
    floor = max(4 * inputs[0].numel() * item / COPIED * 1e3, work * density / best[0] if best else 0)
    peers = ["", ""]
    if seq in args.peers_at and block in args.peer_blocks:
        peers = [deepspeed(layout, block, inputs, grad, times), flex_peer(layout, block, seq, inputs, grad, times)]
    print(
        f"| {name} | {block} | {density:.3f} | {times[0]:.3f} | {times[1]:.3f} | {rates[0]:.0f} | {rates[1]:.0f} "
        f"| {' / '.join(shares)} | {times[0] / floor:.2f} | {peers[0]} | {peers[1]} |",
        flush=True,
    )
    if time.perf_counter() - started > 60:
        print(f"(that row took {time.perf_counter() - started:.0f} s)", file=sys.stderr)


def compared(attention, layout, block, inputs, grad, times, in_half=False) -> str:
    """`1.23 / 4.56 (3.1 x / 5.2 x)`: the milliseconds of a peer, and how many times ours they are."""
    check(attention, inputs, grad, layout, block, in_half)
    theirs = both_ways(attention, inputs, grad)
    ratios = [peer / mine for peer, mine in zip(theirs, times, strict=True)]
    return f"{theirs[0]:.2f} / {theirs[1]:.2f} ({ratios[0]:.1f} x / {ratios[1]:.1f} x)"


def deepspeed(layout, block, inputs, grad, times) -> str:
    try:
        with _packed():
            attention = partial(block_sparse_attention, layout=layout, block=block, backend="deepspeed")
            return compared(attention, layout, block, inputs, grad, times, in_half=True)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"


def flex_peer(layout, block, seq, inputs, grad, times) -> str:
    try:
        return compared(flex(layout, block, seq), layout, block, inputs, grad, times)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


if __name__ == "__main__":
    main()
