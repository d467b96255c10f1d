"""What a kernel file declares: a CuTeDSL program, what it is specialised for, its configurations, one launch.

    @dataclass(frozen=True)
    class Shape: ...    # static sizes: part of the binary
    @dataclass(frozen=True)
    class Config: ...   # tile, warps, stages: what tuning chooses among

    def program(shape, config):  return entry, arguments        # a @cute.jit callable and fake arguments for it
    def configs(shape):          yield the default, then others that are valid
    KERNEL = Kernel("router", __file__, program, configs)

    KERNEL.launcher(shape)(tensors...)                           # compiled, or loaded from the cache, on first use

Compiled code is cached (`dsv4_compile.cache`) under a key that is equal on every machine, so that a machine without a GPU
can build it. Launches go to torch's current stream, allocate nothing and wait for nothing, so they may be captured.
"""

import ast
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from . import tuning
from .cache.key import Key
from .cache.store import Store
from .errors import DSV4Warning, JitAfterWarmUp, NoKernelCompiler
from .tuning import alike, by_twos, few, of_tokens, rounded

try:
    import cutlass.cute as cute
    from cutlass.cute.runtime import load_module, make_fake_stream, make_fake_tensor
except ImportError as error:
    raise NoKernelCompiler(error) from error

ROOM = "dsv4_compile.kernels"
__all__ = ["Kernel", "Monitor", "alike", "by_twos", "collecting", "fake", "few", "of_tokens", "rounded"]
__all__ += ["stream", "trying"]

SYMBOL = "kernel"  # of the entry in every object
FLAGS = "--enable-tvm-ffi --keep-cubin"


@cache
def arch() -> str:
    """What kernels are compiled for: DSV4_ARCH, else the device at hand, else Hopper."""
    import torch

    asked = os.environ.get("DSV4_ARCH")
    if asked:
        return asked
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@dataclass
class Monitor:
    """Counts what had to be compiled. mode: "off"; "warn" names each; "error" raises, which is what to set after warm-up."""

    mode: str = "off"
    compiled: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        if self.mode == "error":
            raise JitAfterWarmUp(what)
        self.compiled.append(what)
        if self.mode == "warn":
            warnings.warn(f"compiling a kernel: {what}", DSV4Warning, stacklevel=4)


MONITOR = Monitor()
STORE = Store()
WANTED: "list[tuple[Kernel, Any, Any]] | None" = None
TRIAL: "Trial | None" = None
MOST = 16  # candidates


@contextmanager
def collecting() -> "Iterator[list[tuple[Kernel, Any, Any]]]":
    """Inside, launches run nothing: kernel, shape and config of each are listed. The tensors may be fake."""
    global WANTED
    WANTED = []
    try:
        yield WANTED
    finally:
        WANTED = None


@dataclass
class Trial:
    """Inside `trying`: which launches were made, and in which configuration some of them have to be."""

    forced: "Mapping[tuple[Kernel, Any, tuple[int, ...]], Any]"
    seen: "dict[tuple[Kernel, Any, tuple[int, ...]], None]" = field(default_factory=dict)


@contextmanager
def trying(forced: "Mapping[tuple[Kernel, Any, tuple[int, ...]], Any] | None" = None) -> Iterator[Trial]:
    """Inside, launches that leave the configuration open are noted, by kernel, shape and class of work, and those in
    `forced` run as it says."""
    global TRIAL
    TRIAL = trial = Trial(forced or {})
    try:
        yield trial
    finally:
        TRIAL = None


@dataclass(eq=False)
class Kernel:
    """One kernel in all of its specialisations. Shapes and configs are frozen dataclasses of integers, strings and booleans.

    rank: where the best configuration depends on the amount of work too, all of them, best first; `work` is a class of
    amounts, as `of_tokens` and `rounded` make them."""

    name: str
    file: str
    program: Callable[[Any, Any], tuple[Any, Sequence[Any]]]
    configs: Callable[[Any], Iterator[Any]]
    rank: Callable[[Any, tuple[int, ...]], Iterable[Any]] | None = None
    loaded: dict[tuple[Any, Any], Callable[..., None]] = field(default_factory=dict, repr=False)
    choices: dict[tuple[Any, tuple[int, ...], tuple[str, bool]], Any] = field(default_factory=dict, repr=False)

    def launcher(self, shape: Any, config: Any = None, work: tuple[int, ...] = ()) -> Callable[..., None]:
        """The compiled kernel: takes the tensors and numbers that the program takes, without its stream. Without a
        configuration, in the one that is best for this class of work."""
        config = self.choice(shape, work) if config is None else config
        if WANTED is not None:
            WANTED.append((self, shape, config))
            return lambda *arguments: None
        found = self.loaded.get((shape, config))
        if found is None:
            data, _ = STORE.load_or_build(self.key(shape, config), lambda: self.build(shape, config))
            found = self.loaded[shape, config] = load(data)
        return found

    def choice(self, shape: Any, work: tuple[int, ...] = ()) -> Any:
        """The configuration that timings in the cache name, else the first candidate."""
        if TRIAL is not None:
            TRIAL.seen[self, shape, work] = None
            if (forced := TRIAL.forced.get((self, shape, work))) is not None:
                return forced
        mode = tuning.SETTINGS.autotune, alike()
        found = self.choices.get((shape, work, mode))
        if found is None:
            timed = None if mode[0] == "off" or WANTED is not None else self.recorded(shape, work)
            found = self.candidates(shape, work)[timed or 0]
            if WANTED is None:
                self.choices[shape, work, mode] = found
        return found

    def candidates(self, shape: Any, work: tuple[int, ...] = ()) -> list[Any]:
        """The configurations to choose among, best first as far as can be told without a GPU."""
        return list(islice(self.configs(shape) if self.rank is None else self.rank(shape, work), MOST))

    def record(self, shape: Any, work: tuple[int, ...]) -> Key:
        """What timings of the candidates are filed under, on this GPU."""
        of_candidates = self.candidates(shape, work)
        return tuning.key(self.name, source_digest(self.file), shape, work, of_candidates, tuning.device())

    def recorded(self, shape: Any, work: tuple[int, ...]) -> int | None:
        """The best candidate by the timings in the cache."""
        import torch

        return tuning.recorded(STORE, self.record(shape, work)) if torch.cuda.is_available() else None

    def key(self, shape: Any, config: Any, target: str | None = None) -> Key:
        """What the binary depends on, and nothing else: no version of torch, Python or the driver, no path, no time."""
        return Key(
            "object",
            {
                "op": self.name,
                "source": source_digest(self.file),
                "shape": asdict(shape),
                "config": asdict(config),
                "arch": target or arch(),
                "flags": FLAGS,
                "cutedsl": importlib.metadata.version("nvidia-cutlass-dsl"),
                "tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
            },
        )

    def build(self, shape: Any, config: Any, target: str | None = None) -> tuple[bytes, dict[str, Any]]:
        """Compile to an object file, for another architecture if asked; with it, what the binary says of itself:
        registers, stack and shared memory."""
        target = target or arch()
        MONITOR.note(f"{self.name} {shape} {config} {target}")
        start = perf_counter()
        entry, arguments = self.program(shape, config)
        with tempfile.TemporaryDirectory() as folder:
            compiled = cute.compile(entry, *arguments, options=f"{FLAGS} --gpu-arch {target} --dump-dir={folder}")
            file = Path(folder, f"{self.name}.o")
            compiled.export_to_c(str(file), function_name=SYMBOL)
            data = file.read_bytes()
        return data, {"seconds": round(perf_counter() - start, 3), "kernels": resources(compiled.artifacts.CUBIN)}


def load(data: bytes) -> Callable[..., None]:
    """The entry of an object file. The code is copied into memory, so the file need not stay."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.o")
        file.write_bytes(data)
        module = load_module(str(file), enable_tvm_ffi=True)
    LOADED.append(module)  # code goes away with its module
    return getattr(module, SYMBOL)


LOADED: list[Any] = []


@cache
def source_digest(file: str) -> str:
    """Of a kernel file and of those beside it that it imports, but for what only chooses among configurations: an entry's key
    has the configuration itself, a record of timings the list of them."""
    texts = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sources(Path(file))}
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()


def sources(file: Path) -> set[Path]:
    """The file and, at any remove, what it imports of its folder."""
    found, open_ = {file}, [file]
    while open_:
        for node in ast.walk(parsed(open_.pop().read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(ROOM):
                continue
            names = [node.module.removeprefix(ROOM + ".")] if node.module != ROOM else [a.name for a in node.names]
            new = {f for f in (file.with_name(f"{name}.py") for name in names) if not only_chooses(f)} - found
            found |= new
            open_ += new
    return found


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def only_chooses(file: Path) -> bool:
    """Whether it says `CHOOSES = True`: which configuration is tried first, and nothing that is compiled."""
    named = (node.targets for node in parsed(file.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign))
    return any(isinstance(t, ast.Name) and t.id == "CHOOSES" for targets in named for t in targets)


def resources(cubin: bytes | None) -> dict[str, dict[str, int]] | None:
    """By kernel: registers, stack (bytes; what spilled goes there) and static shared memory (bytes). None where the
    disassembler, which triton brings along, is missing."""
    tool = disassembler("cuobjdump")
    if cubin is None or tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: {"registers": int(r), "stack": int(s), "shared": int(m)} for name, r, s, m in found}


def disassembler(name: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, or in triton's wheel."""
    from importlib.util import find_spec

    if on_path := shutil.which(name):
        return on_path
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(file) if file.is_file() else None


def fake(dtype: Any, *shape: Any, align: int = 16) -> Any:
    """A contiguous tensor to compile with: static sizes are integers, others symbols; the innermost row must be aligned to
    `align` bytes for 128-bit loads."""
    strides: list[Any] = []
    run: Any = 1
    for size in reversed(shape):
        strides.append(run if run is not None else cute.sym_int64(divisibility=max(1, align * 8 // dtype.width)))
        run = run * size if run is not None and isinstance(size, int) else None
    return make_fake_tensor(dtype, shape, stride=tuple(reversed(strides)), assumed_align=align)


def stream() -> Any:
    """In a program's arguments: launch on torch's current stream; nothing is passed for it."""
    return make_fake_stream(use_tvm_ffi_env_stream=True)
