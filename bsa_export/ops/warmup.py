"""Starts Triton's kernels; or, before a first call, only compiles them, which takes seconds each and goes on beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_compile: ContextVar[Callable | None] = ContextVar("compile", default=None)


def start(kernel, programs: int, *arguments, **constants) -> None:
    """Runs `programs` programs of `kernel`; within `warmup`, none."""
    compile_it = _compile.get()
    if compile_it is None:
        kernel[(programs,)](*arguments, **constants)
    else:
        compile_it(kernel, programs, arguments, constants)


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
