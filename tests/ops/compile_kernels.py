"""Compiles the fused kernels for a GPU that is not here: `python compile_kernels.py 90` (its compute capability,
without the dot).

Prints a JSON object for each kernel: what was compiled, its registers and its bytes of spilled registers for each
thread, its shared memory, how many registers its threads exchange, how many of these are products, which
`triton_scores.rounded` has to round, and how many loads of columns are copied ahead. Nothing is launched: the backend's
own functions run on CPU tensors, and each launch becomes a compilation.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bsa_export.ops import rotary, triton_backend
from bsa_export.ops.launch import NO_OPTIONS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHOWN = ("SIZE", "KEYS", "UNIT", "DIM", "BIASED", "VARLEN", "WINDOW", "CENTERED", "PRECISION", "maxnreg")
# dtype, block, head_dim, whether keys are masked, whether sequences are packed, window; every launch of the table.
CALLS = [
    (torch.float16, 64, 64, False, False, None),
    (torch.float16, 128, 128, False, False, None),
    (torch.bfloat16, 64, 128, True, False, None),
    (torch.float16, 16, 64, False, True, None),
    (torch.float32, 64, 64, False, False, None),
    (torch.float32, 64, 128, False, False, None),
    (torch.bfloat16, 64, 64, False, True, (64, 64)),
    (torch.bfloat16, 16, 64, True, False, (64, 64)),
    (torch.float16, 16, 64, False, True, (64, 0)),
    (torch.float16, 128, 128, False, False, (64, 64)),
    (torch.float32, 64, 64, False, False, (64, 64)),
]
# For a quick look: every kernel but the one for tokens outside of packed sequences, and those that a window changes.
QUICK = [(torch.float16, 64, 64, True, False, None), (torch.bfloat16, 64, 64, False, False, (64, 64))]
SEQ = 4096  # long enough for rows that are shared out


class Compiler:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0


def compile_it(kernel, programs: int, options=NO_OPTIONS, /, **arguments) -> None:
    """Stands for `launch.start`: what is launched is compiled and reported."""
    compiled = kernel.warmup(**arguments, grid=(programs,), **options)
    shown = {name: value for name, value in (arguments | dict(options)).items() if name in SHOWN}
    print(json.dumps({"kernel": kernel.fn.__name__} | shown | usage(compiled)), flush=True)


def usage(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        shown = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", shown).groups())
    exchanged, products = exchanges(compiled.asm["ptx"])
    told = {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared}
    copied = len(re.findall(r"async_copy_global_to_local .*-> <\d\d+xi32", compiled.asm["ttgir"]))
    return told | {"exchanged": exchanged, "products": products, "columns_copied": copied}


def exchanges(ptx: str) -> tuple[int, int]:
    """The registers that shuffles send to other threads, and how many of these hold a product that may still be
    fused."""
    made_by, sources = {}, []
    for line in ptx.splitlines():
        if found := re.match(r"\s*([\w.]+)\s+(%\w+)(?:\|%\w+)?,\s*(%\w+)?", line):
            instruction, target, source = found.groups()
            if instruction.startswith("shfl."):
                sources.append(made_by.get(source))
            made_by[target] = made_by.get(source) if instruction.startswith("mov.") else instruction
    return len(sources), sources.count("mul.f32")


def compile_rotary() -> None:
    x = torch.zeros(1, 128, 2, 64, dtype=torch.float16).transpose(1, 2)
    cos, sin = torch.zeros(2, 1, 1, 128, 16, dtype=torch.float16)
    rotary._turned(x, cos, sin, 1)


def main(capability: int, calls: list) -> None:
    driver.set_active(Compiler(capability))
    torch.cuda.device_of = lambda _: contextlib.nullcontext()
    triton_backend._multiplies_from_shared = lambda _: capability // 10 in (9, 10)
    triton_backend.start = rotary.start = compile_it
    compile_rotary()
    for dtype, block, head_dim, masked, packed, window in calls:
        n = SEQ // block
        layout = torch.eye(n, dtype=torch.uint8)[None].repeat(2, 1, 1)
        layout[:, 0], layout[:, :, 0] = 1, 1  # a global block, whose row is shared out
        query, key, value, d_out = torch.zeros(4, 1, 2, SEQ, head_dim, dtype=dtype)
        bias = torch.zeros(1, SEQ) if masked else None
        offsets = torch.tensor([0, 100, SEQ], dtype=torch.int32) if packed else None
        inputs = (query, key, value, layout, bias, offsets)
        out, lse = triton_backend._forward(*inputs, SEQ, block, 0.125, window)
        triton_backend._backward(d_out, *inputs, out, lse, SEQ, block, 0.125, window)


if __name__ == "__main__":
    main(int(sys.argv[1]), QUICK if "--quick" in sys.argv else CALLS)
