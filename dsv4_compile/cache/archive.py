"""Entries as one file, to carry from the machine that compiled them to those that run them."""

import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import CacheArchiveBad, CacheEntryBad
from .store import Entry, Store, private_folder, write_whole

LARGEST = 1 << 30  # bytes of one member


def pack(store: Store, file: Path, entries: Iterable[Entry] | None = None) -> int:
    """Write the entries (all, if none are given) as a tar file; returns how many. Each is verified first. The same entries
    give the same bytes."""
    count = 0
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for entry in store.entries() if entries is None else entries:
            about = entry.file.with_suffix(".json")
            _, data = store.checked(about, entry.key)
            for name, content in ((f"{entry.key.digest}.bin", data), (f"{entry.key.digest}.json", about.read_bytes())):
                member = tarfile.TarInfo(f"{entry.key.kind}/{name}")
                member.size, member.mode = len(content), 0o600
                tar.addfile(member, io.BytesIO(content))
            count += 1
    return count


def unpack(store: Store, file: Path) -> tuple[int, int]:
    """Take the entries of an archive: (taken, already there). Raises CacheArchiveBad, and then takes nothing, if a member is
    no file of an entry, or an entry is not what it says."""
    members = read_members(file)
    private_folder(store.root)
    staged = Store(tempfile.mkdtemp(prefix=".import-", dir=store.root))
    try:
        for name, content in members.items():
            private_folder((staged.root / name).parent)
            write_whole(staged.root / name, content)
        found = []
        for about in staged.files():
            try:
                found.append(staged.checked(about))
            except CacheEntryBad as bad:
                raise CacheArchiveBad(file, bad.why) from None
        if 2 * len(found) != len(members):
            raise CacheArchiveBad(file, "it holds payloads that no entry describes")
        fresh = [(entry, data) for entry, data in found if store.peek(entry.key) is None]
        for entry, data in fresh:
            store.save(entry.key, data, entry.facts)
        return len(fresh), len(found) - len(fresh)
    finally:
        shutil.rmtree(staged.root.parent)


def read_members(file: Path) -> dict[str, bytes]:
    """By name: kind/digest.json and kind/digest.bin, and nothing else."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                kind, _, name = member.name.partition("/")
                stem, _, suffix = name.partition(".")
                fits = kind.isidentifier() and len(stem) == 64 and set(stem) <= set("0123456789abcdef")
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None or not fits or suffix not in ("json", "bin") or member.size > LARGEST:
                    raise CacheArchiveBad(file, f"{member.name!r} is no file of an entry")
                members[member.name] = stream.read()
    except (tarfile.TarError, EOFError) as error:
        raise CacheArchiveBad(file, f"it is no whole tar file ({error})") from None
    return members
