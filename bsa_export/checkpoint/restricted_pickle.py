"""Read a pickle without running it: an interpreter of opcodes that neither imports nor calls what the pickle names."""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from bsa_export.errors import CheckpointError, UnsafePickleError

# A pickle of 4,000 tensors has 130,000 opcodes; the limits keep a pickle made to exhaust memory or time from doing so.
MAX_OPCODES = 5_000_000
MAX_PICKLE_BYTES = 256 << 20

# Objects that training scripts leave beside the tensors. They are not built: each becomes an `Unbuilt`.
HARMLESS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_codecs": "encode",
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
        "collections": "Counter defaultdict deque OrderedDict",
        "copyreg": "_reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "numpy": "dtype ndarray bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
        "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
        "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "torch": "Generator Tensor device dtype",
        "torch.nn.parameter": "Buffer Parameter",
        "torch.torch_version": "TorchVersion",
        "types": "SimpleNamespace",
        "typing": "Any",
        "uuid": "UUID",
    }.items()
    for name in names.split()
)
# Of these libraries any class may lie in a checkpoint (a config, an enum, a model): CapWords, never functions.
TRAINING_LIBRARIES = frozenset({
    "accelerate", "apex", "deepspeed", "fairseq", "fairseq2", "lightning", "lightning_fabric", "megatron", "omegaconf",
    "pytorch_lightning", "tokenizers", "transformers",
})  # fmt: skip
CLASS_MODULES = ("numpy.dtypes", "numpy.random.", "torch.distributed.fsdp", "torch.nn.modules.", "torch.optim")
# Of Python 2, and of Python 3.13.
OTHER_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to. It is not imported."""

    name: str


@dataclass(frozen=True, eq=False)
class Unbuilt:
    """Stands for an object that was not built, of the class or from the function `name`."""

    name: str


class _Malformed(Exception):
    """The opcodes make no sense together."""


def load(
    stream: BinaryIO,
    where: object,
    rebuild: Mapping[str, Callable[[tuple], object] | None],
    persistent: Callable[[object], object],
) -> object:
    """Read one pickle of any protocol from `stream`, which then stands right behind it.

    Args:
        stream: a binary file whose `read(n)` never allocates more than it has left (`BytesIO`, `mmap`).
        where: the file that error messages name.
        rebuild: global name -> function of the argument tuple, called where the pickle calls that name; None where the
            name may only be referred to.
        persistent: makes the value of a persistent id.

    Returns:
        dicts (also for OrderedDict and defaultdict), lists (also for sets), tuples, strings, bytes, numbers, None,
        `Global`, `Unbuilt` and what `rebuild` and `persistent` made.

    Raises:
        UnsafePickleError: a global is none of `rebuild`, HARMLESS and the classes of training libraries.
        CheckpointError: the pickle is damaged, too long, or `rebuild` or `persistent` refused.
    """
    machine = _Machine(where, rebuild, persistent)
    try:
        return machine.run(stream)
    # ValueError, struct.error: pickletools on damaged arguments; LookupError: an empty stack, no such memo entry.
    except (_Malformed, LookupError, ValueError, struct.error, OverflowError, RecursionError) as error:
        reason = str(error) if isinstance(error, (_Malformed, ValueError)) else "its opcodes do not fit together"
        raise CheckpointError(
            f"its pickle cannot be read: {reason[:200]}", where=where, hint="is the file complete?"
        ) from None


def _checked_global(module: str, name: str, rebuild: Mapping, where: object) -> Global:
    module = OTHER_MODULES.get(module, module)
    full = f"{module}.{name}"
    is_class = name.isidentifier() and name.lstrip("_")[:1].isupper()
    if (
        full in rebuild
        or full in HARMLESS
        or (is_class and module.partition(".")[0] in TRAINING_LIBRARIES)
        or (is_class and module.startswith(CLASS_MODULES))
    ):
        return Global(full)
    raise UnsafePickleError(
        "expected a pickle that names only tensors and plain settings",
        found=f"{full if full.isprintable() else ascii(full)}"[:200] + ", which could run code; nothing was executed",
        where=where,
        hint="if the file is your own, save its state_dict alone",
    )


class _Machine:
    """The stack and the memo of one pickle. Every method named as an opcode of `pickletools` executes it."""

    def __init__(self, where, rebuild, persistent):
        self.where, self.rebuild, self.persistent = where, rebuild, persistent
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, object] = {}

    def run(self, stream: BinaryIO) -> object:
        methods = {}
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            name = opcode.name
            method = methods.get(name)
            if method is None:
                if name == "STOP":
                    if len(self.stack) != 1 or self.marks:
                        raise _Malformed(f"it ends with {len(self.stack)} values")
                    return self.stack[0]
                method = methods[name] = self.method(name)
            if count > MAX_OPCODES:
                raise _Malformed(f"it has more than {MAX_OPCODES:,} opcodes")
            method(arg)
        raise _Malformed("it ends early")

    def method(self, name: str) -> Callable[[object], object]:
        if name in _PUSH_ARGUMENT:
            return self.push
        if name in _PUSH_CONSTANT:
            make = _PUSH_CONSTANT[name]
            return lambda _: self.stack.append(make())
        method = getattr(self, name, None)
        if method is None:
            raise _Malformed(f"the opcode {name} has no place in a checkpoint")
        return method

    def push(self, arg):
        self.stack.append(arg)

    def pop_to_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def call(self, function: object, args: object) -> object:
        """What stands for `function(*args)`. Only functions of `rebuild` are called."""
        if not isinstance(args, tuple) or not isinstance(function, (Global, Unbuilt)):
            raise _Malformed("it calls what is not a name")
        if isinstance(function, Unbuilt):
            return function
        if rebuild := self.rebuild.get(function.name):
            return rebuild(args)
        if function.name in ("collections.OrderedDict", "collections.defaultdict"):
            pairs = args[0] if args and isinstance(args[0], list) else []
            return {_key(pair[0]): pair[1] for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2}
        if function.name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
            return Unbuilt(args[0].name)
        return Unbuilt(function.name)

    # Opcodes, in the order of the pickletools documentation.

    def PROTO(self, _):
        pass

    FRAME = PROTO

    def POP(self, _):
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def DUP(self, _):
        self.stack.append(self.stack[-1])

    def MARK(self, _):
        self.marks.append(self.stack)
        self.stack = []

    def POP_MARK(self, _):
        self.pop_to_mark()

    def BINPUT(self, index):
        self.memo[index] = self.stack[-1]

    PUT = LONG_BINPUT = BINPUT

    def MEMOIZE(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def BINGET(self, index):
        self.stack.append(self.memo[index])

    GET = LONG_BINGET = BINGET

    def TUPLE(self, _):
        items = tuple(self.pop_to_mark())
        self.stack.append(items)

    def TUPLE1(self, _):
        self.stack[-1:] = [(self.stack[-1],)]

    def TUPLE2(self, _):
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def TUPLE3(self, _):
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def LIST(self, _):
        items = self.pop_to_mark()
        self.stack.append(items)

    FROZENSET = LIST

    def APPENDS(self, _):
        self.append(self.pop_to_mark())

    ADDITEMS = APPENDS

    def APPEND(self, _):
        self.append([self.stack.pop()])

    def append(self, items: list):
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Unbuilt):
            raise _Malformed(f"it appends to a {type(target).__name__}")

    def DICT(self, _):
        items = self.pop_to_mark()
        self.stack.append({})
        self.set_items(items)

    def SETITEMS(self, _):
        self.set_items(self.pop_to_mark())

    def SETITEM(self, _):
        items = [self.stack[-2], self.stack[-1]]
        del self.stack[-2:]
        self.set_items(items)

    def set_items(self, items: list):
        if len(items) % 2:
            raise _Malformed("a dict has a key without a value")
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_key(key)] = value
        elif not isinstance(target, Unbuilt):
            raise _Malformed(f"it sets items of a {type(target).__name__}")

    def GLOBAL(self, arg):
        self.stack.append(_checked_global(*arg.split(" ", 1), self.rebuild, self.where))

    def STACK_GLOBAL(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Malformed("the name of a global is no string")
        self.stack.append(_checked_global(module, name, self.rebuild, self.where))

    def REDUCE(self, _):
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))

    NEWOBJ = REDUCE

    def NEWOBJ_EX(self, _):
        self.stack.pop()
        self.REDUCE(None)

    def INST(self, arg):
        function = _checked_global(*arg.split(" ", 1), self.rebuild, self.where)
        args = tuple(self.pop_to_mark())
        self.stack.append(self.call(function, args))

    def OBJ(self, _):
        function, *args = self.pop_to_mark()
        self.stack.append(self.call(function, tuple(args)))

    def BUILD(self, _):
        self.stack.pop()
        if not self.stack:
            raise _Malformed("it sets the state of nothing")

    def BINPERSID(self, _):
        self.stack.append(self.persistent(self.stack.pop()))

    def PERSID(self, arg):
        self.stack.append(self.persistent(arg))


_PUSH_ARGUMENT = frozenset({
    "BINBYTES", "BINBYTES8", "BINFLOAT", "BININT", "BININT1", "BININT2", "BINSTRING", "BINUNICODE", "BINUNICODE8",
    "BYTEARRAY8", "FLOAT", "INT", "LONG", "LONG1", "LONG4", "SHORT_BINBYTES", "SHORT_BINSTRING", "SHORT_BINUNICODE",
    "STRING", "UNICODE",
})  # fmt: skip
_PUSH_CONSTANT: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}


def _key(key: object) -> object:
    """`key` where it is plain; otherwise something that hashes without recursion and equals nothing else."""
    return key if isinstance(key, (str, int, float, bytes, type(None))) else Unbuilt(type(key).__name__)


def describe(value: object) -> str:
    """What a value from `load` is, in a few words for a list of what was skipped."""
    if isinstance(value, Unbuilt):
        return f"an object of {value.name}, not built"
    if isinstance(value, Global):
        return f"the name {value.name}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} with {len(value)} entries"
    return f"a {type(value).__name__}" if value is not None else "None"
