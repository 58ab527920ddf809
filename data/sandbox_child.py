"""The inner side of the sandbox: gives up everything, then runs a program. Started by sandbox.py, with no packages.

What it gives up, in this order: the network and the mounts (namespaces of its own), time, memory and file sizes (limits
that it may not raise), files (Landlock: it reads the interpreter and writes in its own folder, which is in memory), and
system calls (seccomp: no other processes, no programs, no sockets, no signals to others, no namespaces).
"""

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

_NEWNS, _NEWIPC, _NEWUSER, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
_PRIVATE_RECURSIVE, _NOSUID_NODEV_NOEXEC = 0x44000, 0xE
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR, _WRITE_FILE, _TRUNCATE, _ALL_FILES = 1 << 2, 1 << 3, 1 << 1, 1 << 14, (1 << 15) - 1
_DEVICE_CONTROL, _BIND_AND_CONNECT, _ABSTRACT_SOCKETS_AND_SIGNALS = 1 << 15, 3, 3
_THREAD = 0x00010000

# Numbers of system calls on x86-64 and on arm64 (None: there is none).
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_DENIED = (
    (57, None), (58, None), (59, 221), (322, 281),  # fork, vfork, execve, execveat
    (41, 198), (425, 425), (426, 426), (427, 427),  # socket; io_uring, which could open one
    (101, 117), (310, 270), (311, 271), (438, 438), (434, 434),  # ptrace, process_vm_*, pidfd_getfd, pidfd_open
    (200, 130), (129, 138), (297, 240), (424, 424),  # tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal
    (272, 97), (308, 268), (165, 40), (166, 39), (155, 41), (161, 51),  # unshare, setns, mount, umount, pivot, chroot
    (428, 428), (429, 429), (430, 430), (431, 431), (432, 432), (433, 433), (442, 442),  # the new mount calls
    (321, 280), (298, 241), (323, 282), (250, 219), (248, 217), (249, 218),  # bpf, perf, userfaultfd, keys
    (304, 265), (175, 105), (313, 273), (246, 104), (169, 142),  # open_by_handle, modules, kexec, reboot
)  # fmt: skip
_CLONE, _CLONE3, _TO_OWN_PROCESS_ONLY = (56, 220), (435, 435), ((62, 129), (234, 131))  # kill, tgkill

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def leave_network_and_mounts(folder: str, folder_bytes: int) -> None:
    """A network without devices, and mounts of its own, one of which is a small folder in memory."""
    user, group = os.getuid(), os.getgid()
    check(libc.unshare(_NEWUSER | _NEWNET | _NEWNS | _NEWIPC), "user, network and mount namespaces")
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as f:
            f.write(text)
    check(libc.mount(b"none", b"/", None, _PRIVATE_RECURSIVE, None), "private mounts")
    options = f"size={folder_bytes},nr_inodes=1000,mode=700".encode()
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _NOSUID_NODEV_NOEXEC, options), "a folder in memory")
    os.chdir(folder)


def limit(seconds: float, memory_bytes: int, file_bytes: int) -> None:
    for name, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (most, most))


def leave_files(readable: list[str], folder: str) -> None:
    """Landlock: no file but these may be read, and none outside of the folder written."""
    version = check(libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock")
    if version < 3:
        raise OSError(errno.ENOSYS, "Landlock of Linux 6.2 or later is needed")
    files = _ALL_FILES | (_DEVICE_CONTROL if version >= 5 else 0)
    fields = [
        files,
        *([_BIND_AND_CONNECT] if version >= 4 else []),
        *([_ABSTRACT_SOCKETS_AND_SIGNALS] if version >= 6 else []),
    ]
    handled = struct.pack(f"<{len(fields)}Q", *fields)
    rules = check(libc.syscall(_LANDLOCK_CREATE, handled, len(handled), 0), "Landlock's rules")
    for path in [*readable, folder]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = files if path == folder else _READ_FILE | _READ_DIR
        if not os.path.isdir(path):
            allowed &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        beneath = struct.pack("<Qi", allowed, place)
        check(libc.syscall(_LANDLOCK_ADD, rules, 1, beneath, 0), f"Landlock's rule of {path}")
        os.close(place)
    check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    check(libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "Landlock's restriction")
    os.close(rules)


def leave_system_calls() -> None:
    """A seccomp filter."""
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {platform.machine()}")
    column, architecture = _ARCHITECTURES[platform.machine()]
    load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, deny, missing = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, deny)]  # another numbering
    for numbers in _DENIED:
        number = numbers[column]
        if number is not None:
            program += [(equal, 0, 1, number), (answer, 0, 0, deny)]
    program += [(equal, 0, 1, _CLONE3[column]), (answer, 0, 0, missing)]  # whose flags a filter cannot read
    program += [(equal, 0, 4, _CLONE[column]), (load, 0, 0, 16), (bits, 0, 1, _THREAD)]
    program += [(answer, 0, 0, allow), (answer, 0, 0, deny)]
    for numbers in _TO_OWN_PROCESS_ONLY:
        program += [(equal, 0, 4, numbers[column]), (load, 0, 0, 16), (equal, 0, 1, os.getpid())]
        program += [(answer, 0, 0, allow), (answer, 0, 0, deny)]
    program.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    check(libc.prctl(_SECCOMP, _FILTER, header, 0, 0), "the filter of system calls")


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    said = int(sys.argv[1])
    given = os.memfd_create("stdin")
    os.write(given, request["stdin"].encode())
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    os.close(given)
    leave_network_and_mounts(request["folder"], request["folder_bytes"])
    limit(request["seconds"], request["memory_bytes"], request["file_bytes"])
    leave_files(request["readable"], request["folder"])
    leave_system_calls()
    os.write(said, b"ready")
    os.close(said)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    program = compile(request["code"], "program.py", "exec")
    sys.argv = ["program.py"]
    exec(program, {"__name__": "__main__", "__builtins__": __builtins__})


if __name__ == "__main__":
    main()
