"""Runs a Gluon kernel's Python on the CPU, program by program, and holds it to the rules of Hopper's asynchronous parts.

Triton's interpreter does not know Gluon. Layouts are ignored here; shared memory, queued copies and products, waits,
fences and barriers are not. `late` decides when queued work happens: as soon as it is queued, or only when it is waited
for. A kernel that gives the right result both ways, and breaks none of these rules, orders its work by what it waits for:

- a product's operands in shared memory were written, fenced and passed by a barrier since;
- what is overwritten is read by no product that may still run: each was waited for, and a barrier came after that.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Pointer:
    """Into a flat tensor, at one place or at many. Reading beyond the tensor is an error."""

    def __init__(self, flat: Tensor, at: Any = 0) -> None:
        self.flat, self.at = flat, at
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.at + more)

    def places(self) -> Tensor:
        at = torch.as_tensor(self.at).long()
        assert at.numel() == 0 or (at.min() >= 0 and at.max() < self.flat.numel()), "beyond the tensor"
        return at


class Shared:
    """A block of shared memory. What nobody has written is NaN."""

    def __init__(self, machine: Machine, data: Tensor) -> None:
        self.machine, self.data = machine, data

    @property
    def key(self) -> int:
        return self.data.data_ptr()

    def index(self, at: int) -> Shared:
        return Shared(self.machine, self.data[int(at)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.machine, self.data.permute(order))

    def store(self, value: Tensor) -> None:
        self.machine.overwrite(self)
        self.data.copy_(value)


class Queued:
    """The result of a product that may not have run."""

    value: Tensor | None = None


class Machine:
    def __init__(self, late: bool) -> None:
        self.late = late
        self.program, self.programs = (0, 0), (1, 1)
        self.new_program()

    def new_program(self) -> None:
        self.copies: list[Callable[[], None]] = []
        self.products: list[tuple[Callable[[], None], list[int]]] = []
        self.written: set[int] = set()
        """By copies or stores, not fenced."""
        self.fenced: set[int] = set()
        """No barrier since."""
        self.read: set[int] = set()
        """By products that were waited for, no barrier since."""

    def overwrite(self, block: Shared) -> None:
        running = {key for _, keys in self.products for key in keys}
        assert block.key not in running | self.read, "overwritten while a product may read it"
        self.written.add(block.key)

    def barrier(self) -> None:
        self.fenced.clear()
        self.read.clear()

    def fence(self) -> None:
        self.fenced |= self.written
        self.written.clear()

    def copy(self, block: Shared, source: Pointer) -> None:
        self.overwrite(block)
        self.copies.append(lambda: block.data.copy_(source.flat[source.places()]))
        if not self.late:
            self.copies.pop()()

    def wait_copies(self, left: int) -> None:
        assert left == 0
        for work in self.copies:
            work()
        self.copies.clear()

    def product(self, a: Shared, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Queued:
        assert is_async
        for block in (a, b):
            assert block.key not in self.written | self.fenced, (
                "multiplied before it was fenced and passed by a barrier"
            )
        result = Queued()

        def work() -> None:
            begin = acc.value if isinstance(acc, Queued) else acc
            assert begin is not None
            result.value = a.data.float() @ b.data.float() + (begin if use_acc else 0)

        self.products.append((work, [a.key, b.key]))
        if not self.late:
            work()
        return result

    def wait_products(self, left: int, deps: tuple[Any, ...]) -> Any:
        while len(self.products) > left:
            work, keys = self.products.pop(0)
            if self.late:
                work()
            self.read.update(keys)
        values = [dep.value for dep in deps]
        assert all(value is not None for value in values), "not waited for"
        return values[0] if len(values) == 1 else tuple(values)

    def names(self) -> dict[str, Any]:
        """What a kernel's module calls, by its names there."""
        nothing = lambda *_: None
        language = SimpleNamespace(
            NVMMADistributedLayout=nothing, NVMMASharedLayout=nothing, BlockedLayout=nothing, SliceLayout=nothing,
            int32=torch.int32, int64=torch.int64, float32=torch.float32,
            program_id=lambda axis: torch.tensor(self.program[axis]), num_programs=lambda axis: self.programs[axis],
            allocate_shared_memory=lambda dtype, shape, _: Shared(self, torch.full(shape, float("nan"), dtype=dtype)),
            arange=lambda start, end, _: torch.arange(start, end),
            full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
            load=lambda source: source.flat[source.places()],
            store=lambda target, value: target.flat.__setitem__(target.places(), value.to(target.flat.dtype)),
            maximum=torch.maximum, minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            max=torch.amax, sum=torch.sum, exp2=torch.exp2, log2=torch.log2,
            where=lambda mask, a, b: torch.where(mask, a, b), convert_layout=lambda value, _: value,
        )  # fmt: skip
        copies = SimpleNamespace(
            async_copy_global_to_shared=self.copy, commit_group=lambda: None, wait_group=self.wait_copies
        )
        return {
            "gl": language, "async_copy": copies, "fence_async_shared": self.fence, "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.wait_products, "_barrier": self.barrier,
        }  # fmt: skip

    def launch(self, kernel: Callable[..., None], grid: tuple[int, int], *args: Any, **constants: Any) -> None:
        """Tensors are passed as pointers to their numbers."""
        passed = [Pointer(arg.view(-1)) if isinstance(arg, Tensor) else arg for arg in args]
        self.programs = grid
        for x in range(grid[0]):
            for y in range(grid[1]):
                self.program = (x, y)
                self.new_program()
                kernel(*passed, **constants)
