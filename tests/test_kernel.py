"""What all kernels have in common: keys, builds without a GPU, the cache, the monitor. Their mathematics is tested op by op."""

import json
import os
from importlib.util import find_spec

import pytest

if find_spec("cutlass") is None:
    pytest.skip("GPU kernels need CuTeDSL, which has wheels for Linux only", allow_module_level=True)

from dsv4_compile import kernel as base
from dsv4_compile.cache.store import Store
from dsv4_compile.errors import DSV4Warning, JitAfterWarmUp
from dsv4_compile.kernels import (
    attention,
    attention_exact,
    compressor,
    compressor_append,
    mhc,
    mhc_boundary,
    norm,
    router,
)

SHAPE = router.Shape(24, 4)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A cache of its own, nothing loaded, a silent monitor."""
    monkeypatch.setattr(base, "STORE", Store(tmp_path))
    monkeypatch.setattr(base, "MONITOR", base.Monitor())
    monkeypatch.setattr(router.KERNEL, "loaded", {})
    return base.STORE


def test_a_key_names_what_the_binary_depends_on_and_nothing_else():
    fields = norm.KERNEL.key(norm.Shape(24, "bf16", "none", 4), norm.Config(2, 4)).fields
    assert fields.keys() == {"op", "source", "shape", "config", "arch", "flags", "cutedsl", "tvm_ffi"}
    assert fields["shape"] == {"D": 24, "dtype": "bf16", "weight": "none", "rope": 4, "cache": "none"}
    assert fields["config"] == {"warps": 2, "rows": 4}
    text = json.dumps(fields)
    assert "torch" not in text and "/" not in text and "0x" not in text


def test_the_source_is_that_of_all_files_that_a_kernel_imports(tmp_path):
    def digest(**changed):
        files = {
            "a": "from dsv4_compile.kernels.b import f\nfrom dsv4_compile.kernels.e import g",
            "b": "from dsv4_compile.kernels import c",
            "c": "",
            "d": "",
            "e": "CHOOSES = True",
        }
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in (files | changed).items():
            (folder / f"{name}.py").write_text(text)
        return base.source_digest(str(folder / "a.py"))

    assert digest() == digest() == digest(d="x = 1") == digest(e="CHOOSES = True  # others")
    assert len({digest(), digest(b="from dsv4_compile.kernels import c  #"), digest(c="x = 1"), digest(e="")}) == 4


def test_built_once_then_loaded(store, monkeypatch):
    router.KERNEL.launcher(SHAPE)
    (entry,) = store.entries()
    assert entry.key == router.KERNEL.key(SHAPE, next(router.configs(SHAPE)))
    assert len(base.MONITOR.compiled) == 1
    monkeypatch.setattr(router.KERNEL, "loaded", {})
    base.MONITOR.mode = "error"
    router.KERNEL.launcher(SHAPE)
    with pytest.raises(JitAfterWarmUp, match="experts=24, k=5"):
        router.KERNEL.launcher(router.Shape(24, 5))
    base.MONITOR.mode = "warn"
    with pytest.warns(DSV4Warning, match="experts=24, k=5"):
        router.KERNEL.launcher(router.Shape(24, 5))


def test_another_source_under_the_same_version_is_another_entry(store, tmp_path, monkeypatch):
    file, config = tmp_path / "kernel.py", router.Config()
    kernel = base.Kernel("router", str(file), router.program, router.configs)
    monkeypatch.setattr(base.Kernel, "build", lambda self, shape, config: (file.read_bytes(), {}))
    monkeypatch.setattr(base, "load", lambda data: data)
    for text in (b"x = 1", b"x = 2", b"x = 1"):
        file.write_bytes(text)
        base.source_digest.cache_clear()  # as in a process of its own
        kernel.loaded.clear()
        assert kernel.launcher(SHAPE, config) == text
    assert len(list(store.entries())) == 2


def test_wrong_tensors_are_refused_before_anything_runs(store):
    import torch

    expert, gate = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4)
    with pytest.raises(Exception, match=r"(?s)logits.*float32"):
        router.KERNEL.launcher(SHAPE)(torch.zeros(3, 24).double(), torch.zeros(24), expert, gate, 1.0, 0.0)


NANO_AND_FLASH = [
    (router.KERNEL, SHAPE),
    (router.KERNEL, router.Shape(256, 6)),
    (mhc.PRE, mhc.Shape(4, 192, "fp32", 20)),
    (mhc.PRE, mhc.Shape(4, 4096, "bf16", 20)),
    (mhc.PRE, mhc.Shape(4, 4096, "bf16", 0)),
    (mhc.POST, mhc.Shape(4, 4096, "bf16", 20)),
    (mhc_boundary.BOUNDARY, mhc_boundary.Shape(4, 4096, "bf16", 20, True, "bf16")),
    (compressor.KERNEL, compressor.Shape(512, 8, 64, True, "fp32")),
    (compressor.KERNEL, compressor.Shape(512, 128, 64, False, "fp32")),
    (compressor_append.KERNEL, compressor_append.Shape(512, 8, 64, True, "fp32")),
    (compressor_append.KERNEL, compressor_append.Shape(512, 128, 64, False, "fp32")),
    (attention.KERNEL, attention.Shape(64, 6, True, False, 16)),
    (attention_exact.KERNEL, attention_exact.Shape(48, 6, True, False, 16, "fp32")),
    (norm.KERNEL, norm.Shape(512, "bf16", "none")),
    (norm.KERNEL, norm.Shape(512, "bf16", "fp32", 64)),
    (norm.KERNEL, norm.Shape(4096, "bf16", "fp32")),
    (norm.KERNEL, norm.Shape(16384, "fp32", "fp32")),
]


@pytest.mark.parametrize(
    "target", ["sm_90a", "sm_100a"] if os.environ.get("DSV4_TEST_CONFIGS") == "all" else ["sm_90a"]
)
@pytest.mark.parametrize(
    ("kernel", "shape"), NANO_AND_FLASH, ids=lambda x: x.name if isinstance(x, base.Kernel) else ""
)
def test_it_compiles_without_a_gpu_and_does_not_spill(kernel, shape, target):
    _, facts = kernel.build(shape, next(kernel.configs(shape)), target)
    assert facts["kernels"] and all(k["stack"] == 0 for k in facts["kernels"].values()), facts


def every_configuration():
    """Of Flash: hundreds of builds, an hour or more on one core."""
    if os.environ.get("DSV4_TEST_CONFIGS") != "all":
        return
    flash = [
        (attention.KERNEL, attention.Shape(512, 64, True, False, 64)),
        (attention.KERNEL, attention.Shape(512, 128, True, False, 64)),
        *((norm.KERNEL, norm.Shape(512, "bf16", weight, rope)) for weight in ("none", "fp32") for rope in (0, 64)),
        *((norm.KERNEL, norm.Shape(D, "bf16", "fp32")) for D in (1024, 1536, 4096, 7168)),
        *((mhc_boundary.BOUNDARY, mhc_boundary.Shape(4, D, "bf16", 20, True, "bf16")) for D in (4096, 7168)),
    ]
    for kernel, shape in flash:
        for config in kernel.configs(shape):
            yield pytest.param(kernel, shape, config, id=f"{kernel.name}-{shape}-{config}")


@pytest.mark.parametrize(("kernel", "shape", "config"), every_configuration())
def test_every_configuration_compiles_and_does_not_spill(kernel, shape, config):
    """On demand: DSV4_TEST_CONFIGS=all."""
    _, facts = kernel.build(shape, config, "sm_90a")
    assert facts["kernels"] and all(k["stack"] == 0 for k in facts["kernels"].values()), facts
