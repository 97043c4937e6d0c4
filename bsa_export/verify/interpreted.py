"""Triton's kernels on a machine without a GPU: through Triton's interpreter, a head of each layer, at a small length.

Triton reads TRITON_INTERPRET when it is imported, so this runs in a process of its own: `start` and `finish`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from bsa_export.converted.checks import Check, Kind, result, skipped

BACKENDS = ("triton", "deepspeed")
DTYPES = {"triton": ["float16", "float32"], "deepspeed": ["float16"]}
HOW = "Triton's interpreter on the CPU"
TOKENS = 128
# Queries of all heads together: DeepSpeed's softmax is a program for each.
MOST_QUERIES = 1152


def start(path: Path, names: tuple[str, ...]) -> subprocess.Popen:
    """Starts the comparison of backends on the folder `path` in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bsa_export.verify.interpreted", str(path), *names]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, names: tuple[str, ...]) -> list[Check]:
    """Waits for what `start` began. A process that died is a failure, with its last words as the reason."""
    out, err = process.communicate()
    if process.returncode:
        last = err.strip().splitlines()[-1] if err.strip() else f"exit code {process.returncode}"
        return [result(Kind.OUTPUTS, [f"{HOW} died: {last}"], part=name) for name in names]
    return [msgspec.convert(check, Check) for check in json.loads(out.splitlines()[-1])]


def check_interpreted(path: Path, names: tuple[str, ...] = BACKENDS) -> list[Check]:
    """Compares backends in this process, where TRITON_INTERPRET=1 was set before triton was imported.

    The heads of several layers are computed as the heads of one call, each with its own weights and its own excerpt of its layout.
    """
    import torch

    from bsa_export.converted.folder import open_folder
    from bsa_export.ops.dispatch import backends
    from bsa_export.verify.attention_inputs import Projections, tensor
    from bsa_export.verify.controls import backend_control
    from bsa_export.verify.outputs import Call, Ledger, Situation, excerpt, padding, pick

    folder = open_folder(path)
    blocks = pick(folder.longest // folder.block, max(3, TOKENS // folder.block))
    length = len(blocks) * folder.block
    count = max(1, min(folder.layers, MOST_QUERIES // length))
    layers = sorted({round(i * (folder.layers - 1) / max(1, count - 1)) for i in range(count)})
    projections = Projections(folder, torch.device("cpu"))
    heads = [(layer, layer % folder.heads) for layer in layers]
    taken, layouts = [], []
    for layer, head in heads:
        taken.append([x[:, head] for x in projections(layer, 1, length)])
        layouts.append(excerpt(tensor(folder.tensors[folder.layout_name(layer)])[head : head + 1], blocks))
    inputs = {
        name: torch.stack(x, 1) for name, x in zip(("query", "key", "value"), zip(*taken, strict=True), strict=True)
    }
    inputs |= {"layout": torch.cat(layouts), "block": folder.block}
    whole = Situation("a head of each layer", length, tuple(layers), blocks=blocks)
    short = Situation("the same, less a token, padded", length - 1, tuple(layers), blocks=blocks)

    reasons, checks = backends(), []
    for name in names:
        if reasons[name] is not None:
            checks.append(skipped(Kind.OUTPUTS, reasons[name], name))
            continue
        ledger = Ledger(name, HOW, folder.not_finite)
        for dtype in DTYPES[name]:
            ledger.enter(Call(inputs, getattr(torch, dtype)), heads, whole, dtype)
        if name == "triton":
            cut = {key: x[:, :, :-1] if key in ("query", "key", "value") else x for key, x in inputs.items()}
            cut["key_padding_mask"] = padding(length - 1, torch.device("cpu"))[1:]
            ledger.enter(Call(cut, torch.float16), heads, short, "float16")
        checks += [ledger.check([whole, short]), backend_control(folder, "cpu", name, DTYPES[name][0])]
    return checks


if __name__ == "__main__":
    checks = check_interpreted(Path(sys.argv[1]), tuple(sys.argv[2:]))
    print(json.dumps(msgspec.to_builtins(checks)))
