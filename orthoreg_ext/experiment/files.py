"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_CHECKPOINT = r"weights\.safetensors|history\.json"  # its files, in a folder until they are whole


RESUME = "make room or mend the folder, then continue with --resume"


def write_atomic(path: Path, content: bytes, remedy: str = RESUME) -> None:
    """Writes a file so that a crash at any moment leaves the old content or the new one.

    Raises:
        OSError: It cannot be written (no space, no permission); the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # nor can it be removed from a folder that is read-only
            temporary.unlink()
        raise OSError(
            error.errno,
            f"cannot write {str(path)!r} ({error.strerror}); what was stored before is intact: "
            f"{remedy}",
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


def check_folder(folder: Path, *, resume: bool, state_name: str) -> None:
    """Checks that the output folder is new or empty, or holds a run that is to be continued.

    Raises:
        ValueError: It is no folder, holds something else, or a run that is not to be continued.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--out {str(folder)!r} is a file; choose a folder")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"--out {str(folder)!r} is not writable; choose another folder")
    entries = sorted(entry.name for entry in folder.iterdir() if not _is_leftover(entry))
    if state_name in entries:
        if not resume:
            raise ValueError(
                f"--out {str(folder)!r} exists and holds a run; continue it with --resume, or "
                "choose another --out"
            )
    elif entries:
        raise ValueError(
            f"--out {str(folder)!r} exists, is not empty ({entries[0]!r}) and holds no run to "
            "continue; choose another --out"
        )


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Creates the output folder and keeps it to this process, however that ends.

    What a process that was killed left half-written is removed.

    Raises:
        OSError: It cannot be created.
        ValueError: Another process owns it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _not_created(folder, error) from error
    try:
        _lock(descriptor, folder)
        try:
            for entry in folder.iterdir():
                if _is_leftover(entry):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError as error:
            raise _not_created(folder, error) from error
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--out {str(folder)!r} is in use: another orthoreg prune works in it; wait for it, or "
            "choose another --out"
        ) from error
    except OSError:  # some network file systems know no locks
        return


def _not_created(folder: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"--out {str(folder)!r} cannot be created ({error.strerror}); choose a folder you may "
        "write",
    )


def _is_leftover(entry: Path) -> bool:
    """Whether an entry is what a killed write_atomic, or a killed checkpoint, left half-written."""
    if entry.is_symlink() or not entry.is_dir():
        return re.fullmatch(r"\..+\.\d+\.tmp", entry.name) is not None
    if not re.fullmatch(r"\.orthoreg-[a-z0-9_]{8}", entry.name):
        return False
    return all(re.fullmatch(rf"(old-)?({_CHECKPOINT})", file.name) for file in entry.iterdir())
