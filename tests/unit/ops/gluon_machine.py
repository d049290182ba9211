"""Runs a Gluon kernel's Python on the CPU, program by program, and holds it to the rules of Hopper's asynchronous parts.

Triton's interpreter does not know Gluon. Layouts are ignored here; shared memory, queued copies and products, waits,
fences and barriers are not. `late` decides when queued work happens: as soon as it is queued, or only when it is waited
for. A kernel that gives the right result both ways, and breaks none of these rules, orders its work by what it waits for:

- a product's operands in shared memory were written, fenced and passed by a barrier since, or came with a bulk copy (TMA)
  whose memory barrier was waited for, in its phase, and had been told as many bytes as came;
- what is overwritten is read by no product that may still run and by no thread: each product was waited for, and a barrier
  came after that.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Pointer:
    """Into a flat tensor, at one place or at many. Reading beyond the tensor is an error, but where a mask forbids it."""

    def __init__(self, flat: Tensor, at: Any = 0) -> None:
        self.flat, self.at = flat, at
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.at + more)

    def places(self, mask: Any = True) -> Tensor:
        at, inside = torch.broadcast_tensors(torch.as_tensor(self.at).long(), torch.as_tensor(mask))
        at = at.where(inside, 0)
        assert at.numel() == 0 or (at.min() >= 0 and at.max() < self.flat.numel()), "beyond the tensor"
        return at

    def load(self, mask: Any = True, other: float = 0) -> Tensor:
        value = self.flat[self.places(mask)]
        return value.where(torch.as_tensor(mask), torch.as_tensor(other, dtype=value.dtype))

    def store(self, value: Tensor, mask: Any = True) -> None:
        at, inside = torch.broadcast_tensors(self.places(mask), torch.as_tensor(mask))
        self.flat[at[inside]] = value.to(self.flat.dtype).broadcast_to(at.shape)[inside]


class Descriptor:
    """Of a matrix that bulk copies read; zeros lie around it."""

    def __init__(self, tensor: Tensor, block: list[int], layout: Any) -> None:
        self.tensor, self.block, self.layout, self.dtype = tensor, block, layout, tensor.dtype
        assert tensor.stride(-1) == 1 and all(n * tensor.element_size() % 16 == 0 for n in tensor.stride()[:-1])
        assert tensor.numel() and tensor.data_ptr() % 16 == 0 and max(block) <= 256

    from_tensor: Callable[..., Descriptor]

    def read(self, coord: list[Any]) -> Tensor:
        out = torch.zeros(self.block, dtype=torch.float32)
        first = [int(c) for c in coord]
        part = self.tensor[tuple(slice(c, c + n) for c, n in zip(first, self.block, strict=True))].float()
        out[tuple(slice(n) for n in part.shape)] = part
        return out.to(self.dtype)


Descriptor.from_tensor = Descriptor


class Shared:
    """A block of shared memory. What nobody has written is NaN. key: of the whole block that a part belongs to."""

    def __init__(self, machine: Machine, data: Tensor, key: int | None = None) -> None:
        self.machine, self.data, self.shape = machine, data, data.shape
        self.key = data.data_ptr() if key is None else key

    def index(self, at: int) -> Shared:
        return Shared(self.machine, self.data[int(at)])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.machine, self.data.narrow(dim, start, length), self.key)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.machine, self.data.permute(order), self.key)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.machine, self.data.view(shape), self.key)

    def store(self, value: Tensor) -> None:
        self.machine.overwrite(self)
        self.machine.written.add(self.key)
        self.data.copy_(value)

    def load(self, layout: Any) -> Tensor:
        self.machine.readable(self)
        self.machine.read.add(self.key)
        return self.data.clone()


class Flag:
    """A memory barrier: how many phases are over, and what the present one waits for."""

    def __init__(self) -> None:
        self.phase, self.told, self.came, self.copies, self.blocks = 0, 0, 0, [], []  # type: ignore[var-annotated]


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
        """By threads or by products that were waited for, no barrier since."""
        self.coming: set[int] = set()
        """Blocks that a bulk copy fills, not waited for."""
        self.flags: dict[int, Flag] = {}

    def overwrite(self, block: Shared) -> None:
        running = {key for _, keys in self.products for key in keys}
        assert block.key not in running | self.read, "overwritten while a product or another thread may read it"
        assert block.key not in self.coming, "overwritten while a copy fills it"

    def readable(self, block: Shared) -> None:
        assert block.key not in self.coming, "read before its copy was waited for"

    def barrier(self) -> None:
        self.fenced.clear()
        self.read.clear()

    def fence(self) -> None:
        self.fenced |= self.written
        self.written.clear()

    def copy(self, block: Shared, source: Pointer) -> None:
        self.overwrite(block)
        self.written.add(block.key)
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
            self.readable(block)
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

    # ---- bulk copies

    def flag(self, block: Shared) -> Flag:
        assert block.key not in self.written | self.fenced, "a memory barrier used before it was fenced and passed"
        return self.flags[block.key]

    def new_flag(self, block: Shared, count: int) -> None:
        assert count == 1
        self.flags[block.key] = Flag()
        self.written.add(block.key)

    def expect(self, block: Shared, size: int) -> None:
        flag = self.flag(block)
        assert not flag.told, "told twice in one phase"
        flag.told = int(size)

    def bulk_copy(self, source: Descriptor, coord: list[Any], at: Shared, block: Shared) -> None:
        self.overwrite(block)
        flag, value = self.flag(at), source.read(coord)
        assert tuple(value.shape) == tuple(block.data.shape)
        self.coming.add(block.key)
        flag.blocks.append(block.key)
        flag.came += value.numel() * value.element_size()
        flag.copies.append(lambda: block.data.copy_(value))
        if not self.late:
            flag.copies.pop()()

    def wait_flag(self, at: Shared, phase: Any) -> None:
        flag = self.flag(at)
        if flag.phase % 2 == int(phase):  # not over yet
            assert flag.told and flag.told == flag.came, f"waits for {flag.told} bytes where {flag.came} come"
            for work in flag.copies:
                work()
            self.coming -= set(flag.blocks)
            flag.phase, flag.told, flag.came, flag.copies, flag.blocks = flag.phase + 1, 0, 0, [], []

    def names(self) -> dict[str, Any]:
        """What a kernel's module calls, by its names there."""
        nothing = lambda *_: None

        def allocate(dtype: torch.dtype, shape: list[int], _: Any) -> Shared:
            empty = 0.0 if dtype == torch.int64 else float("nan")
            return Shared(self, torch.full(shape, empty, dtype=torch.float32).to(dtype))

        language = SimpleNamespace(
            NVMMADistributedLayout=nothing, NVMMASharedLayout=nothing, BlockedLayout=nothing, SliceLayout=nothing,
            int32=torch.int32, int64=torch.int64, float32=torch.float32, static_range=range, to_tensor=torch.tensor,
            program_id=lambda axis: torch.tensor(self.program[axis]), num_programs=lambda axis: self.programs[axis],
            allocate_shared_memory=allocate, arange=lambda start, end, _: torch.arange(start, end),
            full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
            load=lambda source, **masked: source.load(**masked),
            store=lambda target, value, **masked: target.store(value, **masked),
            maximum=torch.maximum, minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            max=torch.amax, sum=torch.sum, exp2=torch.exp2, log2=torch.log2,
            where=lambda mask, a, b: torch.where(mask, a, b), convert_layout=lambda value, _: value,
            inline_asm_elementwise=lambda asm, _, args, *__, **___: args[0] if asm == "" else 1 / 0,
        )  # fmt: skip
        copies = SimpleNamespace(
            async_copy_global_to_shared=self.copy, commit_group=lambda: None, wait_group=self.wait_copies
        )
        flags = SimpleNamespace(init=self.new_flag, expect=self.expect, wait=self.wait_flag, MBarrierLayout=nothing)
        return {
            "gl": language, "async_copy": copies, "fence_async_shared": self.fence, "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.wait_products, "_barrier": self.barrier, "mbarrier": flags,
            "tma": SimpleNamespace(async_copy_global_to_shared=self.bulk_copy),
        }  # fmt: skip

    def launch(self, kernel: Callable[..., None], grid: tuple[int, int], *args: Any, **constants: Any) -> None:
        """Tensors are passed as pointers to their numbers, and to what lies behind those."""
        passed = [Pointer(_behind(arg)) if isinstance(arg, Tensor) else arg for arg in args]
        self.programs = grid
        for x in range(grid[0]):
            for y in range(grid[1]):
                self.program = (x, y)
                self.new_program()
                kernel(*passed, **constants)
                assert not self.coming and not self.products, "a program ended before its copies or products"


def _behind(tensor: Tensor) -> Tensor:
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((size,), (1,))
