"""Frozen, slotted values, compared by their fields, as a frozen dataclass is.

They are no dataclasses because importing `dataclasses` and running it would be half of the time
that `import joblock` takes. `dataclass_transform` only tells type checkers that fields cannot be
assigned; to change one, use `copy.replace`, or `__replace__` before Python 3.13.
"""

from __future__ import annotations

from typing import Any, NoReturn, Self, dataclass_transform

assign = object.__setattr__  # for `__init__` only: a value refuses everybody else


@dataclass_transform(frozen_default=True)
class Value:
    """The base of a class that names its fields in `__match_args__`, in the order of `__init__`."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value) or type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in _fields(self).items())
        return f"{type(self).__qualname__}({fields})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()

    def __replace__(self, **changes: Any) -> Self:
        return type(self)(**_fields(self) | changes)

    def _values(self) -> tuple[Any, ...]:
        return tuple(_fields(self).values())


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__match_args__}
