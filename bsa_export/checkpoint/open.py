"""What lies in a path: a weight file, an index of shards, or a folder with either. Content decides, not the ending."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

from bsa_export.checkpoint.restricted_pickle import describe
from bsa_export.checkpoint.safetensors_file import read_safetensors, unique_keys
from bsa_export.checkpoint.table import Checkpoint, Tensor, file_stamp
from bsa_export.checkpoint.torch_file import read_torch
from bsa_export.errors import CheckpointError

# The names of the Hub, in the order of preference; then any single file with one of these endings.
KNOWN_NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
ZERO_SHARDS = "*zero_pp_rank_*_states.pt"  # of the optimizer, and with stage 3 of the model
NOT_WEIGHTS = (
    "adapter_model.*", "optimizer*", "*optim_states.pt", "random_states*", "rng_state*", "scaler*", "scheduler*",
    "training_args.bin", ZERO_SHARDS,
)  # fmt: skip
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
# Where training scripts put the weights, outermost first.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
MAX_INDEX_BYTES = 100_000_000

HEADS = {
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the weights with git lfs pull"),
    b"<": ("an HTML or XML page", "download the file itself, not the page that shows it"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"\x89HDF": ("an HDF5 file (Keras)", "save the model from PyTorch"),
    b"GGUF": ("a GGUF file", "use the original weights"),
    b"\x93NUMPY": ("a numpy array", "name the checkpoint"),
}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the table of a checkpoint: which tensors it holds and where their bytes lie. No tensor is read.

    Args:
        path: a file of `torch.save` (zip or older) or of safetensors, a `*.index.json` of shards, or a folder with one.

    Returns:
        the table; wrappers (`state_dict`, `model`, `module`) and the prefix `module.` are removed.

    Raises:
        UnsafePickleError: a pickle names code. Nothing is ever executed.
        CheckpointError: there are no weights, they are damaged, or they are of a kind that cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError("expected a file or a folder", found="a device or a pipe", where=path)
    try:
        file, skipped = _weight_file(path) if path.is_dir() else (path, [])
        checkpoint = _open_file(file)
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror or error})", where=error.filename or path) from None
    checkpoint.skipped[:0] = skipped
    checkpoint.tensors = _without_prefix(checkpoint.tensors)
    return checkpoint


def _weight_file(folder: Path) -> tuple[Path, list[tuple[str, str]]]:
    """The file of a folder that holds its weights, and the others that could be meant."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    weights = [
        name
        for name in names
        if name.endswith(WEIGHT_ENDINGS) and not any(fnmatch(name, pattern) for pattern in NOT_WEIGHTS)
    ]
    indexes = [name for name in names if name.endswith(".index.json")]
    known = [name for name in KNOWN_NAMES if name in weights or (name in indexes and _is_complete(folder / name))]
    single = [name for name in weights if not SHARD.search(name)]
    if known:
        chosen = known[0]
    elif any(folder.glob(ZERO_SHARDS)) or any(folder.glob(f"*/{ZERO_SHARDS}")):
        raise _zero_shards(folder)
    elif len(indexes) == 1:
        chosen = indexes[0]
    elif not indexes and len(single) == 1 and len(weights) == 1:
        chosen = single[0]
    elif weights:
        raise CheckpointError(
            "expected one checkpoint",
            found=_listed(indexes + weights),
            where=folder,
            hint="name the file that is meant",
        )
    else:
        there = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
        run = "latest" in there and "zero_to_fp32.py" in there
        raise CheckpointError(
            f"expected a folder with weights ({', '.join(KNOWN_NAMES)})",
            found=_listed(there) if there else "an empty folder",
            where=folder,
            hint="of a DeepSpeed run name the file mp_rank_00_model_states.pt below it, and --config" if run else None,
        )
    others = dict.fromkeys(name for name in known + single if name != chosen)
    return folder / chosen, [(name, f"{chosen} is read instead") for name in others]


def _zero_shards(where: Path) -> CheckpointError:
    return CheckpointError(
        "expected weights",
        found="the shards of DeepSpeed ZeRO",
        where=where,
        hint="join them first: python zero_to_fp32.py FOLDER OUTPUT",
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _is_complete(index: Path) -> bool:
    return all((index.parent / name).is_file() for name in _weight_map(index).values())


def _open_file(path: Path) -> Checkpoint:
    if fnmatch(path.name, ZERO_SHARDS):
        raise _zero_shards(path)
    stamp = file_stamp(path)
    with open(path, "rb") as file:
        head = file.read(512)
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


def _is_safetensors(head: bytes) -> bool:
    """Whether a file starts with a length, whose upper bytes are 0 as those of no text are, and a JSON object."""
    return head[5:9] == b"\0\0\0{"


def _read_file(path: Path, head: bytes) -> tuple[dict[str, Tensor], list[tuple[str, str]], dict[str, str]]:
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
        found, hint = "a tar archive (torch before 0.1.10)", "load and save it with a torch between 0.4 and 1.5"
    elif found is None:
        found = f"a file that starts with {head[:16]!r}"
    raise CheckpointError("expected the weights of torch.save or safetensors", found=found, where=path, hint=hint)


def _state_dict(saved: object, path: Path) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The tensors of a saved object, out of its wrappers, and what lies beside them."""
    skipped: list[tuple[str, str]] = []
    outer = ""
    while isinstance(saved, dict):
        wrapper = next((name for name in WRAPPERS if _holds_tensors(saved.get(name))), None)
        if wrapper is None:
            break
        skipped += [(f"{outer}{name}", _what(value)) for name, value in saved.items() if name != wrapper]
        saved, outer = saved[wrapper], f"{outer}{wrapper}."
    if not isinstance(saved, dict):
        raise CheckpointError(
            "expected a state dict", found=describe(saved), where=path, hint="save model.state_dict() with torch.save"
        )
    tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor) and isinstance(name, str)}
    skipped += [(f"{outer}{name}", _what(value)) for name, value in saved.items() if name not in tensors]
    if not tensors:
        found = ", ".join(f"{name} ({what})" for name, what in skipped[:8]) or "an empty dict"
        raise CheckpointError(
            "expected a state dict with tensors",
            found=found,
            where=path,
            hint="save model.state_dict() with torch.save",
        )
    for name in tensors:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"the name {ascii(name)} is not valid text", where=path) from None
    return tensors, skipped


def _holds_tensors(value: object) -> bool:
    """Whether a dict holds tensors, itself or in a wrapper inside it."""
    if not isinstance(value, dict):
        return False
    inside = [value.get(name) for name in WRAPPERS]
    return any(isinstance(item, Tensor) for item in value.values()) or any(
        isinstance(item, dict) and any(isinstance(tensor, Tensor) for tensor in item.values()) for item in inside
    )


def _what(value: object) -> str:
    return (
        f"a tensor {value.dtype} {list(value.shape)} beside the state dict"
        if isinstance(value, Tensor)
        else describe(value)
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> shard, of an index."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(
            f"expected an index of at most {MAX_INDEX_BYTES:,} bytes", found=f"{path.stat().st_size:,}", where=path
        )
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"it is no valid JSON: {str(error)[:200]}", where=path) from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(
            "expected the index of a sharded checkpoint, with a weight_map of tensor to file", where=path
        )
    for name in names.values():
        if name != Path(name).name:
            raise CheckpointError(f"its shard {name!r} is no plain file name", where=path)
    return names


def _open_index(path: Path) -> Checkpoint:
    weight_map = _weight_map(path)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"expected {len(shards)} shards",
            found=f"{len(missing)} missing: {_listed(missing)}",
            where=path,
            hint="fetch them too",
        )
    checkpoint = Checkpoint({}, path.parent, [path.parent / name for name in shards])
    for shard in checkpoint.files:
        checkpoint.stamps[shard] = file_stamp(shard)
        with open(shard, "rb") as file:
            tensors, skipped, metadata = _read_file(shard, file.read(512))
        checkpoint.skipped += skipped
        checkpoint.metadata |= metadata
        for name, row in tensors.items():
            if weight_map.get(name) == shard.name:
                checkpoint.tensors[name] = row
            else:
                checkpoint.skipped.append((name, f"{path.name} does not name it in {shard.name}"))
    absent = [name for name in weight_map if name not in checkpoint.tensors]
    if absent:
        raise CheckpointError(
            f"{weight_map[absent[0]]} lacks {_listed(absent)}", where=path, hint="is the index of this checkpoint?"
        )
    return checkpoint


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the `_orig_mod.` of torch.compile, wherever it stands, and the `module.` that DataParallel puts before every name."""
    plain = {name.replace("_orig_mod.", ""): row for name, row in tensors.items()}
    tensors = plain if len(plain) == len(tensors) else tensors
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): row for name, row in tensors.items()}
    return tensors
