"""The types and limits of a sparsity config's parameters."""

from __future__ import annotations

from dataclasses import field, fields
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

MAX_INTEGER = 2**31 - 1  # of a parameter
MAX_ITEMS = 16384  # of a parameter that is a list: one for each block of the longest sequence


def count(default: int, minimum: int = 0) -> Any:
    """A field of a config that counts blocks."""
    return field(default=default, metadata={"minimum": minimum})


def parameter_types(cls: type) -> dict[str, Any]:
    """The types of a config class' parameters, whichever module declares them and whether as text or not."""
    try:
        return get_type_hints(cls)
    except Exception:  # an annotation that names what only a type checker sees
        known = {"int": int, "bool": bool, "str": str, "float": float}
        return {parameter.name: known.get(str(parameter.type), parameter.type) for parameter in fields(cls)}


def checked(kind: Any, value: object, minimum: int = -MAX_INTEGER, maximum: int = MAX_INTEGER) -> object:
    """Returns a parameter of type `kind` as a plain int, bool, str or new list; raises TypeError with what was
    expected.

    Types other than these, `Literal`, and lists and unions of them are not checked.
    """
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        problems = []
        for option in options:
            try:
                return checked(option, value, minimum, maximum)
            except TypeError as problem:
                problems.append(str(problem).removeprefix("expected "))
        raise TypeError(f"expected {' or '.join(problems)}")
    if origin is list:
        kinds = {int: "integers", bool: "booleans", str: "texts", float: "numbers"}
        message = f"expected a list of {kinds.get(options[0], 'values')}"
        if not isinstance(value, list | tuple):
            raise TypeError(message)
        if len(value) > MAX_ITEMS:
            raise TypeError(f"{message}, at most {MAX_ITEMS:,}")
        try:
            return [checked(options[0], item) for item in value]
        except TypeError as problem:
            raise TypeError(f"{message}: {problem}") from None
    if origin is Literal:
        if isinstance(value, str | int) and value in options:
            return value
        raise TypeError(f"expected {' or '.join(map(str, options))}")
    if kind is int:
        integer = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
        if integer is None or integer < minimum:
            raise TypeError("expected an integer" + (f" of at least {minimum}" if minimum > -MAX_INTEGER else ""))
        if integer > maximum:
            raise TypeError(f"expected an integer of at most {maximum:,}")
        return integer
    if kind is bool:
        if isinstance(value, bool | np.bool_):
            return bool(value)
        raise TypeError("expected true or false")
    if kind is float and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise TypeError("expected a number")
    if kind is str and not isinstance(value, str):
        raise TypeError("expected text")
    if kind is NoneType and value is not None:
        raise TypeError("expected null")
    return value


def shown(value: object) -> str:
    """A parameter's value for a message."""
    try:
        return repr(value)
    except ValueError:  # Python converts no integer of more than 4,300 digits
        return "an integer of thousands of digits"
