"""Launches Triton's kernels by the names of their parameters; before a first call, only compiles them, in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

# Triton asks whether a pointer is a multiple of as many bytes.
ALIGNMENT = 16
# Kinds of launches that are remembered: a length is a kind.
MOST_KINDS = 4096

T = TypeVar("T")
NO_OPTIONS: Mapping[str, Any] = {}
# Types of which every value is a kind of its own: Triton may compile a kernel again for another value.
_PLAIN = frozenset((int, bool, str, tuple))
# Types of which all values are of one kind; others are added by `one_kind`.
_TYPED: set[type] = {float}

_compiled: dict[tuple[Any, ...], Any] = {}
_in_order: dict[Any, Callable[[Mapping[str, Any]], tuple[Any, ...]]] = {}
_compile: ContextVar[Callable[..., None] | None] = ContextVar("compile", default=None)


def start(kernel: Any, programs: int, options: Mapping[str, Any] = NO_OPTIONS, /, **arguments: Any) -> None:
    """Runs `programs` programs of `kernel`; within `warmup`, only compiles it.

    A kernel that Triton compiled for a launch of the same kind is remembered here, because Triton takes longer to find
    it again than to launch it.

    Args:
        kernel: a `triton.jit` function of two or more parameters, the first a tensor on the current device. Names of
            constants are in capitals.
        options: how it is compiled, such as `num_warps`.
        arguments: all its parameters, constants too, by name.

    Raises:
        KeyError: a parameter is missing. TypeError: there is no such parameter.
    """
    in_order = _in_order.get(kernel)
    if in_order is None:
        in_order = _in_order[kernel] = itemgetter(*kernel.arg_names)
    values = in_order(arguments)
    compile_it = _compile.get()
    if compile_it is not None:
        compile_it(kernel, programs, options, values)
        return
    launched = (
        kernel,
        values[0].get_device(),
        *[
            # inline, as a call for each value would take longer
            value
            if (kind := type(value)) in _PLAIN
            else (value.dtype, value.data_ptr() % ALIGNMENT)
            if kind is Tensor or kind not in _TYPED and isinstance(value, Tensor)
            else kind
            for value in values
        ],
        *options.values(),
    )
    compiled = _compiled.get(launched)
    if compiled is not None:
        compiled[programs, 1, 1](*values)
        return
    if len(arguments) != len(values):
        raise TypeError(f"{kernel} has no parameter {', '.join(sorted(set(arguments) - set(kernel.arg_names)))}")
    compiled = kernel[(programs,)](*values, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        if len(_compiled) >= MOST_KINDS:
            _compiled.clear()
        _compiled[launched] = compiled


def one_kind(cls: type[T]) -> type[T]:
    """Declares that all values of this class use the same kernel, such as the tiles of a tensor that is an argument
    too."""
    _TYPED.add(cls)
    return cls


def clear_compiled() -> None:
    """Forgets the compiled kernels; Triton's own cache on disk stays."""
    _compiled.clear()


@contextmanager
def warmup(device: torch.device) -> Iterator[None]:
    """A context in which `start` only compiles, for that GPU and in threads. At its end all these kernels are compiled.

    Raises:
        Exception: what a compilation raised, as launching that kernel would.
    """
    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as threads:
        kernels: dict[tuple[Any, ...], Any] = {}

        def compile_it(kernel: Any, programs: int, options: Mapping[str, Any], values: tuple[Any, ...]) -> None:
            constants = [value for name, value in zip(kernel.arg_names, values, strict=True) if name.isupper()]
            what = (kernel, *constants, *options.values())
            if what not in kernels:
                # `run` is the launcher, for which Triton calls a C compiler
                kernels[what] = threads.submit(lambda: kernel.warmup(*values, grid=(programs,), **options).run)

        token = _compile.set(compile_it)
        try:
            yield
        finally:
            _compile.reset(token)
    for compiled in kernels.values():
        compiled.result()
