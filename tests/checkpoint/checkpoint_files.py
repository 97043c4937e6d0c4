"""Small checkpoints of every kind, made by torch and safetensors themselves."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from bsa_export.checkpoint.dtypes import read
from bsa_export.checkpoint.table import Tensor


def small_state() -> dict[str, torch.Tensor]:
    """Tensors of many dtypes and shapes; nothing shared, everything contiguous."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "embeddings.word_embeddings.weight": torch.randn(7, 4, generator=generator),
        "embeddings.position_ids": torch.arange(6).expand(1, -1).clone(),
        "encoder.half": torch.randn(3, 5, generator=generator).half(),
        "encoder.bfloat": torch.randn(3, 5, generator=generator).bfloat16(),
        "encoder.double": torch.randn(2, generator=generator).double(),
        "encoder.flags": torch.tensor([True, False, True]),
        "encoder.bytes": torch.arange(5, dtype=torch.uint8),
        "encoder.scalar": torch.tensor(3, dtype=torch.int32),
        "encoder.empty": torch.zeros(0, 4),
    }
    return state


def save_sharded(folder: Path, state: dict[str, torch.Tensor], ending: str) -> Path:
    """Three shards and their index; returns the index."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names, weight_map = list(state), {}
    for number in range(3):
        part = {name: state[name] for name in names[number::3]}
        shard = f"{stem}-{number + 1:05d}-of-00003.{ending}"
        save_file(part, folder / shard) if ending == "safetensors" else torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


KINDS = (
    "zip",
    "legacy",
    "safetensors",
    "sharded bin",
    "sharded safetensors",
    "zip protocol 4",
    "wrapped",
    "DataParallel",
)


def save_as(kind: str, folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """Save `state` in `folder` as `kind`; returns the path to open."""
    path = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    match kind:
        case "zip":
            torch.save(state, path)
        case "zip protocol 4":
            torch.save(state, path, pickle_protocol=4)
        case "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        case "safetensors":
            save_file(state, path)
        case "sharded bin" | "sharded safetensors":
            return save_sharded(folder, state, kind.split()[1])
        case "wrapped":
            torch.save({"epoch": 3, "module": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}}, path)
        case "DataParallel":
            torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    return path


def torch_zip(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **entries: bytes) -> Path:
    """A zip such as torch.save writes, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return path


def torch_legacy(
    path: Path, pickled: bytes, keys: list[str] = (), storages: bytes = b"", little_endian: bool = True
) -> Path:
    """A file such as torch.save wrote before 1.6, with any pickle in it."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}]
    path.write_bytes(
        b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps(list(keys), 2) + storages
    )
    return path


class PersistentId(tuple):
    """A tuple that is pickled as a persistent id."""


def pickled(value: object, protocol: int = 2) -> bytes:
    """`value` as a pickle in which every PersistentId is one."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return tuple(item) if isinstance(item, PersistentId) else None

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(value)
    return stream.getvalue()


class Call:
    """Pickled as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.parts = (function, args)

    def __reduce__(self):
        return self.parts


def storage(kind=torch.FloatStorage, key="0", numel=6, *view) -> PersistentId:
    return PersistentId(("storage", kind, key, "cpu", numel, *view))


def tensor(storage, offset=0, shape=(2, 3), strides=(3, 1), *rest) -> Call:
    """Pickled as torch pickles a tensor."""
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, *(rest or (False, {})))


def same(row: Tensor, judge: torch.Tensor) -> bool:
    """Whether a row has the dtype, the shape and every byte of a tensor."""
    dtypes = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float64: "F64",
        torch.int64: "I64",
        torch.int32: "I32",
    }
    dtypes |= {
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.int16: "I16",
        torch.uint16: "U16",
        torch.complex64: "C64",
    }
    dtypes |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
    judged = judge.detach().contiguous()
    data = judged.reshape(-1).view(torch.uint8).numpy().tobytes() if judged.numel() else b""
    return row.dtype == dtypes[judge.dtype] and row.shape == tuple(judge.shape) and read(row).tobytes() == data


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ZERO_STEP = "global_step7"
ZERO_GROUPS = [
    {"bert.embeddings.word_embeddings.weight": (7, 5), "bert.encoder.layer.0.dense.weight": (5, 5), "one": (1,)},
    {"bert.encoder.layer.0.dense.bias": (5,), "bert.scalar": ()},
]
ZERO_FROZEN = {"bert.pooler.dense.weight": (3, 5)}


def values(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(flat, (0, -len(flat) % multiple))


def save_zero(folder, stage: int, ranks: int, prefix: str = ""):
    """What DeepSpeed 0.19 saves of ZERO_GROUPS and ZERO_FROZEN, as far as joining needs it. Returns the run folder."""
    step = folder / ZERO_STEP
    step.mkdir(parents=True)
    (folder / "latest").write_text(ZERO_STEP)
    trained = {
        name: values(shape, number)
        for number, (name, shape) in enumerate(pair for g in ZERO_GROUPS for pair in g.items())
    }
    frozen = {name: values(shape, 99) for name, shape in ZERO_FROZEN.items()}
    model = {
        "module": {"bert.position_ids": torch.arange(4), "bert.encoder.layer.0.dense.bias": torch.zeros(5).half()},
        "buffer_names": ["bert.position_ids"],
        "param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in ZERO_GROUPS],
        "frozen_param_shapes": {name: torch.Size(shape) for name, shape in ZERO_FROZEN.items()},
        "shared_params": {"cls.decoder.weight": "bert.embeddings.word_embeddings.weight"},
        "ds_version": "0.19.6",
    }
    for rank in range(ranks):

        def part(tensor: torch.Tensor, rank: int = rank) -> torch.Tensor:
            return padded(tensor.reshape(-1), ranks).reshape(ranks, -1)[rank].clone()

        if stage == 3:
            parts = [
                part(tensor) for tensor in trained.values()
            ]  # large models have several vectors, which go on as one
            state = {"fp32_flat_groups": [torch.cat(parts[:2]), torch.cat(parts[2:])]}
        else:
            vectors = [torch.cat([trained[name].reshape(-1) for name in group]) for group in ZERO_GROUPS]
            state = {"single_partition_of_fp32_groups": [part(padded(vector, 2 * ranks)) for vector in vectors]}
        state |= {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks, ranks]}
        torch.save(
            {
                "optimizer_state_dict": state | {"base_optimizer_state": [{"exp_avg": torch.ones(3)}]},
                "ds_version": "0.19.6",
            },
            step / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        fragments = {name: part(tensor) if stage == 3 else tensor for name, tensor in frozen.items()}
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(model | {"frozen_param_fragments": fragments}, step / name)
    return folder
