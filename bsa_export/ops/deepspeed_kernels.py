"""DeepSpeed's own sparse attention operators, read from its source files and brought to today's Triton.

deepspeed 0.16 to 0.19.6 ships kernels for Triton 1.0: compile-time values come as `**meta`, heuristics see positional
arguments, and Triton's C++ held a helper that packs kept blocks. The source is rewritten as a syntax tree and run from
a file of its own; deepspeed itself is not imported, and nothing in triton, torch or `sys.modules` is changed.
"""

from __future__ import annotations

import ast
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from bsa_export.errors import AttentionError
from bsa_export.ops.deepspeed_source import RELEASES, find, helper_source

_packed: ContextVar[bool] = ContextVar("packed", default=False)


@contextmanager
def packed_tables() -> Iterator[None]:
    """DeepSpeed's score products take up to 128 x 128 tokens at once where kept blocks are neighbours, instead of
    block by block.

    For benchmarks, so that DeepSpeed is measured at its best: calls inside use look-up tables made by the package's own
    C++, which is compiled at the first use (needs a C++ compiler and ninja). The results are the same.

    Raises:
        AttentionError: deepspeed is not there, or its C++ cannot be compiled.
    """
    sdd_segment()
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def packing() -> bool:
    """Whether calls are inside `packed_tables`."""
    return _packed.get()


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU: TRITON_INTERPRET=1 was set when it was imported."""
    return isinstance(tl.softmax, InterpretedFunction)


def operators() -> SimpleNamespace | str:
    """DeepSpeed's `MatMul` and `Softmax` from the sources that `deepspeed_source.find` finds, or why there are none."""
    folder = find()
    return folder if isinstance(folder, str) else _loaded(folder)


@cache
def _loaded(folder: Path) -> SimpleNamespace | str:
    try:
        return load(folder)
    except Exception as error:  # whatever a source that nobody has seen yet may lead to
        return f"the sparse attention in {folder} is not that of {RELEASES}: {error}"


def load(folder: Path) -> SimpleNamespace:
    """The classes `MatMul` and `Softmax` of the deepspeed in `folder`, on kernels that today's Triton compiles or
    interprets."""
    matmul, softmax = (
        _import(folder / "ops/sparse_attention" / f"{name}.py", f"bsa_export.ops.deepspeed_{name}")
        for name in ("matmul", "softmax")
    )
    products = matmul._sparse_matmul
    products.load_balance = staticmethod(_without_empty_shares(products.load_balance))
    return SimpleNamespace(MatMul=matmul.MatMul, Softmax=softmax.Softmax)


def _import(path: Path, name: str) -> ModuleType:
    tree = ast.fix_missing_locations(_Modern().visit(ast.parse(path.read_text(encoding="utf-8"))))
    source = ast.unparse(tree)
    # Triton reads a kernel's source back from its file, the interpreter as late as at the first launch.
    with NamedTemporaryFile("w", encoding="utf-8", suffix=path.name, dir=_folder().name, delete=False) as file:
        file.write(source)
    module = ModuleType(name)
    vars(module).update(
        __file__=file.name,
        as_block=_as_block,
        jit=_jit,
        heuristics=_heuristics,
        libtriton=SimpleNamespace(superblock=_superblock),
        get_accelerator=lambda: _Accelerator,
    )
    exec(compile(source, file.name, "exec", dont_inherit=True), vars(module))
    return module


@cache
def _folder() -> TemporaryDirectory[str]:
    """A folder that is removed when the process ends."""
    return TemporaryDirectory(prefix="bsa_export_deepspeed_")


def _without_empty_shares(load_balance: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed's `load_balance`, which divides the sums of block columns into shares, one for each program, without
    its empty shares. If no column keeps 4 blocks, it adds an empty share to columns that have another one: both
    programs then write the result, and the last one wins.
    """

    def balanced(sizes: Tensor, block: int) -> tuple[Tensor, ...]:
        segments, column, *others = load_balance(sizes, block)
        needed = (segments > 0) | (sizes[column] == 0)
        return tuple(x[needed] for x in (segments, column, *others))

    return balanced


class _Accelerator:
    """What the operators ask of `deepspeed.accelerator`. Where kernels can run is decided before they are called."""

    @staticmethod
    def on_accelerator(tensor: Tensor) -> bool:
        return True


class _Modern(ast.NodeTransformer):
    """A module for Triton 1.0 as one for Triton 3."""

    def visit_Import(self, node: ast.Import) -> ast.Import | None:
        node.names = [alias for alias in node.names if alias.name != "triton._C.libtriton"]
        return node if node.names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if (node.module or "").partition(".")[0] == "deepspeed" else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if "triton.jit" not in map(ast.unparse, node.decorator_list) or node.args.kwarg is None:
            self.generic_visit(node)
            return node
        node.decorator_list = [_without_module(decorator) for decorator in node.decorator_list]
        constants = _Constants(node.args.kwarg.arg)
        node.body = [statement for statement in map(constants.visit, node.body) if statement is not None]
        node.args.kwarg = None
        annotation = ast.parse("tl.constexpr", mode="eval").body
        node.args.args += [ast.arg(name, annotation) for name in constants.names]
        return node


def _without_module(decorator: ast.expr) -> ast.expr:
    """`@triton.jit` as `@jit`, `@triton.heuristics(...)` as `@heuristics(...)`: names that the module is given."""
    if isinstance(decorator, ast.Call):
        decorator.func = _without_module(decorator.func)
        return decorator
    return ast.Name(ast.unparse(decorator).rpartition(".")[2], ast.Load())


class _Constants(ast.NodeTransformer):
    """`meta['NAME']` in a kernel as `NAME`; `names` in the order of their appearance."""

    def __init__(self, meta: str):
        self.meta = meta
        self.names: dict[str, None] = {}

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == self.meta and isinstance(node.slice, ast.Constant):
            name = str(node.slice.value)
            self.names[name] = None
            return ast.Name(name, node.ctx)
        self.generic_visit(node)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.Assign | None:
        self.generic_visit(node)
        if ast.unparse(node.targets[0]) == ast.unparse(node.value):
            return None
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        self.generic_visit(node)
        if node.arg == "mask" and interpreted():
            node.value = ast.Call(ast.Name("as_block", ast.Load()), [node.value], [])
        return node


def _as_block(mask: Any) -> Any:
    """A mask that Triton's interpreter accepts, inside a kernel: a Python bool, or a comparison of scalars, as a block
    of one."""
    if isinstance(mask, tl.tensor) and mask.type.is_block():
        return mask
    return tl.full((1, 1), 1, tl.int1) & mask


class _Launcher:
    """A kernel that is launched as with Triton 1.0.

    Args:
        kernel: a `triton.jit` function.
        heuristics: compile-time values by name, from the positional arguments and the values that are known.
    """

    def __init__(self, kernel: Any, heuristics: dict[str, Callable[..., Any]]):
        self.kernel = kernel
        self.heuristics = heuristics

    def __getitem__(self, grid: Callable[[dict[str, Any]], list[int]]) -> Callable[..., Any]:
        def launch(*args: Any, **meta: Any) -> Any:
            for name, value in self.heuristics.items():
                meta[name] = value(*args, **meta)
            # The interpreter wants a tuple.
            return self.kernel[lambda known: tuple(grid(known))](*args, **meta)

        return launch


def _jit(function: Callable[..., Any]) -> _Launcher:
    return _Launcher(triton.jit(function), {})


def _heuristics(values: dict[str, Callable[..., Any]]) -> Callable[[_Launcher], _Launcher]:
    return lambda launcher: _Launcher(launcher.kernel, launcher.heuristics | values)


def _superblock(pointer: int, heads: int, rows: int, columns: int, start_width: int) -> list[tuple[int, np.ndarray]]:
    """`libtriton.superblock` of Triton 1.0: cuts the int32 layout at `pointer` into squares of kept blocks.

    Returns:
        For each width of a square, int32 `[number of blocks, 4]`: head, row, column and number of each block, square by
        square.
    """
    layout = np.ctypeslib.as_array((ctypes.c_int32 * (heads * rows * columns)).from_address(pointer))
    layout = layout.reshape(heads, rows, columns)
    if packing():
        # The C++ clears the layout that it is given.
        return [(width, blocks.numpy()) for width, blocks in sdd_segment()(torch.tensor(layout), start_width)]
    where = np.argwhere(layout)
    blocks = np.empty((len(where), 4), np.int32)  # the kernel reads it row by row
    blocks[:, :3] = where
    blocks[:, 3] = np.arange(len(where))
    return [(1, blocks)]


@cache
def sdd_segment() -> Callable[..., Any]:
    """DeepSpeed's own C++ `sdd_segment(layout, start_width)`, compiled at the first call.

    Raises:
        AttentionError: it cannot be compiled here.
    """
    folder = find()
    if isinstance(folder, str):
        raise AttentionError(folder, where="backend deepspeed")
    from torch.utils.cpp_extension import load as load_extension

    try:
        extension = load_extension(
            name="bsa_export_deepspeed_sdd_segment",
            sources=[str(helper_source(folder))],
            extra_cflags=["-O2", "-fopenmp"],
            extra_ldflags=["-fopenmp"],
        )
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AttentionError(
            "the C++ for packed tables cannot be compiled",
            found=reason,
            where="backend deepspeed",
            hint="it needs a C++ compiler and ninja",
        ) from error
    return extension.sdd_segment
