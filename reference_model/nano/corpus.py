"""The text that `nano` learns: the library sources of CPython 3.11.7, one archive, split by module.

The archive travels with the repository, not with the installed package. To build it
again from an interpreter's library:

    python -m dsv4_compile.reference_model.nano.corpus LIB reference_model/corpus/python-3.11.7-lib.tar.xz
"""

import hashlib
import io
import lzma
import sys
import tarfile
from pathlib import Path, PurePosixPath

ARCHIVE = Path(__file__).parents[1] / "corpus" / "python-3.11.7-lib.tar.xz"
# Of the tar inside: compressed bytes may differ between versions of xz.
SHA256 = "f98732f6436890dd123765891ab281148a3ebf4663ee4c143ecd53aa568d6a6a"

# Not text that anyone wrote to be read: tables, generated files, parser fixtures, and the tests of bundled programs.
LEFT_OUT = (
    "__pycache__/",
    "_sysconfigdata",
    "config-",
    "distutils/tests/",
    "encodings/",
    "idlelib/idle_test/",
    "lib-dynload/",
    "lib2to3/",
    "pydoc_data/",
    "site-packages/",
    "test/test_lib2to3",
    "tkinter/test/",
    "turtledemo/",
)
LARGEST = 200_000  # bytes; the few longer files are mostly tables of cases

# Modules whose sources and tests are never trained on.
HELD_OUT = frozenset(
    [
        "calendar",
        "configparser",
        "csv",
        "fractions",
        "graphlib",
        "heapq",
        "json",
        "optparse",
        "sched",
        "selectors",
        "shlex",
        "statistics",
        "tarfile",
        "textwrap",
        "wsgiref",
    ]
)
SHIPPED = ("graphlib.py", "shlex.py", "sched.py", "json/decoder.py", "json/scanner.py", "textwrap.py", "selectors.py")
SHIPPED_BYTES = 65536


def family(name: str) -> str:
    """The top-level module that a file implements or tests: json for json/tool.py and test/test_json/test_tool.py."""
    parts = PurePosixPath(name).with_suffix("").parts
    if parts[0] == "test" and len(parts) > 1:
        return parts[1].removeprefix("test_").removeprefix("_")
    return parts[0].removeprefix("_py").removeprefix("_")


def build(library: Path) -> bytes:
    """Tar of the chosen sources and the licence under `library` (lib/python3.11), the same bytes on every machine."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted([library / "LICENSE.txt", *library.rglob("*.py")]):
            name = path.relative_to(library).as_posix()
            if name.startswith(LEFT_OUT) or "__pycache__" in name or path.stat().st_size > LARGEST:
                continue
            entry = tarfile.TarInfo(name)
            entry.size = path.stat().st_size
            tar.addfile(entry, io.BytesIO(path.read_bytes()))
    return stream.getvalue()


def read(archive: Path = ARCHIVE) -> dict[str, bytes]:
    """Every file of the archive by name, in order. Raises ValueError where its content is not what was recorded."""
    if not archive.is_file():
        raise FileNotFoundError(f"no corpus at {archive}: it is part of a checkout, not of the installed package")
    tar = lzma.decompress(archive.read_bytes())
    found = hashlib.sha256(tar).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{archive} holds a tar with sha256 {found}, expected {SHA256}: restore it from the repository"
        )
    with tarfile.open(fileobj=io.BytesIO(tar)) as files:
        return {entry.name: files.extractfile(entry).read() for entry in files}


def split(files: dict[str, bytes]) -> tuple[list[bytes], list[bytes], bytes]:
    """Training documents, held-out documents, and the held-out text that ships with the package (64 KiB)."""
    sources = {name: text for name, text in files.items() if name.endswith(".py")}
    train = [text for name, text in sources.items() if family(name) not in HELD_OUT]
    held = [text for name, text in sources.items() if family(name) in HELD_OUT]
    return train, held, b"".join(sources[name] for name in SHIPPED)[:SHIPPED_BYTES]


if __name__ == "__main__":
    tar = build(Path(sys.argv[1]))
    Path(sys.argv[2]).write_bytes(lzma.compress(tar, preset=9 | lzma.PRESET_EXTREME))
    print("sha256 of the tar:", hashlib.sha256(tar).hexdigest())
