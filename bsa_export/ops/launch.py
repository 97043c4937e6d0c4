"""Starts Triton's kernels; or, before a first call, only compiles them, which takes seconds each and goes on beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# Bytes of which Triton asks whether a pointer is a multiple.
ALIGNMENT = 16
# Kinds of launches that are remembered: a length is a kind.
MOST_KINDS = 4096

_compiled: dict[tuple, object] = {}
_compile: ContextVar[Callable | None] = ContextVar("compile", default=None)


def start(kernel, programs: int, *arguments, **constants) -> None:
    """Runs `programs` programs of `kernel`; within `warmup`, none. The first argument is a tensor, on the current device.

    What Triton compiled for a launch of the same kind runs at once: to find it again takes Triton longer than to launch it.
    """
    compile_it = _compile.get()
    if compile_it is not None:
        compile_it(kernel, programs, arguments, constants)
        return
    kind = _kind_of_launch(kernel, arguments, constants)
    compiled = _compiled.get(kind)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))
        return
    compiled = kernel[(programs,)](*arguments, **constants)
    if compiled is not None:  # Triton's interpreter compiles nothing
        if len(_compiled) >= MOST_KINDS:
            _compiled.clear()
        _compiled[kind] = compiled


def _kind_of_launch(kernel, arguments, constants) -> tuple:
    """All that Triton may compile a kernel anew for: constants, integers, dtypes and alignment of tensors, and the device."""
    kinds = [argument if type(argument) is int else _kind(argument) for argument in arguments]
    return kernel, arguments[0].get_device(), *kinds, *constants.values()


def _kind(argument):
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNMENT
    return type(argument)  # a float; or tiles of a tensor that is an argument, too


@contextmanager
def warmup(device: torch.device) -> Iterator[None]:
    """Within it, `start` compiles for that GPU, in threads; when it ends, all that was started is ready to run.

    Raises:
        Exception: what a compilation raised, as launching that kernel would.
    """
    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as threads:
        kernels = {}

        def compile_it(kernel, programs, arguments, constants):
            what = (kernel, *constants.values())
            if what not in kernels:
                # `run` is the launcher, for which Triton calls a C compiler
                kernels[what] = threads.submit(lambda: kernel.warmup(*arguments, grid=(programs,), **constants).run)

        token = _compile.set(compile_it)
        try:
            yield
        finally:
            _compile.reset(token)
    for compiled in kernels.values():
        compiled.result()
