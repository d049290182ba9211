"""All GPUs of one host as replicas of a run: each holds the whole model and takes its share of a step's micro-batches.

    torchrun --nproc-per-node 8 -m rorqual train RUN.toml

Every replica reads the rows of the whole step and counts its targets, so that the gradients of the shares add up to those
of one device. After the last micro-batch gradients, losses and loads are summed over the replicas. A sum is the same bits
everywhere, and so is whatever follows from sums alone: norm, clipping, the guard's judgement, update, bias, average.
Nothing of that is sent. What a process knows by itself (a signal, its clock) becomes a decision through `any` alone.
Records, checkpoints, reports and words to a person come from the first replica.

Only what one host needs is here. A model that does not fit one GPU, sharded moments, and several hosts are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.errors import ConfigError, TrainingError

BUCKET = 1 << 28
"""Bytes that are summed in one call: small tensors are copied together, for hundreds of them would each cost a latency."""


@dataclass(frozen=True)
class Replicas:
    """This process is replica `rank` of `world`, each with a device of its own."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Of this replica, where `name` is a run's device. Raises ConfigError where there is none for it."""
        device = torch.device(name)
        if self.world == 1 or device.type != "cuda":
            return device
        if name != device.type:
            raise ConfigError(f"device = {name} is one GPU for {self.world} replicas", remedy="set device=cuda")
        if (there := torch.cuda.device_count()) < self.world:
            raise ConfigError(f"{self.world} replicas on {there} GPUs", remedy=f"torchrun --nproc-per-node {there}")
        return torch.device("cuda", self.rank)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Inside, the replicas know each other, by the address that torchrun put into the environment."""
        if self.world == 1:
            yield
            return
        # torch's optimisers import this, and it keeps the group there is as a default: ours would outlive its end, and its
        # threads sometimes abort the process when Python ends.
        from torch.distributed.nn import functional  # noqa: F401

        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)  # kernels are started on the current one, wherever their tensors lie
        # Decisions go over the host: one on a GPU would wait for everything that is queued there.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, rank=self.rank, world_size=self.world)
        try:
            yield
        except BaseException:
            # On GPUs leaving is an agreement too, and the others may wait elsewhere: the process's end must tell them.
            if not on_gpu:
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()

    def mine(self, rows: int, micro_batch: int) -> range:
        """Where this replica's micro-batches begin among the rows of a step."""
        return range(self.rank * micro_batch, rows, self.world * micro_batch)

    def any(self, *flags: bool) -> list[bool]:
        """Which of the flags are set in at least one replica. All of them wait here for each other."""
        if self.world == 1:
            return list(flags)
        both = torch.tensor(flags, dtype=torch.uint8)
        _all_reduce(both, dist.ReduceOp.MAX)
        return [bool(flag) for flag in both.tolist()]

    def wait(self) -> None:
        """Until all replicas are here."""
        self.any(False)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its sum over the replicas, in place."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                _all_reduce(bucket[0], dist.ReduceOp.SUM)
                continue
            flat = torch.cat([t.reshape(-1) for t in bucket])
            _all_reduce(flat, dist.ReduceOp.SUM)
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])

    def gradients(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The same ones in every replica: where another has one and this one had no micro-batch for it, zeros are put."""
        for p, anywhere in zip(leaves, self.any(*(p.grad is not None for p in leaves)), strict=True):
            if anywhere and p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in leaves if p.grad is not None]


ALONE = Replicas()


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    try:
        dist.all_reduce(tensor, op)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if tensor.is_cuda:  # NCCL says the cause last
            raise TrainingError(f"the sum over the replicas failed: {error}") from error
        raise TrainingError(f"another replica has ended: {str(error).splitlines()[0]}") from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype together, up to BUCKET bytes; a larger one by itself."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[Tensor] = []
        held = 0
        for t in (t for t in tensors if t.dtype == dtype):
            if bucket and held + t.nbytes > BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(t)
            held += t.nbytes
        if bucket:
            yield bucket
