"""The folder of entries. An entry is two files, `<kind>/<digest>.bin` and `<digest>.json`, and the second one, written last,
makes it exist: it holds the key in clear and the size and checksum of the first.

Whatever happens to a writer, a reader sees a whole entry or none. Entries that are not what they say are named once, put
aside in `quarantine/`, and built again.
"""

import errno
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import CacheEntryBad, CacheFolderUnsafe, CacheLockTimeout, CacheNotWritten, DSV4Warning
from .key import Key

VERSION = "v1"
OTHER = ("locks", "misses", "quarantine")  # folders beside those of the kinds
LONGEST_BUILD = 600.0  # seconds to wait for another process that builds the same entry


@dataclass(frozen=True)
class Entry:
    """One entry as its .json tells it. `facts` is what the builder said about it: registers, seconds, timings."""

    key: Key
    size: int
    sha256: str
    facts: dict[str, Any]
    file: Path  # of the payload


def default_folder() -> Path:
    """DSV4_CACHE_DIR, else the user's cache folder."""
    if asked := os.environ.get("DSV4_CACHE_DIR"):
        return Path(asked)
    from platformdirs import user_cache_path

    return user_cache_path("dsv4_compile")


class Store:
    """The cache in one folder, safe for many processes at once. A folder that cannot be written is only read."""

    def __init__(self, folder: Path | str | None = None, longest_build: float = LONGEST_BUILD):
        self.root = (default_folder() if folder is None else Path(folder)) / VERSION
        self.longest_build = longest_build
        self.told: set[str] = set()

    # reading

    def load(self, key: Key) -> bytes | None:
        """The payload, verified; None if there is no entry, or if there was a bad one, which is put aside."""
        try:
            return self.checked(self.place(key, ".json"), key)[1]
        except FileNotFoundError:
            return None
        except CacheEntryBad as bad:
            self.put_aside(key.kind, key.digest, bad)
            return None

    def peek(self, key: Key) -> bytes | None:
        """`load`, but a bad entry is left where it is."""
        try:
            return self.checked(self.place(key, ".json"), key)[1]
        except (FileNotFoundError, CacheEntryBad):
            return None

    def checked(self, file: Path, key: Key | None = None) -> tuple[Entry, bytes]:
        """The entry that this .json describes and its payload. Raises FileNotFoundError if there is none, CacheEntryBad if
        it is not whole, not what it says, or not for `key`."""
        self.trust(file.parent)
        entry = read_entry(file)
        if key is not None and entry.key != key:
            raise CacheEntryBad(file, "it belongs to another key")
        if entry.key.digest != file.stem:
            raise CacheEntryBad(file, "its name is not the digest of its key")
        try:
            data = entry.file.read_bytes()
        except OSError:
            raise CacheEntryBad(file, "its payload is missing or cannot be read") from None
        if len(data) != entry.size:
            raise CacheEntryBad(file, f"its payload has {len(data)} bytes, expected {entry.size}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CacheEntryBad(file, "the checksum of its payload is wrong")
        return entry, data

    def trust(self, folder: Path) -> None:
        """Entries are run as code: refuse a folder that strangers may write to."""
        found = folder.stat()
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or found.st_uid not in (os.geteuid(), 0):
            raise CacheFolderUnsafe(folder)

    def entries(self) -> Iterator[Entry]:
        """All entries that can be read, in the order of their digests; payloads unverified."""
        for file in self.files():
            try:
                yield read_entry(file)
            except (CacheEntryBad, FileNotFoundError):
                continue

    def files(self) -> list[Path]:
        """The .json of every entry."""
        return sorted(f for kind in self.kinds() for f in kind.glob("*.json"))

    def kinds(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return [d for d in sorted(self.root.iterdir()) if d.is_dir() and d.name.isidentifier() and d.name not in OTHER]

    # writing

    def load_or_build(self, key: Key, build: Callable[[], tuple[bytes, dict[str, Any]]]) -> tuple[bytes, bool]:
        """The payload, and whether it was built now. Of many processes that want it, one builds. `build` returns the payload
        and facts about it. Raises CacheLockTimeout when another process has been building for too long."""
        data = self.peek(key)
        if data is not None:
            return data, False
        lock = self.lock(key)
        if lock is None:
            return build()[0], True
        try:
            with lock.acquire(timeout=self.longest_build):
                data = self.load(key)  # somebody may have built it meanwhile
                if data is not None:
                    return data, False
                self.note_miss(key)
                data, facts = build()
                self.save(key, data, facts)
                return data, True
        except Timeout:
            raise CacheLockTimeout(Path(lock.lock_file), self.longest_build) from None

    def lock(self, key: Key) -> FileLock | None:
        """The operating system frees it when its holder dies. None where nothing can be written."""
        folder = self.root / "locks"
        try:
            private_folder(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            self.tell(f"{self.root}: {error.strerror or error}: kernels are built, not kept")
            return None
        return FileLock(folder / f"{key.digest}.lock", mode=0o600)

    def save(self, key: Key, data: bytes, facts: dict[str, Any] | None = None) -> bool:
        """Write an entry; False, with one warning, where there is no room or no permission. The payload goes first."""
        about = {
            "kind": key.kind,
            "fields": key.fields,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "facts": facts or {},
        }
        text = json.dumps(about, sort_keys=True, indent=1, allow_nan=False) + "\n"
        try:
            private_folder(self.root / key.kind)
            write_whole(self.place(key, ".bin"), data)
            write_whole(self.place(key, ".json"), text.encode())
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
            warnings.warn(str(CacheNotWritten(self.root, reason)), DSV4Warning, stacklevel=2)
            return False
        return True

    def note_miss(self, key: Key) -> None:
        """Remember what was not there, for `dsv4 cache why`."""
        try:
            private_folder(self.root / "misses")
            write_whole(self.root / "misses" / f"{key.digest}.json", (key.text + "\n").encode())
        except OSError:
            return

    def misses(self) -> list[Key]:
        """The keys that had to be built, latest last."""
        files = sorted((self.root / "misses").glob("*.json"), key=lambda f: f.stat().st_mtime_ns)
        found = []
        for file in files:
            try:
                about = json.loads(file.read_text(encoding="utf-8"))
                found.append(Key(about["kind"], about["fields"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def put_aside(self, kind: str, digest: str, why: CacheEntryBad) -> None:
        """Move an entry to quarantine, where nothing reads it, and name it once."""
        self.tell(str(why))
        for suffix in (".json", ".bin"):
            file = self.root / kind / f"{digest}{suffix}"
            try:
                private_folder(self.root / "quarantine")
                os.replace(file, self.root / "quarantine" / f"{kind}-{digest}{suffix}")
            except FileNotFoundError:
                continue
            except OSError:
                return  # a folder that cannot be written: the entry is left where it is, and never loaded

    def remove(self, entry: Entry) -> None:
        """The description goes first: without it there is no entry."""
        for suffix in (".json", ".bin"):
            self.place(entry.key, suffix).unlink(missing_ok=True)

    def place(self, key: Key, suffix: str) -> Path:
        return self.root / key.kind / f"{key.digest}{suffix}"

    def tell(self, what: str) -> None:
        if what not in self.told:
            self.told.add(what)
            warnings.warn(what, DSV4Warning, stacklevel=3)


def read_entry(file: Path) -> Entry:
    """What a .json says. Raises FileNotFoundError and CacheEntryBad; believes nothing that it has not looked at."""
    try:
        about = json.loads(file.read_bytes())
        key = Key(about["kind"], about["fields"])
        size, sha256, facts = about["size"], about["sha256"], about["facts"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheEntryBad(file, f"it cannot be read ({type(error).__name__})") from None
    if type(size) is not int or type(sha256) is not str or type(facts) is not dict:
        raise CacheEntryBad(file, "size, sha256 or facts is of the wrong type")
    return Entry(key, size, sha256, facts, file.with_suffix(".bin"))


def private_folder(folder: Path) -> None:
    """The folder and those above it, readable and writable by the user alone where they are new."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder, 0o700)


def write_whole(file: Path, data: bytes) -> None:
    """Appears at once with all of its content, or not at all."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".new-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
