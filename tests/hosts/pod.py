"""What a container runtime does, in namespaces that it is started in: a root of its own, volumes, a user, a command.

    ip netns exec NETWORK unshare --mount --uts --ipc --pid --fork --kill-child python pod.py SPEC.json

SPEC.json holds `hostname`, `command`, `env`, `user`, `read_only`, `mounts` (place -> folder here), `hosts` (the file
that becomes /etc/hosts) and `program` (folders that the image would hold, at the places where they are here).
"""

import ctypes
import json
import os
import shutil
import socket
import sys
from pathlib import Path

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18  # linux/mount.h
libc = ctypes.CDLL(None, use_errno=True)

SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr")
ETC = ("passwd", "group", "ld.so.cache", "ld.so.conf", "nsswitch.conf", "localtime", "ssl", "alternatives")


def mount(
    source,
    target,
    kind,
    flags=0,
    data="",
):
    if libc.mount(
        source.encode(),
        str(target).encode(),
        kind.encode(),
        flags,
        data.encode(),
    ):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target}: {os.strerror(number)}")


def bind(source, target, *, read_only=False):
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(str(source), target, "none", MS_BIND | MS_REC)
    if read_only:
        mount("none", target, "none", MS_BIND | MS_REMOUNT | MS_RDONLY)


def main(spec):
    socket.sethostname(spec["hostname"])
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    root = Path(spec["root"])
    mount("tmpfs", root, "tmpfs", data="mode=755")
    for name in SYSTEM:
        place = Path("/", name)
        if place.is_symlink():
            (root / name).symlink_to(os.readlink(place))
        elif place.is_dir():
            bind(place, root / name, read_only=True)
    (root / "etc").mkdir()
    for name in ETC:
        if Path("/etc", name).is_dir():
            shutil.copytree(f"/etc/{name}", root / "etc" / name, symlinks=True)
        elif Path("/etc", name).exists():
            shutil.copy(f"/etc/{name}", root / "etc" / name)
    (root / "etc/resolv.conf").touch()
    bind(spec["hosts"], root / "etc/hosts")
    for name in ("proc", "dev", "tmp", "run"):
        (root / name).mkdir(exist_ok=True)
    mount("proc", root / "proc", "proc")
    for name in ("null", "zero", "random", "urandom"):
        bind(f"/dev/{name}", root / "dev" / name)
    (root / "dev/shm").mkdir()
    for place, folder in spec["mounts"].items():
        bind(folder, root / place.lstrip("/"))
    for place in spec["program"]:  # after the volumes: one of them is /tmp, where the program may lie
        bind(place, root / place.lstrip("/"))
    if spec["read_only"]:
        mount("none", root, "none", MS_REMOUNT | MS_RDONLY)
    os.chroot(root)
    os.chdir("/")
    os.setgroups([])
    os.setgid(spec["user"])
    os.setuid(spec["user"])
    libc.prctl(
        38,
        1,
        0,
        0,
        0,
    )  # PR_SET_NO_NEW_PRIVS, as allowPrivilegeEscalation: false
    os.execvpe(spec["command"][0], spec["command"], spec["env"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
