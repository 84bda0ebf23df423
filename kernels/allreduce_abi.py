"""ctypes side of `csrc/allreduce.h`, and memory that two processes share. Needs no torch."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from kernels import build

MAX_RANKS = 8
MAX_BYTES = 512 * 1024
MAX_BYTES_MULTIPLE = 256  # what max_bytes is a multiple of: 32 lines of 8 bytes
SIZE_MULTIPLE = 16  # bytes; of a message and of addresses
IPC_HANDLE_BYTES = 64
FLAG_STRIDE = 128
HASH_ENTRIES = 4
PAGE_BYTES = 4096
SHM_FOLDER = Path("/dev/shm")

_u32, _i32, _u64, _i64 = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int64
_ptr, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class WaitRecord(ctypes.Structure):
    """Dsv4WaitRecord."""

    _fields_ = (
        *((name, _u32) for name in ("written", "rank", "source", "operation", "generation")),
        ("expected", _u32),
        ("seen", _u32 * 2),
        *((name, _u32) for name in ("block", "line", "num_bytes", "reserved")),
        ("waited_ns", _u64),
    )


class Control(ctypes.Structure):
    """Dsv4Control."""

    _fields_ = (
        ("record", WaitRecord),
        ("completed", _u32),
        ("reserved", _u32),
        ("hash", _u64 * HASH_ENTRIES),
    )


class State(ctypes.Structure):
    """Dsv4State."""

    _fields_ = tuple((name, _u32) for name in ("generation", "arrived", "aborted", "hash"))


class AllReduceArgs(ctypes.Structure):
    """Dsv4AllReduceArgs."""

    _fields_ = (
        *((name, _ptr) for name in ("input", "out", "state", "control")),
        ("inbox", _ptr * MAX_RANKS),
        ("deadline_ns", _i64),
        *((n, _i32) for n in ("num_bytes", "max_bytes", "rank", "world_size", "num_blocks")),
        ("hash_every", _i32),
    )


class ProbeResult(ctypes.Structure):
    """Dsv4ProbeResult."""

    _fields_ = (
        *((name, _u32) for name in ("status", "rounds", "wrong", "wrong_round", "wrong_line")),
        ("expected", _u32 * 4),
        ("seen", _u32 * 4),
        ("flag_seen", _u32),
        ("reserved", _u32 * 2),
        ("elapsed_ns", _u64),
    )


class ProbeArgs(ctypes.Structure):
    """Dsv4ProbeArgs."""

    _fields_ = (
        *((n, _ptr) for n in ("write_data", "read_data", "my_flags", "peer_flags", "results")),
        ("deadline_ns", _i64),
        *((n, _i32) for n in ("send_lines", "check_lines", "rounds", "untimed_rounds")),
        *((n, _i32) for n in ("num_blocks", "initiator")),
    )


SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "dsv4_allreduce_inbox_bytes": (_size, [_i32, _i32]),
    "dsv4_allreduce": (_int, [ctypes.POINTER(AllReduceArgs), _ptr]),
    "dsv4_probe": (_int, [ctypes.POINTER(ProbeArgs), _ptr]),
    "dsv4_device_count": (_int, [ctypes.POINTER(_i32)]),
    "dsv4_set_device": (_int, [_i32]),
    "dsv4_device_bus_id": (_int, [_i32, ctypes.c_char_p, _i32]),
    "dsv4_synchronize": (_int, []),
    "dsv4_host_register": (_int, [_ptr, _size, ctypes.POINTER(_ptr)]),
    "dsv4_host_unregister": (_int, [_ptr]),
    "dsv4_device_alloc": (_int, [_size, ctypes.POINTER(_ptr)]),
    "dsv4_device_free": (_int, [_ptr]),
    "dsv4_device_write": (_int, [_ptr, _ptr, _size]),
    "dsv4_device_read": (_int, [_ptr, _ptr, _size]),
    "dsv4_ipc_export": (_int, [_ptr, _ptr]),
    "dsv4_ipc_open": (_int, [_ptr, ctypes.POINTER(_ptr)]),
    "dsv4_ipc_close": (_int, [_ptr]),
    "dsv4_error_string": (ctypes.c_char_p, [_int]),
}


@dataclass(frozen=True)
class Library:
    """The loaded functions; each call that fails raises a RuntimeError of one line."""

    functions: ctypes.CDLL

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that returns a cudaError_t."""
        error = getattr(self.functions, name)(*arguments)
        if error:
            text = self.functions.dsv4_error_string(error).decode()
            raise RuntimeError(f"{name}: CUDA error {error}: {text}")

    def inbox_bytes(self, world_size: int, max_bytes: int) -> int:
        """Bytes of one rank's inbox; 0 where the sizes are not supported."""
        return self.functions.dsv4_allreduce_inbox_bytes(world_size, max_bytes)

    def device_alloc(self, size_bytes: int) -> int:
        """Address of zeroed memory of the current device, an allocation of its own."""
        pointer = _ptr()
        self.call("dsv4_device_alloc", size_bytes, ctypes.byref(pointer))
        assert pointer.value is not None
        return pointer.value

    def host_register(self, address: int, size_bytes: int) -> int:
        """Pin mapped memory; the address that kernels use."""
        pointer = _ptr()
        self.call("dsv4_host_register", address, size_bytes, ctypes.byref(pointer))
        assert pointer.value is not None
        return pointer.value

    def ipc_export(self, pointer: int) -> str:
        """The handle of an allocation, as hex."""
        handle = ctypes.create_string_buffer(IPC_HANDLE_BYTES)
        self.call("dsv4_ipc_export", pointer, handle)
        return handle.raw.hex()

    def ipc_open(self, handle: str) -> int:
        """Map the allocation of another process; its address here."""
        pointer = _ptr()
        self.call("dsv4_ipc_open", bytes.fromhex(handle), ctypes.byref(pointer))
        assert pointer.value is not None
        return pointer.value

    def bus_id(self, device: int) -> str:
        """PCI address of a device, such as 0000:01:00.0."""
        text = ctypes.create_string_buffer(32)
        self.call("dsv4_device_bus_id", device, text, len(text))
        return text.value.decode()

    def device_count(self) -> int:
        """Devices that this process sees."""
        count = _i32()
        self.call("dsv4_device_count", ctypes.byref(count))
        return count.value


@functools.cache
def load(path: Path | None = None) -> Library:
    """Load a library, by default the one of `make kernels`.

    Raises:
        RuntimeError: it is not built, is stale, or cannot be loaded.
    """
    path = path or build.library_path()
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"kernels: {path} cannot be loaded: {error}") from error
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return Library(functions)


class SharedRegion:
    """Zeroed memory under a name in /dev/shm, mapped here; the file goes when all have it open.

    Every page is there from the start: a full /dev/shm is an error now and no SIGBUS later.
    """

    def __init__(self, name: str, file: int, size_bytes: int) -> None:
        self.name, self.size_bytes = name, size_bytes
        try:
            self._map = mmap.mmap(file, size_bytes)
        finally:
            os.close(file)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def create(cls, size_bytes: int) -> SharedRegion:
        """Make one under a new name.

        Raises:
            RuntimeError: /dev/shm has no room, or cannot be written.
        """
        name = f"dsv4-allreduce-{secrets.token_hex(8)}"
        path = SHM_FOLDER / name
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise RuntimeError(f"shared memory: {path}: {error.strerror}") from error
        try:
            os.posix_fallocate(file, 0, size_bytes)
        except OSError as error:
            os.close(file)
            path.unlink()
            raise RuntimeError(
                f"shared memory: {SHM_FOLDER} has no {size_bytes} bytes free: {error.strerror}"
            ) from error
        return cls(name, file, size_bytes)

    @classmethod
    def open(cls, name: str, size_bytes: int) -> SharedRegion:
        """Map one that another process made.

        Raises:
            RuntimeError: it is not there, or of another size.
        """
        path = SHM_FOLDER / name
        try:
            file = os.open(path, os.O_RDWR)
        except OSError as error:
            raise RuntimeError(
                f"shared memory: {path}: {error.strerror}; all ranks must share one /dev/shm"
            ) from error
        if (found := os.fstat(file).st_size) != size_bytes:
            os.close(file)
            raise RuntimeError(f"shared memory: {path} has {found} bytes, not {size_bytes}")
        return cls(name, file, size_bytes)

    def unlink(self) -> None:
        """Take the name away; the memory stays as long as it is mapped."""
        (SHM_FOLDER / self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmap. No address of it may be used any more."""
        self._map.close()
