"""Runs a program that can open no vsock socket, and that ends with whoever started it. Linux on x86-64 and AArch64.

    python -m device_harness.no_vsock COMMAND ARGUMENT...

A network namespace does not hold vsock, by which a virtual machine's host reaches it; Debian's adbd listens there too.
A seccomp filter answers socket(AF_VSOCK, ...) with EAFNOSUPPORT, for the program and all that it starts.
"""

import ctypes
import os
import platform
import signal
import struct
import sys
from collections.abc import Sequence

AF_VSOCK, EAFNOSUPPORT = 40, 97
SET_PDEATHSIG, SET_SECCOMP, SET_NO_NEW_PRIVS, FILTER_MODE = 1, 22, 38, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE, FIRST = 0, 4, 16  # offsets in seccomp_data: system call, architecture, low word of argument 0
MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # -> audit architecture, number of socket()


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid_vsock() -> None:
    """From now on socket(AF_VSOCK) fails here and in every child.

    Raises:
        OSError: if the kernel or the machine has no such filter.
    """
    if platform.machine() not in MACHINES:
        raise OSError(EAFNOSUPPORT, f"no filter for {platform.machine()}")
    architecture, number = MACHINES[platform.machine()]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 0, 6, architecture),  # else the last step
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 3, number),
        (LOAD, 0, 0, FIRST),
        (EQUAL, 0, 1, AF_VSOCK),
        (RETURN, 0, 0, ERROR | EAFNOSUPPORT),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, KILL),
    ]
    program = _Program(len(steps), b"".join(struct.pack("=HBBI", *step) for step in steps))
    _prctl(SET_NO_NEW_PRIVS, 1, 0)
    _prctl(SET_SECCOMP, FILTER_MODE, ctypes.addressof(program))


def _prctl(option: int, first: int, second: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_ulong(first), ctypes.c_ulong(second), ctypes.c_ulong(0), ctypes.c_ulong(0))
    if libc.prctl(option, *arguments):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns only if the program cannot be started."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    if not command or command[0] in ("-h", "--help"):
        print("usage: python -m device_harness.no_vsock COMMAND ARGUMENT... (or --help)\n\n" + (__doc__ or ""))
        return 0 if command else 2
    try:
        _prctl(SET_PDEATHSIG, signal.SIGKILL, 0)
        forbid_vsock()
        os.execvp(command[0], command)  # noqa: S606  # what this is for
    except OSError as exc:
        print(f"error: {command[0]}: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
