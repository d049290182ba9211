"""Backends of an op by name.

An op's file registers its plain reference first and whatever is faster after it. A layer picks once, when it is built:
a name that is missing here raises BackendUnavailable, and only "auto" may choose for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rorqual.errors import BackendUnavailable

F = TypeVar("F", bound=Callable[..., object])


def _always() -> str | None:
    return None


@dataclass
class Backends(Generic[F]):
    """The implementations of one op. `missing()` of each returns why it cannot run here, or None."""

    op: str
    table: dict[str, F] = field(default_factory=dict)
    missing: dict[str, Callable[[], str | None]] = field(default_factory=dict)

    def register(self, name: str, missing: Callable[[], str | None] = _always) -> Callable[[F], F]:
        def put(function: F) -> F:
            self.table[name] = function
            self.missing[name] = missing
            return function

        return put

    def names(self) -> list[str]:
        """Every backend that can run here, the reference first."""
        return [name for name in self.table if self.missing[name]() is None]

    def get(self, name: str) -> F:
        """Raises BackendUnavailable, saying what to install or which names there are."""
        if name not in self.table:
            raise BackendUnavailable(
                f"{self.op} has no backend {name!r}", remedy=f"choose from {', '.join(self.table)}"
            )
        if reason := self.missing[name]():
            raise BackendUnavailable(f"{self.op} backend {name!r} cannot run here: {reason}")
        return self.table[name]
