"""Changes to JSON, pickles, zip archives and plain bytes that keep most of their structure. All follow a seed."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import struct
import zipfile
from random import Random

RAW = "<<RAW {}>>"  # a string in JSON that becomes the text in `RAW_TEXTS`
RAW_TEXTS = (
    "NaN", "-Infinity", "1e999", "-0", "9" * 5000, "1" * 400, '"\\ud800"', "{'a': 1}", "[" * 3000, "", "1²3", "0x10",
    "01", '{"a": 1, "a": 2}', '"\x00"', "tru", '"\\u0000"', "1_000", "[1,]", "-", "1.5e-400",
)  # fmt: skip
VALUES: tuple[object, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 64, 2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 0.5, 128.0, 1e300,
    -0.0, "", "a", "bert", "float32", "../../x", "./.", "/etc/passwd", "a" * 5000, "\x1b[31mred", "x\nError: y",
    "<script>", "`|`", "\u202e", "𝒳", "None", [], {}, [[]], [None], [1, 2, 3], ["a"] * 3, {"a": 1}, [{}], {"": ""},
    [[[[[[[]]]]]]],
)  # fmt: skip


def of_json(random: Random, content: object) -> bytes:
    """The text of JSON in which a few values or names are others."""
    content = copy.deepcopy(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = _change(random, content)
    text = json.dumps(content)
    for number, raw in enumerate(RAW_TEXTS):
        text = text.replace(json.dumps(RAW.format(number)), raw)
    data = text.encode("utf-8", "surrogatepass")
    match random.randrange(40):
        case 0:
            data = text.encode("utf-16", "replace")
        case 1:
            data = b"\xef\xbb\xbf" + data
        case 2:
            data = of_bytes(random, data)
        case 3:
            data = b"[" * 100_000
        case 4:
            data = b""
    return data


def _change(random: Random, content: object) -> object:
    places = list(_places(content))
    if not places or random.random() < 0.03:
        return _value(random, content)
    holder, key = random.choice(places)
    match random.randrange(6):
        case 0 if isinstance(holder, dict):
            holder[random.choice(("", "__metadata__", "\ud800", "a" * 300, "\x1b[2J", str(key) + " "))] = holder.pop(
                key
            )
        case 1:
            del holder[key]
        case 2 if isinstance(holder, dict):
            holder[f"{key}_2"] = copy.deepcopy(holder[key])
        case 3:
            other, place = random.choice(places)
            holder[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
        case _:
            holder[key] = _value(random, holder[key])
    return content


def _places(content: object):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


def _value(random: Random, old: object) -> object:
    if isinstance(old, int) and not isinstance(old, bool) and random.random() < 0.4:
        return old + random.choice((-1, 1, 2**20, -old * 2, old))
    if random.random() < 0.3:
        return RAW.format(random.randrange(len(RAW_TEXTS)))
    return copy.deepcopy(random.choice(VALUES))


def of_bytes(random: Random, data: bytes) -> bytes:
    """Bytes of which some are cut off, cut out, repeated, flipped or zeroed."""
    if not data:
        return b"\x00"
    changed = bytearray(data)
    near = random.choice((0, max(0, len(data) - 2000), random.randrange(len(data))))
    start = min(len(data) - 1, near + random.randrange(2000))
    length = random.choice((1, 1, 2, 4, 8, 64))
    match random.randrange(6):
        case 0:
            del changed[start:]
        case 1:
            del changed[start : start + length]
        case 2:
            changed[start:start] = changed[start : start + length]
        case 3:
            changed[start] ^= 1 << random.randrange(8)
        case 4:
            changed[start : start + length] = bytes(len(changed[start : start + length]))
        case 5:
            changed[start] = random.choice((0, 1, 0x2E, 0x7F, 0x80, 0xFF))
    return bytes(changed)


NAMES = (
    "os system", "builtins eval", "collections OrderedDict", "torch Size", "torch FloatStorage", "my.project Config",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch.nn.modules.linear Linear", "a b",
    "torch._utils _rebuild_tensor_v3", "torch._tensor _rebuild_from_type_v2", "copyreg _reconstructor",
    "subprocess Popen",
    "builtins getattr", "torch float16", "torch.serialization load", "numpy.core.multiarray scalar",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 255, 65535, 2**31 - 1, -(2**31), 2**31, 2**62, 2**63, 2**64 + 1, 10**40)


def of_pickle(random: Random, data: bytes) -> bytes:
    """A pickle with other arguments, and opcodes that are left out, repeated, exchanged or put in."""
    try:
        operations = _operations(data)
    except Exception:
        return of_bytes(random, data)
    for _ in range(random.choice((1, 1, 2, 4))):
        place = random.randrange(len(operations))
        match random.randrange(8):
            case 0:
                del operations[place]
            case 1:
                operations.insert(place, operations[random.randrange(len(operations))])
            case 2:
                other = random.randrange(len(operations))
                operations[place], operations[other] = operations[other], operations[place]
            case 3:
                operations.insert(place, _opcode(random))
            case 4:
                operations[place] = _opcode(random)
            case 5:
                operations[place : place + 1] = operations[place : place + 1] * random.choice((2, 500, 5000))
            case _:
                numbers = [n for n, part in enumerate(operations) if part[:1] in b"KMJI\x8aX\x8c"]
                if numbers:
                    operations[random.choice(numbers)] = _opcode(random, plain=True)
        if not operations:
            break
    return b"".join(operations)


def _operations(data: bytes) -> list[bytes]:
    positions = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(positions, [*positions[1:], len(data)], strict=True)]


def _opcode(random: Random, plain: bool = False) -> bytes:
    """One opcode with its argument."""
    match random.randrange(3 if plain else 8):
        case 0:
            number = random.choice(NUMBERS)
            raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case 1:
            text = random.choice(
                ("", "storage", "cpu", "0", "w" * 300, "\x1b[1m", "a\nb", "bert.encoder", "é")
            ).encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case 2:
            return b"K" + bytes([random.randrange(256)])
        case 3:
            return f"c{random.choice(NAMES)}\n".replace(" ", "\n").encode()
        case 4:
            return random.choice((b"h", b"q")) + bytes([random.randrange(40)])
        case 5:
            return random.choice((b"j", b"r")) + struct.pack("<I", random.choice((0, 5, 2**31, 2**32 - 1)))
    return random.choice([code.code.encode("latin1") for code in pickletools.opcodes if code.arg is None])


PROGRAM = [bytes([code]) for code in b"]})(N201tldaesuRbQo\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94"]


def program(random: Random) -> bytes:
    """A pickle of random opcodes, many of which fit together; some repeat a part thousands of times."""
    parts = [b"\x80\x04"]
    for _ in range(random.randrange(1, 60)):
        part = random.choice((_opcode(random), random.choice(PROGRAM), b"h" + bytes([random.randrange(6)])))
        if random.random() < 0.05:
            part = (part + random.choice(PROGRAM)) * random.choice((10, 3000))
        parts.append(part)
    return b"".join(parts) + random.choice((b".", b"t.", b"0.", b""))


def amplifier(random: Random) -> bytes:
    """A pickle that makes much out of little: what is long is named again and again."""
    count = random.choice((100, 3000, 20_000))
    values = b"(" + b"K\x01" * count
    pairs = b"(" + b"K\x01K\x02\x86" * count
    filled = b"}" + values + b"N" * (count % 2) + b"u"
    long = random.choice((values + b"l", values + b"t", pairs + b"l", filled))
    use = random.choice(
        (
            b"h\x00",
            b"h\x00\x85",
            b"ccollections\nOrderedDict\nh\x00\x85R",
            b"ctorch\nSize\nh\x00\x85R",
            b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x00h\x00tR",
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuh\0tQ",
            b"ccollections\nOrderedDict\nh\x00\x85R\x85\x86"[:-1],
            b"h\x00h\x00\x86h\x00\x86",
        )
    )
    nested = b"(" + b"l\x94".join([b"h\x00h\x00("] * 30) if random.random() < 0.2 else b""
    head = b"\x80\x02" + long + b"q\x000}X\x01\x00\x00\x00w("
    return head + (use + b"0" if random.random() < 0.3 else use) * random.choice((1, 100, 3000)) + nested + b"ls."


def of_zip(random: Random, data: bytes, pickled: str = "data.pkl") -> bytes:
    """An archive of torch.save with another pickle, other entries, or other headers."""
    if random.random() < 0.35:
        return _headers(random, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    number = next(n for n, (name, _) in enumerate(entries) if name.endswith(pickled))
    name, content = entries[number]
    match random.randrange(10):
        case 0:
            entries[number] = name, program(random)
        case 1:
            entries[number] = name, amplifier(random)
        case 2:
            del entries[random.randrange(len(entries))]
        case 3:
            entries.append((random.choice(entries)[0], b"x"))
        case 4:
            other = random.randrange(len(entries))
            entries[other] = entries[other][0], of_bytes(random, entries[other][1])
        case 5:
            other = random.randrange(len(entries))
            entries[other] = random.choice(("../x", "/x", "a/constants.pkl", "b/data.pkl", "")), entries[other][1]
        case _:
            entries[number] = name, of_pickle(random, content)
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if random.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name or "x"), content)
    return stream.getvalue()


def _headers(random: Random, data: bytes) -> bytes:
    """Fields of the local headers, the directory and its end, changed."""
    changed = bytearray(data)
    sign = random.choice((b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x07\x08", b"PK\x06\x06"))
    starts = [place for place in range(len(data) - 4) if data[place : place + 4] == sign]
    if not starts:
        return of_bytes(random, data)
    start = random.choice(starts) + random.randrange(4, 46)
    width = random.choice((1, 2, 4))
    value = random.choice((0, 1, 8, 0x800, 0xFF, 0xFFFF, 0xFFFF_FFFF, random.getrandbits(32)))
    changed[start : start + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return bytes(changed)


def of_safetensors(random: Random, data: bytes) -> bytes:
    """A file with another header, and a length that mostly fits it."""
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = data[8 : 8 + length], data[8 + length :]
    match random.randrange(8):
        case 0:
            return of_bytes(random, data)
        case 1:
            header = of_bytes(random, header)
        case 2:
            first = header.rstrip()[:-1]
            header = first + b"," + first[1 : 1 + first.find(b"},")] + b"}}"  # the first tensor twice
        case 3:
            tensors += bytes(random.choice((1, 8)))
        case _:
            header = of_json(random, json.loads(header))
    if random.random() < 0.3:
        header += b" " * random.choice((1, 7, 8, 5000))
    length = len(header) if random.random() < 0.9 else random.choice((0, 1, len(header) + 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + header + tensors
