"""A small converted model, a Hub for each test, and commands that talk to it with and without hf_xet."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import Commands
from hub_server import WRITER, HubServer
from safetensors.numpy import save_file

from bsa_export.conversion.convert import convert_source as convert
from bsa_export.conversion.options import Options
from bsa_export.hub.source import Source

LAYERS, HIDDEN, HEADS, WORDS, POSITIONS = 2, 32, 2, 300, 64


def dense_bert(folder: Path, seed: int = 0) -> Path:
    """A folder with a dense BERT with a masked-LM head, random weights, a vocabulary and a license."""
    sizes = {
        "bert.embeddings.word_embeddings.weight": (WORDS, HIDDEN),
        "bert.embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "bert.embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "cls.predictions.bias": (WORDS,),
    }
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    linears = {"cls.predictions.transform.dense": (HIDDEN, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"bert.encoder.layer.{layer}"
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
        names = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        linears |= {f"{prefix}.{name}": (HIDDEN, HIDDEN) for name in names}
        linears |= {
            f"{prefix}.intermediate.dense": (2 * HIDDEN, HIDDEN),
            f"{prefix}.output.dense": (HIDDEN, 2 * HIDDEN),
        }
    for name in norms:
        sizes |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
    for name, shape in linears.items():
        sizes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    random = np.random.default_rng(seed)
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    config = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "intermediate_size": 2 * HIDDEN, "vocab_size": WORDS,
        "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    }  # fmt: skip
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"word{number}\n" for number in range(WORDS)))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A dense model\n")
    return folder


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A conversion that was verified, in one file of weights. Not to be written to: `model` is a copy."""
    place = tmp_path_factory.mktemp("finished")
    return mark_verified(converted(dense_bert(place / "dense"), place / "model"))


@pytest.fixture(scope="session")
def sharded(finished) -> Path:
    """The same in shards."""
    return mark_verified(converted(finished.parent / "dense", finished.parent / "sharded", shards=True))


@pytest.fixture
def model(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "model")


@pytest.fixture(scope="session")
def _a_hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(_a_hub):
    """An empty Hub without faults."""
    _a_hub.come_up()
    _a_hub.repos.clear()
    _a_hub.log.clear()
    _a_hub.multipart = None
    return _a_hub


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory) -> Path:
    """$HF_HOME of the commands."""
    return tmp_path_factory.mktemp("home")


def _commands(server, home: Path, xet: bool) -> Commands:
    env = {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    return Commands(HF_ENDPOINT=server.url, HF_TOKEN=WRITER, HF_HOME=str(home), **env)


@pytest.fixture(scope="session")
def _with_xet(_a_hub, hub_home):
    pytest.importorskip("hf_xet", reason="hf_xet is not installed")
    with _commands(_a_hub, hub_home, xet=True) as commands:
        yield commands


@pytest.fixture(scope="session")
def _without_xet(_a_hub, hub_home):
    with _commands(_a_hub, hub_home, xet=False) as commands:
        yield commands


@pytest.fixture(params=["xet", "lfs"])
def bsa(request, hub_home) -> Commands:
    """Runs the commands, once with hf_xet and once without it, with an empty cache."""
    shutil.rmtree(hub_home, ignore_errors=True)
    return request.getfixturevalue("_with_xet" if request.param == "xet" else "_without_xet")


@pytest.fixture
def bsa_lfs(_without_xet, hub_home) -> Commands:
    """Runs the commands without hf_xet, for what does not depend on it, with an empty cache."""
    shutil.rmtree(hub_home, ignore_errors=True)
    return _without_xet
