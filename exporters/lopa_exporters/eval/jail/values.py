"""Python values as JSON and back, for a border that neither pickles nor evaluates.

Plain values keep their type; a subclass arrives as its plain base, so that no method of the sender's runs on the receiver's side.
What has no such form (functions, instances) arrives as an `Opaque`, which is equal to nothing.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SMALL_INT = 1 << 53
LONGEST_ITERATOR = 100_000
"""Items that are taken from an iterator; a longer one is refused."""


@dataclass(frozen=True)
class Reference:
    """A name in the receiver's namespace, or a call of it: tests of some MBPP problems build arguments by classes of the solution."""

    name: str
    arguments: tuple[Any, ...] | None = None

    def __call__(self, *arguments: Any) -> Reference:
        return Reference(self.name, arguments)


class Opaque:
    """A value that could not be sent."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def encode(value: Any) -> Any:
    """Something that `json.dumps` takes.

    Raises:
        ValueError: an iterator of more than LONGEST_ITERATOR items. RecursionError: too deep, or a value that holds itself.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        whole = int(value)
        return whole if abs(whole) < SMALL_INT else ["int", hex(whole)]
    for kind, tag, take in _SENDERS:
        if isinstance(value, kind):
            return [tag, *take(value)]
    return ["opaque", type(value).__name__[:80]]


def _items(value: Any) -> Iterator[Any]:
    yield [encode(item) for item in value]


def _pairs(value: Mapping[Any, Any]) -> Iterator[Any]:
    yield [[encode(key), encode(item)] for key, item in value.items()]


def _taken(value: Iterator[Any]) -> Iterator[Any]:
    items = list(itertools.islice(value, LONGEST_ITERATOR + 1))
    if len(items) > LONGEST_ITERATOR:
        raise ValueError(f"an iterator of more than {LONGEST_ITERATOR} items")
    yield [encode(item) for item in items]


class _IsBuiltin(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, type) and vars(builtins).get(value.__name__) is value


class _BuiltinType(metaclass=_IsBuiltin):
    """int, str and the like as values: `isinstance(value, _BuiltinType)`."""


_SENDERS: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (float, "float", lambda v: [float.hex(v)]),
    (list, "list", _items),
    (tuple, "tuple", _items),
    (dict, "dict", _pairs),
    (frozenset, "frozenset", _items),
    (set, "set", _items),
    (type({}.keys()), "set", _items),
    (type({}.items()), "set", _items),
    (type({}.values()), "values", _items),
    (bytes, "bytes", lambda v: [bytes(v).hex()]),
    (bytearray, "bytearray", lambda v: [bytes(v).hex()]),
    (complex, "complex", lambda v: [float.hex(v.real), float.hex(v.imag)]),
    (range, "range", lambda v: [v.start, v.stop, v.step]),
    (collections.deque, "deque", _items),
    (decimal.Decimal, "decimal", lambda v: [str(v)]),
    (fractions.Fraction, "fraction", lambda v: [hex(v.numerator), hex(v.denominator)]),
    (datetime.datetime, "datetime", lambda v: [v.isoformat()]),
    (datetime.date, "date", lambda v: [v.isoformat()]),
    (datetime.time, "time", lambda v: [v.isoformat()]),
    (datetime.timedelta, "timedelta", lambda v: [v.days, v.seconds, v.microseconds]),
    (Reference, "reference", lambda v: [v.name, None if v.arguments is None else encode(v.arguments)]),
    (_BuiltinType, "type", lambda v: [v.__name__]),
    (Iterator, "iterator", _taken),
)
"""In order: a subclass before its base (datetime is a date)."""


def decode(sent: Any) -> Any:
    """The value again. References stay references.

    Raises:
        ValueError, TypeError, KeyError, ArithmeticError: not what `encode` makes. RecursionError: too deep.
    """
    if sent is None or isinstance(sent, bool | int | str):
        return sent
    if not isinstance(sent, list) or not sent:
        raise ValueError("not an encoded value")
    return _RECEIVERS[sent[0]](*sent[1:])


def _builtin_type(name: str) -> type:
    found = vars(builtins).get(name)
    if not isinstance(found, type):
        raise ValueError(f"{name} is no builtin type")
    return found


def _collected(kind: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    return lambda items: kind([decode(item) for item in items])


_RECEIVERS: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "list": _collected(list),
    "tuple": _collected(tuple),
    "dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "frozenset": _collected(frozenset),
    "set": _collected(set),
    "values": _collected(lambda items: dict(enumerate(items)).values()),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "range": range,
    "deque": _collected(collections.deque),
    "decimal": decimal.Decimal,
    "fraction": lambda numerator, denominator: fractions.Fraction(int(numerator, 16), int(denominator, 16)),
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": datetime.timedelta,
    "reference": lambda name, arguments: Reference(name, None if arguments is None else decode(arguments)),
    "iterator": lambda items: iter([decode(item) for item in items]),
    "type": _builtin_type,
    "opaque": Opaque,
}
