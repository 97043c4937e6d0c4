"""Processes that compute: one for each backend, and one that runs the whole model. If one dies, the others continue.

The parent imports no torch here: it starts a process with a `Job` and reads what the process reports, a JSON object a
line. A tool that cannot run (an interpreter, a compiler, a version, a crash) is skipped with its reason. Only compared
numbers fail.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.conversion.source_folder import encoder_folder
from bsa_export.converted.checks import Check, Kind, Status, skipped
from bsa_export.converted.folder import open_folder
from bsa_export.converted.records import to_json
from bsa_export.text import printable
from bsa_export.verify.guard import guarded

if TYPE_CHECKING:
    from bsa_export.verify.whole_model import EndToEnd

MODEL = "model"  # the job that is not a backend's
# On a CPU these run through Triton's interpreter, which Triton decides when it is imported.
INTERPRETED = ("triton", "deepspeed")
DEEPSPEED_VARIABLE = "BSA_DEEPSPEED"  # that of ops.deepspeed_source, whose package imports torch
POLL_SECONDS = 0.1
PROGRAM = "import sys; sys.path[:] = {path!r}; from bsa_export.verify.worker import main; main()"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What a process computes.

    Attributes:
        name: a backend, or MODEL.
        folder: the converted folder.
        device: `cpu` or `cuda`.
        source: for MODEL, the source to run in its own class, None to run the folder's weights in the dense class.
        text: for MODEL, the file whose masked tokens are predicted.
        deepspeed: a release of DeepSpeed, as a file or a folder; None uses $BSA_DEEPSPEED or the installed one.
    """

    name: str
    folder: Path
    device: str
    source: Path | None = None
    text: Path | None = None
    deepspeed: Path | None = None

    @property
    def interpreted(self) -> bool:
        return self.device == "cpu" and self.name in INTERPRETED

    def stages(self) -> list[tuple[Kind, str]]:
        """What is computed, in this order: kind and part of its check, or of the check that stands for it."""
        if self.name != MODEL:
            return [(Kind.OUTPUTS, self.name), (Kind.CONTROLS, self.name)]
        return [(Kind.INTERCHANGE, ""), (Kind.WHOLE_MODEL, ""), (Kind.DRIFT, ""), (Kind.CONTROLS, "file")]

    def to_json(self) -> str:
        """The job as the argument of its process; paths of any bytes survive it."""
        return json.dumps(vars(self), default=os.fspath)

    @staticmethod
    def from_json(text: str) -> Job:
        """The job that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        paths = ("folder", "source", "text", "deepspeed")
        fields |= {name: Path(fields[name]) for name in paths if fields[name] is not None}
        return Job(**fields)

    def environment(self) -> dict[str, str]:
        """The environment of its process."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # torch's threads wait by spinning, which slows down the other processes.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        if self.deepspeed is not None:
            environment[DEEPSPEED_VARIABLE] = str(Path(self.deepspeed).absolute())
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if self.interpreted:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return environment


@dataclass
class Worker:
    """A job in a process of its own, and what it has reported so far.

    Attributes:
        job: what it computes.
        found: kind -> its checks, for each stage that ended.
        progress: (comparisons done, comparisons in all).
        device: the device in words, once it is known.
    """

    job: Job
    found: dict[Kind, list[Check]] = field(default_factory=dict)
    progress: tuple[int, int] = (0, 0)
    device: str = ""

    def __post_init__(self) -> None:
        program = PROGRAM.format(path=[entry or os.getcwd() for entry in sys.path])
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - `stop` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, self.job.to_json()],
            env=self.job.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self.device = message.get("device", self.device)
            self.progress = tuple(message.get("progress", self.progress))
            if "kind" in message:
                self.found[Kind(message["kind"])] = [msgspec.convert(check, Check) for check in message["checks"]]

    def wait(self, kind: Kind, progress: Progress | None = None) -> list[Check]:
        """The checks of a stage, when it has ended. Calls `progress` meanwhile."""
        while kind not in self.found and self._reader.is_alive():
            self._reader.join(POLL_SECONDS)
            if progress and self.progress[1]:
                progress(*self.progress)
        if kind in self.found:
            return self.found[kind]
        part = dict(self.job.stages())[kind]
        return [skipped(kind, f"its process ended: {self._last_words()}", part)]

    def _last_words(self) -> str:
        """Why the process ended before it was done."""
        code = self._process.wait()
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"exit code {code}" if code >= 0 else _signal(-code)
        return printable(f"{how} ({lines[-1].strip()})" if lines else how, 300)

    def stop(self) -> None:
        """Ends the process, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name}, often a lack of memory" if name == "SIGKILL" else name


def main() -> None:
    """The process of a job, which is the only argument. Ends when its parent does."""
    job = Job.from_json(sys.argv[1])
    # What libraries print goes to stderr: stdout is for messages alone.
    with os.fdopen(os.dup(1), "w") as messages:
        os.dup2(2, 1)
        threading.Thread(target=_end_with_parent, daemon=True).start()

        def send(message: dict[str, object]) -> None:
            print(json.dumps(to_json(message)), file=messages, flush=True)

        run(job, send)
    os._exit(0)  # torch, CUDA and Triton sometimes crash at the end of a process


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def run(job: Job, send: Callable[[dict[str, object]], None]) -> None:
    """Computes a job in this process and sends the checks of each stage, progress and the device.

    An exception ends its stage: what it shows is a tool that cannot run, or a fault of this package, and not a wrong
    model. The check is skipped, and its details hold the traceback. A BsaError from loading the model is a failed
    check.
    """
    stages: dict[Kind, Callable[[], Iterable[Check]]] = {}
    last = [time.monotonic()]

    def progress(done: int, total: int) -> None:
        if done == total or time.monotonic() - last[0] > POLL_SECONDS:
            last[0] = time.monotonic()
            send({"progress": [done, total]})

    def prepare() -> Iterator[Check]:
        stages.update(_stages(job, progress))
        send({"device": device_name(job.device)})
        return iter(())

    broken = list(guarded(Kind.OUTPUTS, "", prepare))
    for kind, part in job.stages():
        if broken:
            checks = [Check(kind, Status.SKIPPED, part, broken[0].reason, details=broken[0].details)]
        else:
            checks = list(guarded(kind, part, stages[kind]))
        send({"kind": kind, "checks": checks})


def device_name(device: str) -> str:
    """The device in words."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _stages(job: Job, progress: Progress) -> dict[Kind, Callable[[], Iterable[Check]]]:
    """Kind -> what computes its checks. Imports what the job needs."""
    if job.name == MODEL:
        return _model_stages(job, progress)
    folder = open_folder(job.folder)
    if job.interpreted:
        from bsa_export.verify import interpreted

        call = interpreted.Interpreted(folder, job.name)
        return {Kind.OUTPUTS: lambda: [call.outputs()], Kind.CONTROLS: lambda: call.controls()}
    from bsa_export.ops.dispatch import backends
    from bsa_export.verify.controls import backend_control
    from bsa_export.verify.outputs import DTYPES, check_outputs

    dtypes = DTYPES[job.device].get(job.name, [])

    def controls() -> Iterator[Check]:
        if dtypes and backends()[job.name] is None:
            yield backend_control(folder, job.device, job.name, dtypes[0])

    return {
        Kind.OUTPUTS: lambda: check_outputs(folder, job.device, (job.name,), progress),
        Kind.CONTROLS: controls,
    }


def _model_stages(job: Job, progress: Progress) -> dict[Kind, Callable[[], Iterable[Check]]]:
    from bsa_export.verify.controls import file_controls
    from bsa_export.verify.interchange import check_interchange

    folder = open_folder(job.folder)
    ran: list[EndToEnd] = []

    def whole_model() -> Iterator[Check]:
        from bsa_export.verify.whole_model import check_whole_model

        checkpoint = None if job.source is None else open_checkpoint(encoder_folder(job.source))
        yield from check_whole_model(folder, job.device, checkpoint, ran)
        if ran and job.source is not None:
            from bsa_export.verify.sentences import PART, check_embeddings

            source = job.source
            yield from guarded(Kind.WHOLE_MODEL, PART, lambda: check_embeddings(folder, source))

    def drift() -> Iterator[Check]:
        if not ran:
            yield skipped(Kind.DRIFT, "the whole model did not run")
            return
        from bsa_export.verify.drift import measure_drift

        yield measure_drift(ran[0], job.text, progress)

    return {
        Kind.INTERCHANGE: lambda: check_interchange(folder),
        Kind.WHOLE_MODEL: whole_model,
        Kind.DRIFT: drift,
        Kind.CONTROLS: lambda: [file_controls(folder)],
    }
