"""Many cases of the fuzz, in several processes: `python tests/fuzz/run.py --cases 100000`.

Prints each finding with its kind and seed, and exits 1 if there are any. `--kind zip --seed 17` runs one case again. A
process that dies is a finding of the case that it was at.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "checkpoint")]


def work(connection: Connection, folder: Path) -> None:
    """Runs the cases that come, and answers with what is wrong."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from cases import Bench, limit_memory

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    bench = Bench(folder / "bench")
    limit_memory()
    connection.send("ready")
    while (case := connection.recv()) is not None:
        connection.send(bench.run(*case))


class Worker:
    """A process, and the case that it is at."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.connection, other = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=work, args=(other, self.folder), daemon=True)
        self.process.start()
        other.close()
        self.case: tuple[str, int] | None = None
        self.started = 0.0

    def give(self, case: tuple[str, int] | None) -> None:
        if not self.started and self.connection.recv() != "ready":  # importing torch is not part of a case
            raise RuntimeError("a process did not start")
        self.case, self.started = case, time.monotonic()
        self.connection.send(case)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> int:
    from cases import KINDS, SECONDS, SHARES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    choices = parser.parse_args()
    kinds = choices.kind or [kind for kind, share in SHARES.items() for _ in range(share)]
    todo = ((kinds[n % len(kinds)], choices.seed + n) for n in range(choices.cases))
    findings: Counter[str] = Counter()
    done = 0
    workers = [Worker() for _ in range(choices.processes)]
    started = time.monotonic()
    for worker in workers:
        worker.give(next(todo, None))
    while busy := [worker for worker in workers if worker.case is not None]:
        ready = wait([worker.connection for worker in busy], timeout=1)
        for worker in busy:
            wrong = None
            if worker.connection in ready:
                try:
                    wrong = worker.connection.recv()
                except EOFError:
                    wrong = f"the process died ({worker.process.exitcode})"
            elif time.monotonic() - worker.started > 60 + SECONDS:
                wrong = "it did not end"
            else:
                continue
            done += 1
            if wrong:
                findings[worker.case[0]] += 1
                print(f"--kind {worker.case[0]} --seed {worker.case[1]} --cases 1: {wrong}\n", flush=True)
            if wrong and (not worker.process.is_alive() or wrong == "it did not end" or "died" in wrong):
                worker.end()
                workers[workers.index(worker)] = worker = Worker()
            worker.give(next(todo, None))
    for worker in workers:
        worker.end()
    print(f"{done:,} cases in {time.monotonic() - started:.0f} s, {sum(findings.values())} findings {dict(findings)}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
