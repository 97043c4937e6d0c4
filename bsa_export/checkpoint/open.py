"""What a path holds: a weight file, an index of shards, or a folder with either. Content decides, not the ending."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from bsa_export.checkpoint.restricted_pickle import describe
from bsa_export.checkpoint.safetensors_file import read_safetensors
from bsa_export.checkpoint.table import MAX_TENSORS, Checkpoint, Skipped, SkipReason, Tensor, file_stamp
from bsa_export.checkpoint.torch_file import read_torch
from bsa_export.checkpoint.zero_folder import find_zero_folder, open_zero_folder
from bsa_export.errors import CheckpointError
from bsa_export.files import MAX_JSON_BYTES, open_file, read_json
from bsa_export.text import some

# The names of the Hub, in the order of preference; then any single file with one of these endings.
KNOWN_NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
ZERO_SHARDS = "*zero_pp_rank_*_states.pt"  # of the optimizer, and with stage 3 of the model
NOT_WEIGHTS = (
    "adapter_model.*", "dl_state_dict*", "optimizer*", "*optim_states.pt", "random_states*", "rng_state*", "sampler*",
    "scaler*", "scheduler*", "training_args.bin", ZERO_SHARDS,
)  # fmt: skip
SHARD = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.")
# Where training scripts put the weights, the usual name first; any other name will do if it is the only one.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# Entries of a saved object that hold tensors and are not the model.
NOT_MODEL = re.compile(
    r".*(optim|scheduler|scaler|rng|random).*|amp|callbacks|loops|(.*_)?metrics|hyper_parameters|hparams|args|config"
    r"|(.*\._)?extra_state|buffer_names|param_shapes",
    re.DOTALL,
)
# What training and distribution put into names: anywhere, and in front of all names.
WRAPPED_ANYWHERE = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)\.")
WRAPPED_IN_FRONT = ("module.", "_forward_module.", "_module.")
AVERAGED = "n_averaged"  # the counter that torch.optim.swa_utils.AveragedModel has next to `module.`
MAX_WRAPPERS = 8  # that are in each other
MAX_SKIPPED = 100

HEADS = {
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the weights with git lfs pull"),
    b"<": ("an HTML or XML page", "download the file itself, not the page that shows it"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"\x89HDF": ("an HDF5 file (Keras)", "save the model from PyTorch"),
    b"GGUF": ("a GGUF file", "use the original weights"),
    b"\x93NUMPY": ("a numpy array", "name the checkpoint"),
    b"BZh": ("a bzip2 archive", "unpack it first"),
    b"\xfd7zXZ": ("an xz archive", "unpack it first"),
    b"(\xb5/\xfd": ("a Zstandard archive", "unpack it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"\x08": ("an ONNX model, or another protocol buffer", "use the PyTorch weights it was exported from"),
}
_TENSORFLOW = "convert it with transformers' convert_bert_original_tf_checkpoint_to_pytorch.py"
_PYTORCH = "use the PyTorch weights that it was made from"
_LOAD = "in transformers 4, and save the model from PyTorch"
_MERGE = "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(OUTPUT)"
_JOIN = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
# What a folder without readable weights may hold: pattern, what it is, what to do. The first that is there counts.
ELSEWHERE = (
    ("adapter_*", "an adapter of PEFT, without the model", f"merge it: {_MERGE}"),
    ("*.distcp", "a distributed checkpoint of torch", f"join it: {_JOIN}"),
    ("tf_model*.h5", "TensorFlow weights", f"load them with from_tf=True {_LOAD}"),
    ("flax_model*.msgpack", "Flax weights", f"load them with from_flax=True {_LOAD}"),
    ("*.ckpt.index", "a TensorFlow checkpoint", _TENSORFLOW),
    ("*.onnx", "an ONNX model", _PYTORCH),
    ("onnx", "ONNX models", _PYTORCH),
    ("*.gguf", "GGUF files", _PYTORCH),
    ("openvino_model.*", "an OpenVINO model", _PYTORCH),
    ("rust_model.ot", "weights of rust-bert", _PYTORCH),
)  # fmt: skip


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the table of a checkpoint: which tensors it holds and where their bytes are. No tensor is read.

    Args:
        path: a file of `torch.save` (zip or older) or of safetensors, a `*.index.json` of shards, or a folder with one;
            or a folder of DeepSpeed ZeRO, whose fp32 weights are joined.

    Returns:
        the table. Entries around the state dict (`state_dict`, `model`, any other) are removed, and what wrappers of
        training put into names (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`).

    Raises:
        UnsafePickleError: a pickle names a function. Nothing is ever executed.
        CheckpointError: weights are missing, damaged, or of a kind that cannot be read.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError("expected a file or a folder", found="a device or a pipe", where=path)
        if path.is_dir() and (zero := _zero_folder(path)) is not None:
            return replace(zero, tensors=_without_wrappers(zero.tensors))
        file, others = _weight_file(path) if path.is_dir() else (path, [])
        checkpoint = _open_file(file)
        checkpoint.skipped[:0] = [other_file(path / name, checkpoint) for name in others]
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror or error})", where=error.filename or path) from None
    except ValueError as error:  # a NUL in the path
        raise CheckpointError(f"it cannot be read ({error})", where=path) from None
    tensors = _without_wrappers(checkpoint.tensors)
    if AVERAGED in checkpoint.tensors and AVERAGED not in tensors:
        why = "how many models torch's AveragedModel averaged"
        checkpoint.skipped.append(Skipped(AVERAGED, SkipReason.IN_THE_FILE, why))
    checkpoint.tensors = tensors
    return checkpoint


def _weight_file(folder: Path) -> tuple[Path, list[str]]:
    """The file of a folder that holds its weights, and the names of others that have the ending of weights."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    weights = [name for name in names if name.endswith(WEIGHT_ENDINGS) and not _fits(name, NOT_WEIGHTS)]
    indexes = [name for name in names if name.endswith(".index.json")]
    known = [name for name in KNOWN_NAMES if name in weights or (name in indexes and _is_complete(folder / name))]
    single = [name for name in weights if not SHARD.search(name)]
    if known:
        chosen = known[0]
    elif len(indexes) == 1:
        chosen = indexes[0]
    elif not indexes and len(single) == 1 and len(weights) == 1:
        chosen = single[0]
    elif weights:
        raise CheckpointError(
            "expected one checkpoint",
            found=some(indexes + weights, 12),
            where=folder,
            hint="name the file that you want",
        )
    else:
        raise _nothing_readable(folder)
    return folder / chosen, list(dict.fromkeys(name for name in known + single if name != chosen))


def _nothing_readable(folder: Path) -> CheckpointError:
    """The error for a folder without weights: what it holds, and what to do."""
    names = [name for entry in sorted(folder.iterdir()) for name in _names_in(entry)]
    found, hint = without_weights(names)
    return CheckpointError(
        f"expected a folder with weights ({', '.join(KNOWN_NAMES)})", found=found, where=folder, hint=hint
    )


def _names_in(entry: Path) -> list[str]:
    """The name of a file; of a folder its own with a slash, and those of the files in it."""
    if not entry.is_dir():
        return [entry.name]
    return [f"{entry.name}/", *(f"{entry.name}/{file.name}" for file in sorted(_listed(entry)))]


def without_weights(names: list[str], inside: str = "") -> tuple[str, str | None]:
    """What a folder holds that has no weights at its top, in words, and what to do.

    Args:
        names: of its files, those in folders with their path.
        inside: what is put before a name when it is typed as a source.
    """
    there = list(dict.fromkeys(name[: name.find("/") + 1] or name for name in names))
    below = [
        f"{inside}{name}"
        for name in names
        if "/" in name and name.endswith(WEIGHT_ENDINGS) and not _fits(name.rpartition("/")[2], NOT_WEIGHTS)
    ]
    found = some(there, 12) if there else "an empty folder"
    if "latest" in there and "zero_to_fp32.py" in there:
        return found, "of a DeepSpeed run name the file mp_rank_00_model_states.pt below it, and --config"
    for pattern, what, hint in ELSEWHERE:
        if any(fnmatch(name.rstrip("/"), pattern) for name in there):
            return f"{what} ({found})", f"{hint}; or name {some(below)}" if below else hint
    return found, f"weights are below it: name {some(below)}" if below else None


def _listed(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def other_file(path: Path, checkpoint: Checkpoint) -> Skipped:
    """Why a file with the ending of weights, next to those that are read, is not read itself."""
    chosen = checkpoint.files[0].name if len(checkpoint.files) == 1 else "the sharded checkpoint"
    same = Skipped(path.name, SkipReason.SAME_WEIGHTS, f"{chosen} is read instead")
    if path.name in KNOWN_NAMES:
        return same
    try:
        other = _open_file(path)
        tensors = _without_wrappers(other.tensors)
    except (CheckpointError, OSError):
        return Skipped(path.name, SkipReason.UNREADABLE, "it cannot be read as weights")
    if len(tensors.keys() & _without_wrappers(checkpoint.tensors).keys()) * 2 > len(tensors):
        return same
    names = some(f"{name} {list(row.shape)}" for name, row in tensors.items())
    return Skipped(path.name, SkipReason.OTHER_WEIGHTS, f"it holds other tensors: {names}")


def _zero_folder(folder: Path) -> Checkpoint | None:
    """The checkpoint of DeepSpeed ZeRO that a folder holds, if it holds no weights of a usual name."""
    if any((folder / name).is_file() for name in KNOWN_NAMES) or (found := find_zero_folder(folder)) is None:
        return None
    return open_zero_folder(found)


def _is_complete(index: Path) -> bool:
    return all(os.path.isfile(index.parent / name) for name in set(_weight_map(index).values()))


def _open_file(path: Path) -> Checkpoint:
    if fnmatch(path.name, ZERO_SHARDS):
        raise CheckpointError(
            "expected weights", found="one shard of DeepSpeed ZeRO", where=path, hint=f"name the folder {path.parent}"
        )
    stamp = file_stamp(path)
    head = _head(path)
    if head.lstrip()[:1] == b"{" and not _is_safetensors(head):
        checkpoint = _open_index(path)
    else:
        if (shard := SHARD.search(path.name)) and int(shard[2]) > 1:
            raise CheckpointError(
                f"it is one shard of {int(shard[2])}", where=path, hint="name the index (*.index.json) or the folder"
            )
        tensors, skipped, metadata = _read_file(path, head)
        checkpoint = Checkpoint(tensors, path.parent, [path], skipped, metadata)
    checkpoint.stamps[path] = stamp
    return checkpoint


def _head(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read(512)


def _is_safetensors(head: bytes) -> bool:
    """Whether a file starts with a length, whose upper bytes are 0 as those of no text are, and a JSON object."""
    return head[5:9] == b"\0\0\0{"


def _read_file(path: Path, head: bytes) -> tuple[dict[str, Tensor], list[Skipped], dict[str, str]]:
    """Tensors, what was skipped, and metadata of one weight file."""
    if _is_safetensors(head):
        tensors, metadata = read_safetensors(path)
        return tensors, [], metadata
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return *_state_dict(read_torch(path), path), {}
    found, hint = next((known for start, known in HEADS.items() if head.lstrip().startswith(start)), (None, None))
    if not head:
        found, hint = "an empty file", "download it again"
    elif head[257:262] == b"ustar":
        old = head.startswith(
            (b"./sys_info\0", b"sys_info\0", b"./pickle\0", b"pickle\0", b"./tensors\0", b"tensors\0")
        )
        found = "a tar archive of torch before 0.1.10" if old else "a tar archive"
        hint = "load and save it with a torch between 0.4 and 1.5" if old else "unpack it first"
    elif found is None:
        found = f"a file that starts with {head[:16]!r}"
    raise CheckpointError("expected the weights of torch.save or safetensors", found=found, where=path, hint=hint)


def _state_dict(saved: object, path: Path) -> tuple[dict[str, Tensor], list[Skipped]]:
    """The tensors of a saved object, without the entries around them, and what is stored next to them."""
    skipped: list[Skipped] = []
    outer = ""
    for _ in range(MAX_WRAPPERS):
        inner = _wrapped(saved, path)
        if inner is None or not isinstance(saved, dict):
            break
        skipped += _beside(saved, {inner}, outer)
        saved, outer = saved[inner], f"{outer}{inner}."
    if not isinstance(saved, dict):
        raise CheckpointError(
            "expected a state dict", found=describe(saved), where=path, hint="save model.state_dict() with torch.save"
        )
    tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor) and isinstance(name, str)}
    skipped += _beside(saved, tensors, outer)
    if not tensors:
        raise CheckpointError(
            "expected a state dict with tensors",
            found=some((f"{entry.name} ({entry.why})" for entry in skipped), 8) or "an empty dict",
            where=path,
            hint="save model.state_dict() with torch.save",
        )
    unnamed = [name for name, value in saved.items() if isinstance(value, Tensor) and not isinstance(name, str)]
    if unnamed:
        raise CheckpointError("expected text as the name of each tensor", found=describe(unnamed[0]), where=path)
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"expected at most {MAX_TENSORS:,} tensors", found=f"{len(tensors):,}", where=path)
    for name in tensors:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"the name {ascii(name)} is not valid text", where=path) from None
    return tensors, skipped


def _wrapped(saved: object, path: Path) -> str | None:
    """The entry of a dict that holds the tensors, where they are not in the dict itself.

    Raises:
        CheckpointError: several entries could be the model, and none has a usual name.
    """
    if not isinstance(saved, dict):
        return None
    known: dict[int, int] = {}
    inside = {name: count for name, value in _entries(saved) if (count := _count_tensors(value, known))}
    own = sum(isinstance(name, str) and isinstance(value, Tensor) for name, value in saved.items())
    usual = next((name for name in WRAPPERS if name in inside), None)
    if usual is not None or not inside or own > max(inside.values()):
        return usual
    if len(inside) > 1:
        raise CheckpointError(
            "expected one state dict",
            found=some((f"{name} with {count} tensors" for name, count in inside.items()), 8),
            where=path,
            hint="save only the one that you want, with torch.save",
        )
    return next(iter(inside))


def _entries(saved: Mapping[object, object]) -> Iterator[tuple[str, dict]]:
    """The entries of a dict that are dicts and could be the model."""
    for name, value in saved.items():
        if isinstance(value, dict) and isinstance(name, str) and not NOT_MODEL.fullmatch(name):
            yield name, value


def _count_tensors(saved: Mapping[object, object], known: dict[int, int], depth: int = MAX_WRAPPERS) -> int:
    """How many tensors the state dict in a dict has, or 0. The dict may be the state dict, or hold it in its entries.

    `known` has the counts of the dicts that were seen before: a dict may contain itself, or the same dict many times.
    """
    if id(saved) in known or not depth:
        return known.get(id(saved), 0)
    known[id(saved)] = 0
    found = [value for name, value in saved.items() if isinstance(name, str) and isinstance(value, Tensor)]
    if any(value.shape for value in found):  # numbers alone (a best score, a step) are not those of a model
        count = len(found)
    else:
        count = max((_count_tensors(value, known, depth - 1) for _, value in _entries(saved)), default=0)
    known[id(saved)] = count
    return count


def _beside(saved: Mapping[object, object], taken: Mapping[str, Tensor] | set[str], outer: str) -> list[Skipped]:
    """The entries of a dict that are not in `taken`; only the first of many."""
    others = [(name, value) for name, value in saved.items() if name not in taken]
    skipped = [
        Skipped(
            f"{outer}{name if isinstance(name, (str, int)) else describe(name)}"[:500],
            SkipReason.IN_THE_FILE,
            _what(value),
        )
        for name, value in others[:MAX_SKIPPED]
    ]
    if len(others) > MAX_SKIPPED:
        skipped.append(Skipped(f"{outer}...", SkipReason.IN_THE_FILE, f"{len(others) - MAX_SKIPPED:,} more entries"))
    return skipped


def _what(value: object) -> str:
    return (
        f"a tensor {value.dtype} {list(value.shape)} next to the state dict"
        if isinstance(value, Tensor)
        else describe(value)
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> shard, of an index."""
    index = read_json(path, MAX_JSON_BYTES)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(
            "expected the index of a sharded checkpoint, with a weight_map of tensor to file", where=path
        )
    if len(names) > MAX_TENSORS:
        raise CheckpointError(f"expected at most {MAX_TENSORS:,} tensors", found=f"{len(names):,}", where=path)
    for name in set(names.values()):
        if not name or "\0" in name or name != Path(name).name:
            raise CheckpointError(f"its shard {name!r} is not a plain file name", where=path)
    return names


def _open_index(path: Path) -> Checkpoint:
    weight_map = _weight_map(path)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not os.path.isfile(path.parent / name)]
    if missing:
        raise CheckpointError(
            f"expected {len(shards)} shards",
            found=f"{len(missing)} missing: {some(missing, 12)}",
            where=path,
            hint="download them too",
        )
    checkpoint = Checkpoint({}, path.parent, [path.parent / name for name in shards])
    for shard in checkpoint.files:
        checkpoint.stamps[shard] = file_stamp(shard)
        tensors, skipped, metadata = _read_file(shard, _head(shard))
        checkpoint.skipped += skipped
        checkpoint.metadata |= metadata
        for name, row in tensors.items():
            if weight_map.get(name) == shard.name:
                checkpoint.tensors[name] = row
            else:
                why = f"{path.name} does not name it in {shard.name}"
                checkpoint.skipped.append(Skipped(name, SkipReason.NOT_INDEXED, why))
    absent = [name for name in weight_map if name not in checkpoint.tensors]
    if absent:
        raise CheckpointError(
            f"{weight_map[absent[0]]} lacks {some(absent, 12)}", where=path, hint="is the index of this checkpoint?"
        )
    return checkpoint


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that the model itself gives them."""
    plain = {WRAPPED_ANYWHERE.sub("", name): row for name, row in tensors.items()}
    tensors = plain if len(plain) == len(tensors) else tensors
    while front := _in_front(tensors):
        tensors = {name.removeprefix(front): row for name, row in tensors.items() if name != AVERAGED}
    return tensors


def _in_front(tensors: Mapping[str, Tensor]) -> str | None:
    """What a wrapper put in front of every name."""
    names = [name for name in tensors if name != AVERAGED]
    return next((front for front in WRAPPED_IN_FRONT if names and all(name.startswith(front) for name in names)), None)
