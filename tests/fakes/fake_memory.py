"""Fake device memory: host memory behind real addresses, with every access checked against live allocations."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

ALIGNMENT = 256
GUARD_BYTES = 256
GUARD = 0xA5
POISON = 0xFF  # of new and of freed memory: NaN in every floating type
KEPT_FREED_BYTES = 256 << 20


class FakeCudaError(AssertionError):
    """Something that is undefined behaviour, or a crash, on a real GPU. Deliberately not an error the code expects."""


@dataclass
class Allocation:
    """One cudaMalloc or cudaHostAlloc: `storage` owns guard, payload, guard."""

    address: int
    nbytes: int
    device: int
    storage: np.ndarray = field(repr=False)
    offset: int
    freed: bool = False

    @property
    def payload(self) -> np.ndarray:
        return self.storage[self.offset : self.offset + self.nbytes]

    def guards_intact(self) -> bool:
        before = self.storage[self.offset - GUARD_BYTES : self.offset]
        after = self.storage[self.offset + self.nbytes : self.offset + self.nbytes + GUARD_BYTES]
        return bool((before == GUARD).all() and (after == GUARD).all())


def allocate(nbytes: int, device: int) -> Allocation:
    """Poisoned memory at a 256-byte aligned address, with guards on both sides."""
    storage = np.empty(nbytes + 2 * GUARD_BYTES + ALIGNMENT, np.uint8)
    start = storage.ctypes.data + GUARD_BYTES
    offset = GUARD_BYTES + (-start) % ALIGNMENT
    storage[:offset] = GUARD
    storage[offset + nbytes :] = GUARD
    storage[offset : offset + nbytes] = POISON
    return Allocation(storage.ctypes.data + offset, nbytes, device, storage, offset)


class Memory:
    """Allocations of one kind ("device" or "pinned host"), live and freed.

    Attributes:
        in_use: bytes live per device; `reserve` counts bytes that have no storage (engine weights).
        peak: the most `in_use` has been, per device.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.live: dict[int, Allocation] = {}
        self.freed: list[Allocation] = []
        self.in_use: dict[int, int] = {}
        self.peak: dict[int, int] = {}
        self._sorted: list[int] = []

    def reserve(self, device: int, nbytes: int) -> None:
        """Counts `nbytes` (negative to give back) without storage."""
        self.in_use[device] = self.in_use.get(device, 0) + nbytes
        self.peak[device] = max(self.peak.get(device, 0), self.in_use[device])

    def allocate(self, device: int, nbytes: int) -> int:
        allocation = allocate(nbytes, device)
        self.live[allocation.address] = allocation
        self._sorted = sorted(self.live)
        self.reserve(device, nbytes)
        return allocation.address

    def free(self, address: int) -> None:
        if address not in self.live:
            twice = any(item.address == address for item in self.freed)
            raise FakeCudaError(
                f"free of {self.kind} memory {address:#x}: {'freed before' if twice else 'never allocated'}"
            )
        allocation = self.live.pop(address)
        self._sorted = sorted(self.live)
        self.reserve(allocation.device, -allocation.nbytes)
        if not allocation.guards_intact():
            raise FakeCudaError(
                f"{self.kind} memory {address:#x} ({allocation.nbytes} bytes) was written out of bounds"
            )
        allocation.payload[:] = POISON
        allocation.freed = True
        self.freed.append(allocation)
        while sum(item.nbytes for item in self.freed) > KEPT_FREED_BYTES:
            self.freed.pop(0)

    def find(self, address: int) -> Allocation | None:
        """The live allocation that `address` lies in."""
        index = bisect_right(self._sorted, address) - 1
        if index < 0:
            return None
        allocation = self.live[self._sorted[index]]
        return allocation if address < allocation.address + max(allocation.nbytes, 1) else None

    def was_freed(self, address: int) -> bool:
        """Whether `address` lies in memory that was freed and not handed out again."""
        return any(item.address <= address < item.address + max(item.nbytes, 1) for item in self.freed)

    def check(self, address: int, nbytes: int, what: str) -> Allocation:
        """Raises FakeCudaError unless [address, address + nbytes) lies in one live allocation."""
        allocation = self.find(address)
        if allocation is None:
            raise FakeCudaError(
                f"{what}: {address:#x} is {'freed' if self.was_freed(address) else 'not'} {self.kind} memory"
            )
        if address + nbytes > allocation.address + allocation.nbytes:
            raise FakeCudaError(
                f"{what}: {nbytes} bytes at {address:#x} pass the end of an allocation of {allocation.nbytes} bytes "
                f"at {allocation.address:#x}"
            )
        return allocation

    def check_all(self) -> None:
        """Raises FakeCudaError if a guard was overwritten or freed memory was written."""
        for allocation in self.live.values():
            if not allocation.guards_intact():
                raise FakeCudaError(f"{self.kind} memory {allocation.address:#x} was written out of bounds")
        for allocation in self.freed:
            if not (allocation.payload == POISON).all():
                raise FakeCudaError(f"{self.kind} memory {allocation.address:#x} was written after it was freed")


def copy(destination: int, source: int, nbytes: int) -> None:
    """Host memmove; addresses must have been checked."""
    ctypes.memmove(destination, source, nbytes)
