"""The layout is a contract: packages, import arrows, file sizes, the lazy front door."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dsv4_compile", "kernels", "lowerings", "patterns", "reference_model")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def package(folder: Path) -> str:
    """Dotted name under which a folder of a room is imported."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "dsv4_compile" else ("dsv4_compile", *parts))


def sources() -> list[Path]:
    return sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def tracked() -> list[Path]:
    """Files under version control; outside a checkout, every file that is not hidden or built."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    skip = {"build", "dist", "__pycache__"}
    inside = (p for p in ROOT.rglob("*") if p.is_file())
    return [p for p in inside if not any(s in skip or s.startswith(".") for s in p.relative_to(ROOT).parts[:-1])]


# Packages


def test_every_package_is_listed() -> None:
    tree = {package(p.parent) for p in sources()}
    assert tree == set(SETUPTOOLS["packages"])
    assert all((ROOT / p.relative_to(ROOT).parent / "__init__.py").is_file() for p in sources())


def test_package_dirs_map_every_package() -> None:
    assert {package(ROOT / folder): folder for folder in SETUPTOOLS["package-dir"].values()} == SETUPTOOLS[
        "package-dir"
    ]
    assert set(SETUPTOOLS["package-dir"]) == {package(ROOT / room) for room in ROOMS}


# Import arrows: room -> outside modules, own modules, forbidden all the same.  A dot at the end: the whole package.

ARROWS: dict[str, tuple[set[str], set[str], set[str]]] = {
    "dsv4_compile.reference_model": ({"torch", "safetensors"}, {"dsv4_compile.reference_model."}, {"torch.fx"}),
    "dsv4_compile.kernels": ({"cutlass"}, {"dsv4_compile.kernel", "dsv4_compile.kernels."}, set()),
    "dsv4_compile.lowerings": (
        {"torch", "sympy"},
        {"dsv4_compile.op", "dsv4_compile.lowerings.", "dsv4_compile.kernels."},
        {"torch.fx"},
    ),
    "dsv4_compile.patterns": (
        {"torch"},
        {"dsv4_compile.match", "dsv4_compile.patterns.", "dsv4_compile.lowerings."},
        {"torch.cuda"},
    ),
}
MACHINERY_SEES_ROOMS_AS = {"dsv4_compile.kernels", "dsv4_compile.lowerings", "dsv4_compile.patterns"}


def within(name: str, allowed: str) -> bool:
    stem = allowed.rstrip(".")
    return name == stem or name.startswith(stem + ".") if allowed.endswith(".") else name == stem


def imports(path: Path, home: str) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) for every import of a file; `name` is empty for `import module`.

    `from package import submodule` counts as an import of the submodule when there is one.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = home.split(".")[: len(home.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, base, alias.name


def modules() -> dict[str, Path]:
    names = {}
    for path in sources():
        home = package(path.parent)
        names[home if path.stem == "__init__" else f"{home}.{path.stem}"] = path
    return names


def imported_modules(path: Path, home: str) -> Iterator[tuple[int, str]]:
    known = modules()
    for line, base, name in imports(path, home):
        yield line, f"{base}.{name}" if f"{base}.{name}" in known else base


def own_kernel(name: str, op: str) -> bool:
    """Or a cost model, which is no part of any."""
    if name in {"dsv4_compile.kernels", f"dsv4_compile.kernels.{op}"}:
        return True
    return "\nCHOOSES = True" in modules()[name].read_text()


def complaints(path: Path) -> list[str]:
    home = package(path.parent)
    room = ".".join(home.split(".")[:2])
    found = []
    for line, name in imported_modules(path, home):
        top = name.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if top in {"tests", "benchmarks", "patterns", "lowerings", "kernels", "reference_model"}:
            found.append(where)
        elif room not in ARROWS:
            if any(within(name, f"{r}.") and name != r for r in MACHINERY_SEES_ROOMS_AS):
                found.append(f"{where}: the machinery knows a room, not one op by name")
        elif top not in sys.stdlib_module_names:
            outside, ours, never = ARROWS[room]
            allowed = any(within(name, a) for a in ours) if top == "dsv4_compile" else top in outside
            if not allowed or any(within(name, f"{n}.") for n in never):
                found.append(where)
            elif (
                within(name, "dsv4_compile.kernels.")
                and room == "dsv4_compile.lowerings"
                and not own_kernel(name, path.stem)
            ):
                found.append(f"{where}: a lowering may import its own kernel only")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_arrows(room: str) -> None:
    assert [c for p in sources() if p.relative_to(ROOT).parts[0] == room for c in complaints(p)] == []


def test_a_forbidden_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    cases = {
        "reference_model/a.py": "import numpy",
        "reference_model/b.py": "from dsv4_compile import config",
        "kernels/a.py": "import torch.fx",
        "lowerings/a.py": "from torch.fx import Graph",
        "lowerings/b.py": "from dsv4_compile.kernels import a",
        "patterns/a.py": "from ..kernels import a",
        "dsv4_compile/a.py": "from .patterns.a import rule",
        "dsv4_compile/b.py": "import patterns",
        "dsv4_compile/c.py": "from tests.helpers import x",
    }
    for name, line in cases.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line + "\n")
    (tmp_path / "dsv4_compile/config.py").write_text("")
    assert {name: bool(complaints(tmp_path / name)) for name in cases} == dict.fromkeys(cases, True)


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_rooms_are_imported_by_their_full_name(folder: str) -> None:
    bare = set(ROOMS) - {"dsv4_compile"}
    assert [
        f"{path.relative_to(ROOT)}:{line} imports {base}"
        for path in (ROOT / folder).rglob("*.py")
        for line, base, _ in imports(path, folder)
        if base.split(".")[0] in bare
    ] == []


# Files


def test_no_file_is_long() -> None:
    long = {p: len(p.read_text().splitlines()) for p in tracked() if p.suffix == ".py"}
    assert {str(p.relative_to(ROOT)): n for p, n in long.items() if n > 600} == {}


def test_no_text_names_a_workplace() -> None:
    words = [b"/" + w + b"/" for w in (b"work", b"farm")] + [b"/" + b".library"]
    texts = ((p, p.read_bytes()) for p in tracked())
    assert [str(p.relative_to(ROOT)) for p, t in texts if b"\0" not in t and any(w in t for w in words)] == []


# The front door


def run(code: str) -> None:
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=ROOT)


def test_import_is_lazy() -> None:
    run("import sys, dsv4_compile; heavy = {'torch', 'cutlass', 'numpy'} & set(sys.modules); assert not heavy, heavy")


def test_public_names_resolve() -> None:
    run("import dsv4_compile as d; assert [n for n in d.__all__ if getattr(d, n) is None] == []")


def test_unknown_name_is_an_attribute_error() -> None:
    import dsv4_compile

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dsv4_compile.nothing
