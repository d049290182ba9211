"""Runs a Gluon kernel's Python on the CPU, program by program, and holds it to the rules of Hopper's asynchronous parts.

Triton's interpreter does not know Gluon. Layouts are ignored here; shared memory, queued copies and products, waits,
fences and barriers are not. `late` decides when queued work happens: as soon as it is queued, or only when it is waited
for. A kernel that gives the right result both ways, and breaks none of these rules, orders its work by what it waits for:

- a product's operands in shared memory were written, fenced and passed by a barrier since, or came with a bulk copy (TMA)
  whose memory barrier was waited for, in its phase, and had been told as many bytes as came;
- what is overwritten is read by no product that may still run and by no thread: each product was waited for, a barrier came
  after that, and where other warps read it, they arrived then at a memory barrier that was waited for.

Warps that are given different work (`warp_specialize`) run in turns, each until it has to wait for another; `late` starts
with the last one. That all wait is an error.
"""

from __future__ import annotations

import itertools
import threading
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
        self.machine.reads[self.machine.part, self.key] = DONE
        return self.data.clone()


class Flag:
    """A memory barrier: how many phases are over, and what the present one waits for."""

    def __init__(self, count: int) -> None:
        self.count, self.phase = count, 0
        self.next_phase()

    def next_phase(self) -> None:
        self.arrived, self.told, self.came = 0, 0, 0
        self.copies: list[Callable[[], None]] = []
        self.blocks: list[int] = []
        self.given_back: list[tuple[int, int]] = []


RUNNING, DONE, PASSED = "a product may read it", "read, and no barrier since", "read, and a barrier passed"


class Queued:
    """The result of a product that may not have run."""

    value: Tensor | None = None


class Stopped(Exception):
    """Ends the other warps when one has failed."""


class Machine:
    def __init__(self, late: bool) -> None:
        self.late = late
        self.program: tuple[int, ...] = (0, 0)
        self.programs: tuple[int, ...] = (1, 1)
        self.new_program()

    def new_program(self) -> None:
        self.part = 0
        """Of the warps: which work runs."""
        self.copies: list[Callable[[], None]] = []
        self.products: dict[int, list[tuple[Callable[[], None], list[int]]]] = {}
        self.written: set[int] = set()
        """By copies or stores, not fenced."""
        self.fenced: set[int] = set()
        """No barrier since."""
        self.reads: dict[tuple[int, int], str] = {}
        """Who reads or has read which block."""
        self.versions: dict[int, int] = {}
        """Of a block: bulk copies into it."""
        self.seen: dict[tuple[int, int], int] = {}
        """Who has waited for which version of a block."""
        self.flags: dict[int, Flag] = {}
        self.arrivals: dict[tuple[int, int], list[int]] = {}
        """By flag and phase: the blocks that were filled in it."""
        self.let_go: dict[tuple[int, int], list[tuple[int, int]]] = {}
        """By flag and phase: the reads that ended before it."""
        self.wait_for_others: Callable[[Callable[[], bool]], None] = self.nobody_else

    def nobody_else(self, ready: Callable[[], bool]) -> None:
        raise AssertionError("waits for what nobody does")

    def overwrite(self, block: Shared) -> None:
        for (part, key), state in self.reads.items():
            mine = part == self.part and state == PASSED
            assert key != block.key or mine, f"overwritten: {state}, by warps {part}"
        assert all(block.key not in flag.blocks for flag in self.flags.values()), "overwritten while a copy fills it"

    def readable(self, block: Shared) -> None:
        version = self.versions.get(block.key, 0)
        assert self.seen.get((self.part, block.key), 0) == version, "read before its copy was waited for"

    def barrier(self) -> None:
        self.fenced.clear()
        for (part, key), state in self.reads.items():
            if part == self.part and state == DONE:
                self.reads[part, key] = PASSED

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

        self.products.setdefault(self.part, []).append((work, [a.key, b.key]))
        for key in (a.key, b.key):
            self.reads[self.part, key] = RUNNING
        if not self.late:
            work()
        return result

    def wait_products(self, left: int, deps: tuple[Any, ...]) -> Any:
        queue = self.products[self.part]
        while len(queue) > left:
            work, keys = queue.pop(0)
            if self.late:
                work()
            for key in keys:
                if not any(key in others for _, others in queue):
                    self.reads[self.part, key] = DONE
        values = [dep.value for dep in deps]
        assert all(value is not None for value in values), "not waited for"
        return values[0] if len(values) == 1 else tuple(values)

    # ---- bulk copies

    def flag(self, block: Shared) -> Flag:
        assert block.key not in self.written | self.fenced, "a memory barrier used before it was fenced and passed"
        return self.flags[block.key]

    def new_flag(self, block: Shared, count: int) -> None:
        self.flags[block.key] = Flag(count)
        self.written.add(block.key)

    def expect(self, block: Shared, size: int) -> None:
        flag = self.flag(block)
        assert not flag.told, "told twice in one phase"
        flag.told = int(size)
        self.arrive(block, 1)

    def arrive(self, block: Shared, count: int) -> None:
        """What these warps have read before a barrier is given back to whoever waits for this phase."""
        flag = self.flag(block)
        flag.arrived += count
        assert flag.arrived <= flag.count, "more arrive than are counted"
        flag.given_back += [where for where, state in self.reads.items() if where[0] == self.part and state == PASSED]

    def bulk_copy(self, source: Descriptor, coord: list[Any], at: Shared, block: Shared) -> None:
        self.overwrite(block)
        flag, value = self.flag(at), source.read(coord)
        assert tuple(value.shape) == tuple(block.data.shape)
        self.versions[block.key] = self.versions.get(block.key, 0) + 1
        flag.blocks.append(block.key)
        flag.came += value.numel() * value.element_size()
        flag.copies.append(lambda: block.data.copy_(value))
        if not self.late:
            flag.copies.pop()()

    def wait_flag(self, at: Shared, phase: Any) -> None:
        flag, over = self.flag(at), lambda: flag.phase % 2 != int(phase) or self.ends(flag)
        if not over():
            self.wait_for_others(over)
        for where in self.let_go.pop((id(flag), flag.phase), []):
            self.reads.pop(where, None)
        for key in self.arrivals.get((id(flag), flag.phase), []):
            self.seen[self.part, key] = self.versions[key]

    def ends(self, flag: Flag) -> bool:
        """Ends the phase, if all arrived and all bytes came."""
        if flag.arrived < flag.count:
            return False
        assert flag.told == flag.came, f"waits for {flag.told} bytes where {flag.came} come"
        for work in flag.copies:
            work()
        flag.phase += 1
        self.arrivals[id(flag), flag.phase], self.let_go[id(flag), flag.phase] = flag.blocks, flag.given_back
        flag.next_phase()
        return True

    # ---- warps with different work

    def warp_specialize(
        self, works: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any
    ) -> None:
        assert len(works) == len(warps) + 1 == len(registers) + 1
        turns = [threading.Semaphore(0) for _ in works]
        back = threading.Semaphore(0)
        waiting: dict[int, Callable[[], bool]] = {}
        ended: dict[int, BaseException | None] = {}

        def wait(ready: Callable[[], bool]) -> None:
            me = self.part
            waiting[me] = ready
            back.release()
            turns[me].acquire()
            if stopped:
                raise Stopped
            self.part = me

        def run(me: int) -> None:
            turns[me].acquire()
            try:
                if not stopped:
                    self.part = me
                    works[me][0](*works[me][1])
                ended[me] = None
            except BaseException as error:
                ended[me] = error
            back.release()

        stopped: list[bool] = []
        self.wait_for_others = wait
        threads = [threading.Thread(target=run, args=(me,), daemon=True) for me in range(len(works))]
        for thread in threads:
            thread.start()
        order = range(len(works))[:: -1 if self.late else 1]
        while len(ended) < len(works):
            able = [me for me in order if me not in ended and (me not in waiting or waiting[me]())]
            failed = [error for error in ended.values() if error is not None]
            if failed or not able:
                stopped.append(True)
                for me in order:
                    if me not in ended:
                        turns[me].release()
                        back.acquire()
                raise failed[0] if failed else AssertionError("all wait, for what nobody does")
            waiting.pop(able[0], None)
            turns[able[0]].release()
            back.acquire()
        for error in ended.values():
            if error is not None:
                raise error
        self.part, self.wait_for_others = 0, self.nobody_else

    def names(self, *more: str) -> dict[str, Any]:
        """What a kernel's module calls, by its names there: those that every kernel needs, and these."""
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
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            max=torch.amax, sum=torch.sum, exp2=torch.exp2, log2=torch.log2, abs=torch.abs, full_like=torch.full_like,
            expand_dims=torch.unsqueeze, permute=torch.permute, num_warps=lambda: 4, div_rn=torch.div, fma=_fma,
            where=lambda mask, a, b: torch.where(mask, a, b), convert_layout=lambda value, _: value,
            warp_specialize=self.warp_specialize,
            inline_asm_elementwise=lambda asm, _, args, *__, **___: args[0] if asm == "" else 1 / 0,
        )  # fmt: skip
        copies = SimpleNamespace(
            async_copy_global_to_shared=self.copy, commit_group=lambda: None, wait_group=self.wait_copies
        )
        flags = SimpleNamespace(
            init=self.new_flag, expect=self.expect, arrive=self.arrive, wait=self.wait_flag, MBarrierLayout=nothing
        )
        bulk = SimpleNamespace(async_copy_global_to_shared=self.bulk_copy)
        some = {"async_copy": copies, "mbarrier": flags, "tma": bulk}
        return {
            "gl": language, "fence_async_shared": self.fence, "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.wait_products, "_barrier": self.barrier, **{name: some[name] for name in more},
        }  # fmt: skip

    def launch(self, kernel: Callable[..., None], grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Tensors are passed as pointers to their numbers, and to what lies behind those."""
        passed = [Pointer(_behind(arg)) if isinstance(arg, Tensor) else arg for arg in args]
        self.programs = grid
        for self.program in itertools.product(*map(range, grid)):
            self.new_program()
            kernel(*passed, **constants)
            assert not any(self.products.values()), "a program ended before its products"
            assert not any(flag.blocks for flag in self.flags.values()), "a program ended before its copies"


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Rounded once, but where 53 bits of the sum are just between two numbers."""
    return (a.double() * b.double() + c.double()).float()


def _behind(tensor: Tensor) -> Tensor:
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((size,), (1,))
