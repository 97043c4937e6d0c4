"""Cases of the fuzz: a source with something wrong, what is done with it, and who judges the result.

A case is a kind and a seed. `Bench.run` does it in a folder of its own and returns what is wrong, or None. Wrong is any
exception but a refusal (also of the limits of time and memory), a result that torch and safetensors do not confirm, and
a file outside the target that changed.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import mutate
import torch
from checkpoint_files import ZERO_STEP, save_zero
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from bsa_export.checkpoint.atomic_folder import AtomicFolder
from bsa_export.checkpoint.open import open_checkpoint
from bsa_export.checkpoint.writer import write_weights
from bsa_export.cli.convert import main
from bsa_export.converted import card, integrity
from bsa_export.converted.folder import open_folder
from bsa_export.converted.records import read_conversion, read_pull, read_verification
from bsa_export.errors import BsaError

SECONDS = 5  # of a case: inputs are smaller than 1 MB
MEBIBYTES = 500
CONFIG: dict[str, object] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "torch_dtype": "float32",
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
TOKENIZER = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 32}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
    "added_tokens": [{"id": 0, "content": "[PAD]", "special": True}],
    "normalizer": {"type": "BertNormalizer", "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}},
}
SIDECARS: dict[str, object] = {
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": 32, "do_lower_case": True},
    "special_tokens_map.json": {"pad_token": "[PAD]", "cls_token": {"content": "[CLS]", "lstrip": False}},
    "added_tokens.json": {"[NEW]": 29},
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ],
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
    "config_sentence_transformers.json": {"__version__": {"torch": "2.0"}, "prompts": {}},
    "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
    "2_Dense/config.json": {"in_features": 16, "out_features": 4, "bias": False},
    "generation_config.json": {"transformers_version": "4.0"},
}
TEXTS = {
    "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n",
    "merges.txt": "#version: 0.2\na b\n",
    "README.md": "---\nlicense: mit\nlanguage: [en]\ntags:\n- x\ndate: 2024-01-30\n---\n# A model\n\nText.\n",
    "LICENSE": "MIT\n",
}
YAML = (
    "&a [*a]",
    "!!python/object:os.system x",
    "date: 2024-02-30",
    "a: &x [1]\nb: *x",
    "- [" * 300,
    "\t",
    "? {}",
    "\x00",
    "1: 2",
)
SPARSITY = {"sparse_attention": {"mode": "fixed", "block": 16, "num_local_blocks": 1, "num_global_blocks": 1}}
RECORDS = ("conversion.json", "verification.json", "pulled.json", "config.json")


def bert() -> dict[str, torch.Tensor]:
    """The tensors of a BertModel of CONFIG, random: importing transformers would take longer than most cases."""
    normal, dense = {"weight": (16,), "bias": (16,)}, {"weight": (16, 16), "bias": (16,)}
    modules = {
        "embeddings.word_embeddings": {"weight": (30, 16)},
        "embeddings.position_embeddings": {"weight": (32, 16)},
        "embeddings.token_type_embeddings": {"weight": (2, 16)},
        "embeddings.LayerNorm": normal,
        **{f"encoder.layer.0.attention.self.{part}": dense for part in ("query", "key", "value")},
        "encoder.layer.0.attention.output.dense": dense,
        "encoder.layer.0.attention.output.LayerNorm": normal,
        "encoder.layer.0.intermediate.dense": dense,
        "encoder.layer.0.output.dense": dense,
        "encoder.layer.0.output.LayerNorm": normal,
        "pooler.dense": dense,
    }
    generator = torch.Generator().manual_seed(0)
    return {
        f"{module}.{name}": torch.randn(shape, generator=generator)
        for module, shapes in modules.items()
        for name, shape in shapes.items()
    }


@contextmanager
def limited() -> Iterator[None]:
    """A limit of processor time for a case, as an exception."""

    def end(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory() -> None:
    """From here on this process may take MEBIBYTES more than it has, and write files of 200 MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + (MEBIBYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 20, 200 << 20))


class Bench:
    """A folder with an undamaged source of every kind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runner = CliRunner()
        self.state = bert()
        self.config = CONFIG
        pristine = folder / "pristine"
        pristine.mkdir(parents=True)
        saved = {"epoch": 3, "model": self.state, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}}
        torch.save(self.state, pristine / "zip")
        torch.save(saved, pristine / "wrapped")
        torch.save(self.state, pristine / "legacy", _use_new_zipfile_serialization=False)
        save_file(self.state, pristine / "safetensors", metadata={"format": "pt"})
        self.pristine = {path.name: path.read_bytes() for path in pristine.iterdir()}
        for stage in (2, 3):
            save_zero(folder / f"zero {stage}", stage, 2)
        self.source(sidecars=True).rename(folder / "whole")
        result = self.convert(folder / "whole", folder / "converted")
        if result.exit_code:
            raise RuntimeError(f"the undamaged source is refused: {result.output}") from result.exception

    def convert(self, *arguments: object):
        return self.runner.invoke(main, [str(argument) for argument in arguments])

    def source(self, weights: str = "safetensors", sidecars: bool = False) -> Path:
        """A new folder `source` of undamaged files."""
        source = self.folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        name = "model.safetensors" if weights == "safetensors" else "pytorch_model.bin"
        (source / name).write_bytes(self.pristine[weights])
        (source / "config.json").write_text(json.dumps(self.config))
        if sidecars:
            for name, content in SIDECARS.items():
                (source / name).parent.mkdir(exist_ok=True)
                (source / name).write_text(json.dumps(content))
            for name, text in TEXTS.items():
                (source / name).write_text(text)
            save_file({"linear.weight": torch.ones(4, 16)}, source / "2_Dense" / "model.safetensors")
        return source

    def run(self, kind: str, seed: int) -> str | None:
        """What is wrong with a case: `None`, or one line or a traceback."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        try:
            with limited():
                return KINDS[kind](self, Random(f"{kind} {seed}"))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return "".join(traceback.format_exception(error))[-3000:]
        finally:
            gc.collect(0)

    def stamp(self) -> dict[str, tuple[int, int]]:
        """Size and time of everything but the target."""
        out = self.folder / "out"
        return {
            str(path): ((status := path.lstat()).st_size, status.st_mtime_ns)
            for path in self.folder.parent.rglob("*")
            if path != out and out not in path.parents and not path.is_dir()
        }

    def done(self, result) -> str | None:
        """What is wrong with how a command ended."""
        error = result.exception
        if error is not None and not isinstance(error, SystemExit):
            return "".join(traceback.format_exception(error))[-3000:]
        if result.exit_code not in (0, 1, 2):
            return f"exit {result.exit_code}"
        if result.exit_code and (self.folder / "out").exists():
            return "refused, but the target is there"
        lines = result.output.strip().splitlines()
        if result.exit_code == 1 and (len(lines) != 1 or len(lines[0]) > 3000):
            return f"not one sentence: {result.output[:500]!r}"
        if any(ord(mark) < 32 for mark in result.output if mark not in "\n\r"):
            return f"controls in the output: {result.output[:500]!r}"
        return None


def weights(bench: Bench, random: Random, kind: str, data: bytes) -> str | None:
    """A weight file: refused, or the tensors of the judge bit for bit."""
    source = bench.source(kind)
    path = next(path for path in source.iterdir() if path.name != "config.json")
    path.write_bytes(data)
    before = bench.stamp()
    try:
        table = open_checkpoint(path).tensors
        with AtomicFolder(bench.folder / "out") as staging:
            write_weights(staging, table)
    except BsaError as error:
        if len(str(error)) > 3000 or "\n" in str(error):
            return f"not one sentence: {str(error)[:300]!r}"
        return "refused, but the target is there" if (bench.folder / "out").exists() else None
    if bench.stamp() != before:
        return "something outside the target changed"
    written = bench.folder / "out" / "model.safetensors"
    if written.stat().st_size > 5 * len(data) + (2 << 20):
        return f"{written.stat().st_size} bytes of {len(data)}"
    with safe_open(written, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    judges = [bench.state, judge(kind, path)]
    return None if any(same(found, state) for state in judges if state is not None) else f"{len(found)} other tensors"


def judge(kind: str, path: Path) -> dict[str, torch.Tensor] | None:
    """What torch or safetensors reads in a file; None where it refuses."""
    try:
        if kind == "safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return None
    for _ in range(9):
        if not isinstance(saved, dict) or any(
            isinstance(value, torch.Tensor) and value.ndim for value in saved.values()
        ):
            break
        inner = [value for key, value in saved.items() if isinstance(value, dict) and key != "optimizer"]
        saved = next((value for value in inner if value), None)
    if not isinstance(saved, dict):
        return None
    return {name: value for name, value in saved.items() if isinstance(value, torch.Tensor) and isinstance(name, str)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether two tables have the same names, dtypes, shapes and bits."""

    def bits(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    return found.keys() == expected.keys() and all(
        (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        and bits(tensor) == bits(expected[name])
        for name, tensor in found.items()
    )


def zip_case(bench: Bench, random: Random) -> str | None:
    kind = random.choice(("zip", "wrapped"))
    data = bench.pristine[kind]
    return weights(
        bench, random, kind, mutate.of_zip(random, data) if random.random() < 0.8 else mutate.of_bytes(random, data)
    )


def legacy_case(bench: Bench, random: Random) -> str | None:
    data = bench.pristine["legacy"]
    head, rest = data[:6000], data[6000:]
    match random.randrange(5):
        case 0:
            changed = mutate.of_bytes(random, data)
        case 1:
            changed = mutate.amplifier(random) + data
        case 2:
            changed = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + mutate.program(random)
        case _:
            changed = mutate.of_bytes(random, head) + rest
    return weights(bench, random, "legacy", changed)


def safetensors_case(bench: Bench, random: Random) -> str | None:
    return weights(bench, random, "safetensors", mutate.of_safetensors(random, bench.pristine["safetensors"]))


def index_case(bench: Bench, random: Random) -> str | None:
    source = bench.source()
    (source / "model.safetensors").unlink()
    names, shards = list(bench.state), {}
    for number in (1, 2):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: bench.state[name] for name in names[number - 1 :: 2]}, source / shard)
        shards |= dict.fromkeys(names[number - 1 :: 2], shard)
    index = mutate.of_json(random, {"metadata": {"total_size": 1}, "weight_map": shards})
    (source / "model.safetensors.index.json").write_bytes(index)
    try:
        found = open_checkpoint(source).tensors
    except BsaError:
        return None
    return None if found.keys() <= bench.state.keys() else "other names"


def zero_case(bench: Bench, random: Random) -> str | None:
    run = bench.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(bench.folder / f"zero {random.choice((2, 3))}", run)
    path = random.choice(sorted((run / ZERO_STEP).iterdir()))
    path.write_bytes(mutate.of_zip(random, path.read_bytes()))
    if random.random() < 0.1:
        random.choice(sorted((run / ZERO_STEP).iterdir())).unlink()
    try:
        write_weights(bench.folder / "run", open_checkpoint(run).tensors)
    except BsaError:
        return None
    return None if (run / "model.safetensors").stat().st_size < 200_000 else "too much was written"


def convert_case(bench: Bench, random: Random, source: Path, *options: object) -> str | None:
    """A conversion by command: refused in a sentence, or a folder with the right files, and JSON as it should be."""
    before = bench.stamp()
    out = bench.folder / "out"
    dry = random.random() < 0.5
    result = bench.convert(source, out, *options, *(["--dry-run"] if dry else []))
    if bench.stamp() != before:
        return "something outside the target changed"
    if (wrong := bench.done(result)) or result.exit_code or dry:
        return wrong
    for path in out.rglob("*.json"):
        json.loads(path.read_bytes(), parse_constant=lambda text: 1 / 0)
    if any(path.is_symlink() for path in out.rglob("*")):
        return "a link in the target"
    check = integrity.check_file(out)
    return None if check.reason == "" else f"what was written is not right: {check.reason}"


def config_case(bench: Bench, random: Random) -> str | None:
    source = bench.source()
    spoil(random, source / "config.json", mutate.of_json(random, bench.config))
    return convert_case(bench, random, source)


def sidecar_case(bench: Bench, random: Random) -> str | None:
    source = bench.source(sidecars=True)
    name = random.choice([*SIDECARS, *TEXTS])
    if name in SIDECARS:
        spoil(random, source / name, mutate.of_json(random, SIDECARS[name]))
    elif name == "README.md" and random.random() < 0.7:
        spoil(random, source / name, TEXTS[name].replace("tags:", random.choice(YAML) + "\ntags:").encode())
    else:
        spoil(random, source / name, mutate.of_bytes(random, TEXTS[name].encode()))
    return convert_case(bench, random, source)


def options_case(bench: Bench, random: Random) -> str | None:
    source = bench.source()
    given = bench.folder / "given"
    kind = random.choice(("--sparsity", "--layout", "--config"))
    content = {"--sparsity": SPARSITY, "--config": bench.config}.get(kind)
    data = mutate.of_json(random, content) if content else layout(random, bench)
    spoil(random, given, data)
    try:
        more = ["--mode", "custom", "--block", "16"] if kind == "--layout" else []
        return convert_case(bench, random, source, kind, given, *more)
    finally:
        remove(given)


def layout(random: Random, bench: Bench) -> bytes:
    path = bench.folder / "layout"
    save_file({"layout": torch.ones(2, 16, 16, dtype=torch.uint8)}, path)
    data = path.read_bytes()
    path.unlink()
    return random.choice(
        (lambda: mutate.of_safetensors(random, data), lambda: bench.pristine["zip"], lambda: b"\x93NUMPY")
    )()


def record_case(bench: Bench, random: Random) -> str | None:
    folder = bench.folder / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.folder / "converted", folder)
    name = random.choice(RECORDS)
    content: object = {"status": "passed", "checks": [], "files": {}}
    if (folder / name).is_file():
        content = json.loads((folder / name).read_bytes())
    spoil(random, folder / name, mutate.of_json(random, content))
    steps: tuple[Callable[[Path], object], ...] = (
        read_conversion, read_verification, read_pull, open_folder, integrity.check_file, integrity.check_layout,
        card.complete,
    )  # fmt: skip
    for step in steps:
        try:
            step(folder)
        except (BsaError, FileNotFoundError):
            continue
    return None


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)


def spoil(random: Random, path: Path, data: bytes) -> None:
    """Writes `data`, or makes the path something else than a file of it."""
    remove(path)
    match random.randrange(40):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to("/dev/zero")
        case 2:
            path.mkdir()
        case 3:
            path.write_bytes(data)
            os.truncate(path, 5 << 30) if os.environ.get("FUZZ_LARGE") else os.truncate(path, 150 << 20)
        case 4:
            path.symlink_to(path.name)
        case 5:
            path.symlink_to("/nowhere/at/all")
        case _:
            path.write_bytes(data)


# Of 40 cases in a row so many are of a kind: those that run a whole command take longer.
SHARES = {
    "zip": 12,
    "legacy": 8,
    "safetensors": 8,
    "index": 4,
    "config": 2,
    "sidecar": 2,
    "options": 2,
    "record": 1,
    "zero": 1,
}
KINDS: dict[str, Callable[[Bench, Random], str | None]] = {
    "zip": zip_case,
    "legacy": legacy_case,
    "safetensors": safetensors_case,
    "index": index_case,
    "config": config_case,
    "sidecar": sidecar_case,
    "options": options_case,
    "record": record_case,
    "zero": zero_case,
}
