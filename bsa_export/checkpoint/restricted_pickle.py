"""Read a pickle without running it: an interpreter of opcodes that neither imports nor calls what the pickle names."""

from __future__ import annotations

import pickletools
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from bsa_export.errors import CheckpointError, UnsafePickleError

# A pickle of 4,000 tensors has 130,000 opcodes. Time and memory are in proportion to the opcodes, and so to the file.
MAX_OPCODES = 5_000_000
MAX_PICKLE_BYTES = 256 << 20
MAX_CALLS = 200_000  # of functions that rebuild tensors
MAX_INT_BITS = 2048  # the magic number of torch.save has 80; longer ones take time that is not proportional
MAX_KEY = 1 << 60  # larger int keys can be made to collide in a dict

# Objects that training scripts store next to the tensors. They are not built: each becomes an `Unbuilt`.
HARMLESS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_codecs": "encode",
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
        "collections": "Counter defaultdict deque OrderedDict",
        "copyreg": "__newobj__ __newobj_ex__ _reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
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
        "torch.serialization": "_get_layout",
        "torch.torch_version": "TorchVersion",
        "types": "SimpleNamespace",
        "typing": "Any",
        "uuid": "UUID",
    }.items()
    for name in names.split()
)
# Of Python 2, and of Python 3.13.
OTHER_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}
_NEW = ("copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__")


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
    stream: IO[bytes],
    where: object,
    rebuild: Mapping[str, Callable[[tuple], object] | None],
    persistent: Callable[[object], object],
) -> object:
    """Read one pickle of any protocol from `stream`, which then stands right behind it.

    A class, of whatever module, becomes an `Unbuilt` or stays a `Global`: it is never imported. That a name is a class
    is known from its use (an object is made of it without a call) or from its spelling (CapWords). Every other name is
    taken for a function and refused, whether it is called or not; so is a call of a class of the standard library.

    Args:
        stream: a binary file whose `read(n)` never allocates more than it has left (`BytesIO`, `mmap`).
        where: the file that error messages name.
        rebuild: global name -> function of the argument tuple, called where the pickle calls that name; None where the
            name may only be referred to.
        persistent: makes the value of a persistent id.

    Returns:
        dicts (also for OrderedDict and defaultdict), lists (also for sets), tuples, strings, bytes, numbers, None,
        `Global`, `Unbuilt` and what `rebuild` and `persistent` made. They may contain themselves.

    Raises:
        UnsafePickleError: a name is that of a function which is neither in `rebuild` nor in HARMLESS.
        CheckpointError: the pickle is damaged, too long, or `rebuild` or `persistent` refused.
    """
    machine = _Machine(where, rebuild, persistent)
    try:
        return machine.run(stream)
    # ValueError, struct.error: pickletools on damaged arguments; LookupError: an empty stack, no such memo entry.
    except (_Malformed, LookupError, ValueError, struct.error, OverflowError, RecursionError) as error:
        machine.refuse_functions()
        reason = str(error) if isinstance(error, (_Malformed, ValueError)) else "its opcodes do not fit together"
        raise CheckpointError(
            f"its pickle cannot be read: {reason[:200]}", where=where, hint="is the file complete?"
        ) from None
    except CheckpointError:
        machine.refuse_functions()
        raise


def _is_spelled_as_class(name: str) -> bool:
    """Whether the last part of a dotted name is in CapWords, and every part a name of Python."""
    parts = name.split(".")
    return all(part.isidentifier() for part in parts) and parts[-1].lstrip("_")[:1].isupper()


def _is_of_python(name: str) -> bool:
    """Whether a name is of the standard library."""
    return name.partition(".")[0] in sys.stdlib_module_names


def _unsafe(name: str, where: object) -> UnsafePickleError:
    return UnsafePickleError(
        "expected a pickle of tensors, plain values and objects of classes",
        found=f"{name[:200]}, which could run code; nothing was executed",
        where=where,
        hint="if the file is your own, save its state_dict alone",
    )


class _Machine:
    """The stack and the memo of one pickle. Every method named as an opcode of `pickletools` executes it.

    Attributes:
        suspects: names that are functions unless their use shows that they are classes.
        copied: elements that calls copied so far.
    """

    def __init__(
        self,
        where: object,
        rebuild: Mapping[str, Callable[[tuple], object] | None],
        persistent: Callable[[object], object],
    ):
        self.where, self.rebuild, self.persistent = where, rebuild, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, object] = {}
        self.suspects: dict[str, bool] = {}
        self.calls = 0
        self.copied = 0
        self.count = 0

    def run(self, stream: IO[bytes]) -> object:
        methods: dict[str, Callable[[Any], None]] = {}
        for self.count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            name = opcode.name
            method = methods.get(name)
            if method is None:
                if name == "STOP":
                    if len(self.stack) != 1 or self.marks:
                        raise _Malformed(f"it ends with {len(self.stack)} values")
                    self.refuse_functions()
                    return self.stack[0]
                method = methods[name] = self.method(name)
            if self.count > MAX_OPCODES:
                raise _Malformed(f"it has more than {MAX_OPCODES:,} opcodes")
            method(arg)
        raise _Malformed("it ends early")

    def refuse_functions(self) -> None:
        """Raises UnsafePickleError for a name whose use did not show that it is a class."""
        for name, suspect in self.suspects.items():
            if suspect:
                raise _unsafe(name, self.where)

    def named(self, module: str, name: str) -> Global:
        """The global of a name; a suspect where it is neither known nor spelled as a class."""
        full = f"{OTHER_MODULES.get(module, module)}.{name}"
        if full not in self.rebuild and full not in HARMLESS and not _is_spelled_as_class(name):
            self.suspects.setdefault(full, True)
        return Global(full)

    def is_class(self, function: object) -> None:
        """Notes that a name is used as only classes can be. Python's own lower-case classes are all in HARMLESS."""
        if isinstance(function, Global) and function.name in self.suspects and not _is_of_python(function.name):
            self.suspects[function.name] = False

    def method(self, name: str) -> Callable[[Any], None]:
        if name in _PUSH_ARGUMENT:
            return self.push
        if name in _PUSH_CONSTANT:
            make = _PUSH_CONSTANT[name]
            return lambda _: self.stack.append(make())
        method = getattr(self, name, None)
        if method is None:
            raise _Malformed(f"the opcode {name} has no place in a checkpoint")
        return method

    def push(self, arg: object) -> None:
        self.stack.append(arg)

    def push_int(self, arg: int) -> None:
        self.stack.append(arg if arg.bit_length() <= MAX_INT_BITS else Unbuilt("builtins.int"))

    INT = LONG = LONG1 = LONG4 = push_int

    def pop_to_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def spend(self, elements: int) -> None:
        """Counts elements that a call copies. In real pickles each is copied once at most, and an opcode made it."""
        self.copied += elements
        if self.copied > 4 * self.count + 1000:
            raise _Malformed("it copies the same elements again and again")

    def call(self, function: object, args: object) -> object:
        """What stands for `function(*args)`. Only functions of `rebuild` are called."""
        if not isinstance(args, tuple) or not isinstance(function, (Global, Unbuilt)):
            raise _Malformed("it calls what is not a name")
        if isinstance(function, Unbuilt):
            return function
        name = function.name
        if name in self.rebuild or name in HARMLESS:
            return self.call_known(name, args)
        if name == "builtins.getattr" and self.is_enum_member(args):
            self.suspects[name] = False
            return Unbuilt(args[0].name)
        if name in self.suspects or _is_of_python(name):
            raise _unsafe(name, self.where)
        return Unbuilt(name)

    def call_known(self, name: str, args: tuple) -> object:
        self.spend(sum(len(arg) for arg in args[:4] if isinstance(arg, (list, tuple, dict))))
        if rebuild := self.rebuild.get(name):
            self.calls += 1
            if self.calls > MAX_CALLS:
                raise _Malformed(f"it rebuilds more than {MAX_CALLS:,} tensors")
            return rebuild(args)
        if name in self.rebuild:
            raise _Malformed(f"it calls {name}, which is not a function")
        if name in ("collections.OrderedDict", "collections.defaultdict"):
            return _dict_of(args if name.endswith("OrderedDict") else args[1:])
        if name in _NEW and args and isinstance(args[0], Global):
            return self.new(args[0])
        return Unbuilt(name)

    def is_enum_member(self, args: tuple) -> bool:
        """Whether `getattr(*args)` is how Python 3.11.0 to 3.11.3 pickles a member of an enum: `(class, name)`."""
        match args:
            case (Global(name), str(member)):
                return name not in self.suspects and not _is_of_python(name) and member.isidentifier()
        return False

    def new(self, cls: object) -> object:
        """What stands for an object of a class that is made without calling the class."""
        if not isinstance(cls, (Global, Unbuilt)):
            raise _Malformed("it makes an object of what is not a class")
        self.is_class(cls)
        if isinstance(cls, Global) and cls.name in ("collections.OrderedDict", "collections.defaultdict"):
            return {}
        return Unbuilt(cls.name)

    # Opcodes, in the order of the pickletools documentation.

    def PROTO(self, _: object) -> None:
        pass

    FRAME = PROTO

    def POP(self, _: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def DUP(self, _: object) -> None:
        self.stack.append(self.stack[-1])

    def MARK(self, _: object) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def POP_MARK(self, _: object) -> None:
        self.pop_to_mark()

    def BINPUT(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    PUT = LONG_BINPUT = BINPUT

    def MEMOIZE(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def BINGET(self, index: int) -> None:
        self.stack.append(self.memo[index])

    GET = LONG_BINGET = BINGET

    def TUPLE(self, _: object) -> None:
        items = tuple(self.pop_to_mark())
        self.stack.append(items)

    def TUPLE1(self, _: object) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def TUPLE2(self, _: object) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def TUPLE3(self, _: object) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def LIST(self, _: object) -> None:
        items = self.pop_to_mark()
        self.stack.append(items)

    FROZENSET = TUPLE

    def APPENDS(self, _: object) -> None:
        self.append(self.pop_to_mark())

    ADDITEMS = APPENDS

    def APPEND(self, _: object) -> None:
        self.append([self.stack.pop()])

    def append(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Unbuilt):
            raise _Malformed(f"it appends to a {type(target).__name__}")

    def DICT(self, _: object) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self.set_items(items)

    def SETITEMS(self, _: object) -> None:
        self.set_items(self.pop_to_mark())

    def SETITEM(self, _: object) -> None:
        items = [self.stack[-2], self.stack[-1]]
        del self.stack[-2:]
        self.set_items(items)

    def set_items(self, items: list) -> None:
        if len(items) % 2:
            raise _Malformed("a dict has a key without a value")
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_key(key)] = value
        elif not isinstance(target, Unbuilt):
            raise _Malformed(f"it sets items of a {type(target).__name__}")

    def GLOBAL(self, arg: str) -> None:
        self.stack.append(self.named(*arg.split(" ", 1)))

    def STACK_GLOBAL(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Malformed("the name of a global is not a string")
        self.stack.append(self.named(module, name))

    def REDUCE(self, _: object) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))

    def NEWOBJ(self, _: object) -> None:
        self.stack.pop()
        self.stack.append(self.new(self.stack.pop()))

    def NEWOBJ_EX(self, _: object) -> None:
        self.stack.pop()
        self.NEWOBJ(None)

    def INST(self, arg: str) -> None:
        function = self.named(*arg.split(" ", 1))
        args = tuple(self.pop_to_mark())
        self.stack.append(self.call(function, args))

    def OBJ(self, _: object) -> None:
        function, *args = self.pop_to_mark()
        self.stack.append(self.call(function, tuple(args)))

    def BUILD(self, _: object) -> None:
        self.stack.pop()
        if not self.stack:
            raise _Malformed("it sets the state of nothing")

    def BINPERSID(self, _: object) -> None:
        value = self.persistent(self.stack.pop())
        self.is_class(value)  # the class of a whole model
        self.stack.append(value)

    def PERSID(self, arg: str) -> None:
        self.stack.append(self.persistent(arg))


_PUSH_ARGUMENT = frozenset({
    "BINBYTES", "BINBYTES8", "BINFLOAT", "BININT", "BININT1", "BININT2", "BINSTRING", "BINUNICODE", "BINUNICODE8",
    "BYTEARRAY8", "FLOAT", "SHORT_BINBYTES", "SHORT_BINSTRING", "SHORT_BINUNICODE", "STRING", "UNICODE",
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


def _dict_of(args: tuple) -> dict:
    """What `OrderedDict(*args)` holds: nothing, or a copy of a dict or of pairs."""
    match args:
        case ():
            return {}
        case (dict(items),):
            return dict(items)
        case ([*pairs],) if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            return {_key(key): value for key, value in pairs}
    raise _Malformed("it makes a dict of what is not pairs")


def _key(key: object) -> object:
    """`key` where it is plain; otherwise something that hashes without recursion and collision, and equals nothing."""
    inside = key[:10] if isinstance(key, tuple) else (key,)
    if any(isinstance(part, (list, dict)) for part in inside):
        raise _Malformed("a key of a dict is a list or a dict")
    plain = key is None or isinstance(key, (str, bytes, bool)) or (isinstance(key, int) and abs(key) < MAX_KEY)
    return key if plain else Unbuilt(type(key).__name__)


def describe(value: object) -> str:
    """What a value from `load` is, in a few words of bounded length, for a list of what was skipped or a message."""
    match value:
        case Unbuilt(name):
            return f"an object of {name[:100]}, not built"
        case Global(name):
            return f"the name {name[:100]}"
        case dict() | list() | tuple():
            return f"a {type(value).__name__} with {len(value)} entries"
        case None | bool():
            return str(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def brief(value: object) -> str:
    """A value from `load` for a message: numbers, short strings and short flat tuples themselves, others described."""
    match value:
        case int() | float():
            return str(value)[:40]
        case str() | bytes():
            return repr(value[:40])
        case tuple() | list() if len(value) <= 6 and not any(isinstance(item, (tuple, list)) for item in value):
            return "(" + ", ".join(brief(item) for item in value) + ")"
    return describe(value)
