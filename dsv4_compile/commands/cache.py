"""`dsv4 cache`: look at the folder of compiled kernels, check it, move it."""

import json
import sys
from pathlib import Path
from time import time
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..cache import archive
from ..cache.key import Key, flat, nearest
from ..cache.store import Entry, Store
from ..errors import CacheEntryBad, DSV4Error
from .arguments import plainly

app = typer.Typer(no_args_is_help=True, help="Compiled kernels and tuning records on disk.")
Folder = Annotated[
    Path | None, typer.Option("--cache-dir", help="The folder; DSV4_CACHE_DIR or the user's cache folder if left out.")
]
Digest = Annotated[str, typer.Argument(help="The beginning of a digest, as `dsv4 cache ls` shows it.")]
SHOWN = 12  # digits of a digest
DAY = 86400


@app.command("ls")
def ls(folder: Folder = None) -> None:
    """All entries."""
    with plainly(DSV4Error, OSError):
        store = Store(folder)
        entries = list(store.entries())
        table = Table("digest", "kind", "op", "arch", "size")
        for e in entries:
            op, arch = (str(e.key.fields.get(name, "")) for name in ("op", "arch"))
            table.add_row(e.key.digest[:SHOWN], e.key.kind, op, arch, decimal(e.size))
        print(f"{len(entries)} entries, {decimal(sum(e.size for e in entries))} in {store.root}")
        if entries:
            Console(width=None if sys.stdout.isatty() else 120).print(table)


@app.command("show")
def show(digest: Digest, folder: Folder = None) -> None:
    """One entry in full: its key, and what was said about it."""
    with plainly(DSV4Error, OSError):
        e = the_entry(Store(folder), digest)
        about = {"kind": e.key.kind, "fields": e.key.fields, "size": e.size, "sha256": e.sha256, "facts": e.facts}
        print(json.dumps({"digest": e.key.digest} | about, indent=1, sort_keys=True))


@app.command("why")
def why(
    digest: Annotated[str | None, typer.Argument(help="The beginning of a missed key's digest.")] = None,
    folder: Folder = None,
) -> None:
    """Why entries had to be built: for each miss, the nearest entry and the fields in which they differ."""
    with plainly(DSV4Error, OSError):
        store = Store(folder)
        misses = [k for k in store.misses() if k.digest.startswith(digest or "")]
        if not misses:
            print("no misses are recorded" + (f" whose digest begins with {digest}" if digest else ""))
        there = [e.key for e in store.entries()]
        for key in misses:
            print("\n".join(explained(key, nearest(key, there))))


def explained(key: Key, other: Key | None) -> list[str]:
    """Why there was no entry for a key, in lines."""
    name = f"{key.digest[:SHOWN]} ({key.kind} {key.fields.get('op', '')})".replace(" )", ")")
    if other is None:
        return [f"{name}: nothing of its kind was there"]
    lines = [f"{name}: nearest is {other.digest[:SHOWN]}"]
    return lines + [f"  {field}: wanted {a!r}, there is {b!r}" for field, (a, b) in key.differences(other).items()]


@app.command("verify")
def verify(folder: Folder = None) -> None:
    """Check every entry; bad ones are put aside, and the exit code is 1."""
    with plainly(DSV4Error, OSError):
        store, bad = Store(folder), 0
        files = store.files()
        for file in files:
            try:
                store.checked(file)
            except CacheEntryBad as error:
                bad += 1
                print(f"bad: {error}")
                store.put_aside(file.parent.name, file.stem, error)
        print(f"{len(files) - bad} of {len(files)} entries are whole")
        raise typer.Exit(1 if bad else 0)


@app.command("prune")
def prune(
    older_than: Annotated[float, typer.Option(metavar="DAYS", help="Only what was written longer ago.")] = 0.0,
    match: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=VALUE", help="Only entries with this field.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only say what would be.")] = False,
    folder: Folder = None,
) -> None:
    """Remove entries, and all that was put aside."""
    with plainly(DSV4Error, OSError):
        store = Store(folder)
        wanted = [m.partition("=")[::2] for m in match or []]

        def chosen(entry: Entry) -> bool:
            fields = flat(entry.key.fields)
            old = time() - entry.file.stat().st_mtime >= older_than * DAY
            return old and all(str(fields.get(name)) == value for name, value in wanted)

        entries = [e for e in store.entries() if chosen(e)]
        aside = list((store.root / "quarantine").glob("*")) if not wanted else []
        if yes:
            for entry in entries:
                store.remove(entry)
            for file in aside:
                file.unlink(missing_ok=True)
        said = "removed" if yes else "would remove"
        print(f"{said} {len(entries)} entries ({decimal(sum(e.size for e in entries))}), {len(aside)} files put aside")


@app.command("export")
def export(file: Annotated[Path, typer.Argument(help="The tar file to write.")], folder: Folder = None) -> None:
    """All entries as one tar file, for another machine."""
    with plainly(DSV4Error, OSError):
        print(f"{archive.pack(Store(folder), file)} entries written to {file}")


@app.command("import")
def import_(file: Annotated[Path, typer.Argument(help="A tar file of `export`.")], folder: Folder = None) -> None:
    """Take the entries of a tar file, each verified; one bad entry, and nothing is taken."""
    with plainly(DSV4Error, OSError):
        taken, there = archive.unpack(Store(folder), file)
        print(f"{taken} entries taken, {there} were there")


def the_entry(store: Store, digest: str) -> Entry:
    """The one entry whose digest begins so. Raises DSV4Error if there is none or several."""
    found = [e for e in store.entries() if e.key.digest.startswith(digest)]
    if len(found) != 1:
        raise DSV4Error(
            f"{len(found)} entries begin with {digest!r}: give a digest of `dsv4 cache ls`, long enough for one"
        )
    return found[0]
