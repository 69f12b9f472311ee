"""C compiled on the user's machine, once, into a cache folder that only the user can write.

The folder is ``$XDG_CACHE_HOME/groundwire`` (``~/.cache/groundwire``), mode 0700. A library in it runs as the user's
own code, so a folder that belongs to someone else or that others can enter is not used; a temporary one is. The
file name holds a hash of source, options, compiler and processor. A build goes to a name of its own and is renamed when
complete, so processes that build at the same time do not meet.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


def library(name: str, source: str) -> ctypes.CDLL | str:
    """``source`` as a loaded library, compiled if this machine has not done so before; or why that cannot be.

    Args:
        name: Beginning of the file's name.
        source: A whole C file.

    Returns:
        The library, or a sentence for the user.
    """
    command = find() if os.name == "posix" else None
    if command is None:
        return "no C compiler found (cc, gcc, clang) -> install one, or name it in the environment variable CC"
    try:
        path = folder() / f"{name}-{_key(command, source)}.so"
        if not path.exists():
            _build(command, source, path)
        return ctypes.CDLL(str(path))
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"{shlex.join(command)} could not compile the kernel: {str(said).strip()[-300:]}"
    except OSError as error:
        return f"the compiled kernel cannot be stored or loaded: {error}"


def find() -> list[str] | None:
    """The C compiler as a command: ``$CC`` if it is set, else the first of cc, gcc, clang; None if there is none."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def folder() -> Path:
    """The cache folder, made if need be; a private temporary one where that is not possible or not safe."""
    root = os.environ.get("XDG_CACHE_HOME")
    path = (Path(root) if root else Path.home() / ".cache") / "groundwire"
    try:
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        if private(path) and os.access(path, os.W_OK):
            return path
    except OSError:
        pass  # A home that is missing or read-only is common in containers.
    return Path(tempfile.mkdtemp(prefix="groundwire-"))


def private(path: Path) -> bool:
    """Whether ``path`` is a folder, not a link, of this user, that nobody else can enter."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _key(command: list[str], source: str) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    parts = (source, *FLAGS, *command, version, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """What ``-march=native`` depends on: a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.node()
    kinds = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _build(command: list[str], source: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        code, built = Path(work) / "kernel.c", Path(work) / "kernel.so"
        code.write_text(source)
        subprocess.run(
            [*command, *FLAGS, str(code), "-o", str(built)], capture_output=True, text=True, timeout=120, check=True
        )
        os.replace(built, path)
