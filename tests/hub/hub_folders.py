"""Converted folders as the Hub's tests need them: made, marked as verified, and changed. Needs no torch."""

import hashlib
import json
from pathlib import Path

from bsa_export.conversion.convert import convert_source as convert
from bsa_export.conversion.options import Options
from bsa_export.hub.source import Source


def converted(source: Path, folder: Path, shards: bool = False, length: int = 256) -> Path:
    convert(Source(source), folder, Options(max_length=length, block=16), max_shard_size=60_000 if shards else None)
    return folder


def mark_verified(folder: Path, verdict: str = "passed", **more) -> Path:
    """Leaves in a folder what bsa-verify leaves."""
    (folder / "verification.json").unlink(missing_ok=True)
    files = {name: digest for name, digest in digests(folder).items() if name != "pulled.json"}
    record = {"verdict": verdict, "files": files, "device": "cpu", "versions": {"torch": "2.13.0"}}
    status = "failed" if verdict == "failed" else "passed"
    checks = [{"kind": "file", "status": "passed", "figures": {"tensors": 44}}]
    checks.append({"kind": "outputs", "part": "torch", "status": status, "figures": {"error": 0.5, "bound": 2.0}})
    (folder / "verification.json").write_text(json.dumps(record | {"checks": checks} | more))
    return folder


def record_file(folder: Path, name: str, content: bytes) -> None:
    """Adds a file to a converted folder and to its conversion.json."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    record = json.loads((folder / "conversion.json").read_text())
    record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "conversion.json").write_text(json.dumps(record))


def forget_file(folder: Path, name: str) -> None:
    """Takes a file out of a conversion.json."""
    record = json.loads((folder / "conversion.json").read_text())
    del record["files"][name]
    (folder / "conversion.json").write_text(json.dumps(record))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
