"""Runs DeepSpeed's own unit tests for sparse attention through `bsa_export.deepspeed_compat`.

    python tests/deepspeed_unit/run.py DeepSpeed/tests/unit/ops/sparse_attention/test_sparse_attention.py [pytest
    options]

The file is in DeepSpeed's repository up to v0.19.6 (its releases on PyPI hold no tests). No DeepSpeed has to be
installed: the few other modules that the file imports are replaced here, so that its conditions on CUDA versions of
    2021 do not skip it. The tests run on
the GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


def add_module(name: str, is_package: bool = False, **content: object) -> None:
    """Puts a module of this content where its import finds it."""
    module = ModuleType(name)
    vars(module).update(content)
    if is_package:
        module.__path__ = []
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def main(arguments: list[str]) -> int:
    """Returns pytest's exit code."""
    if not arguments or not Path(arguments[0]).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    builder = SimpleNamespace(NAME="sparse_attn")
    accelerator = SimpleNamespace(device_name=lambda: device)
    add_module("deepspeed", is_package=True)
    add_module("deepspeed.ops", is_package=True, __compatible_ops__={builder.NAME: True})
    add_module("deepspeed.ops.op_builder", SparseAttnBuilder=builder)
    add_module("deepspeed.accelerator", get_accelerator=lambda: accelerator)
    add_module("unit", is_package=True)
    add_module("unit.util", skip_on_arch=lambda **_: None, skip_on_cuda=lambda **_: None)
    import bsa_export.deepspeed_compat  # noqa: F401 # finds deepspeed.ops.sparse_attention

    # Without the conftest.py and pytest.ini of DeepSpeed, and without this project's options.
    own = ["-c", "/dev/null", "--noconftest", "-p", "no:cacheprovider", "--import-mode=importlib", "-ra"]
    print(f"DeepSpeed's unit tests through bsa_export.deepspeed_compat on {device}")
    return int(pytest.main([*own, *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
