"""Arguments of every op with a kernel for a given number of tokens, and which of them belong to single tokens: see
`test_invariant`. This file holds no tests; generated.py is loaded before it, under its name."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import generated
import torch
from generated import EPS, FAMILIES

bf16, fp32 = torch.bfloat16, torch.float32
FORMATS = ["bf16", "fp8", "mxfp4", "nvfp4"]
MOST = 64


class Sized:
    """In the place of random sizes: so many tokens, and otherwise the last that there is."""

    def __init__(self, count):
        self.count = count

    def choice(self, among):
        for size in among:
            first, *rest = size if isinstance(size, tuple) else (size,)
            if first in (MOST, self.count):
                return (self.count, *rest) if isinstance(size, tuple) else self.count
        return among[-1]


@dataclass(frozen=True)
class Case:
    """`make` of a draw and a number of tokens: arguments of the op, whose tokens lie along an axis; `out`: the results'."""

    op: Any
    make: Any
    axis: int = 0
    out: int = 0

    def given(self, count=MOST, seed=0):
        draw = generated.Draw(self.op.name, seed, False)
        draw.size = Sized(count)
        made = self.op.arguments(**self.make(draw, count))
        return {n: a.contiguous() if torch.is_tensor(a) else a for n, a in made.items()}

    @cached_property
    def of_tokens(self):
        """Names of the arguments that have something of each token."""
        two, three = self.given(2), self.given(3)
        return [n for n, a in two.items() if torch.is_tensor(a) and a.shape != three[n].shape]

    def some(self, given, places):
        """The arguments of some tokens."""
        return given | {n: given[n].index_select(self.axis, places) for n in self.of_tokens}


def sized(name, *spec):
    """The cases of an op, with the number of tokens drawn: see `Sized`."""
    return Case(FAMILIES[name].op, lambda d, M: FAMILIES[name].make(d, *spec))


def counted(name, place, *spec, axis=0, out=0):
    """The number of tokens is one of the static sizes."""
    return Case(FAMILIES[name].op, lambda d, M: FAMILIES[name].make(d, *spec[:place], M, *spec[place:]), axis, out)


def own(name):
    """An op's arguments made here."""
    return lambda make: Case(FAMILIES[name].op, make)


def with_streams(kind, n, D, dtype, iters):
    @own(kind)
    def case(d, M):
        found = dict(X=d.normal(M, n, D, dtype=dtype))
        if kind in ("mhc_post", "mhc_boundary"):
            comb = d.normal(M, n, n).softmax(-1)
            found |= dict(y=d.normal(M, D, dtype=dtype), post=d.uniform(0, 2, M, n), comb=comb)
        if kind != "mhc_post":
            found |= generated.mixture(d, n, D, (2 + n) * n, 3) | dict(iters=iters)
        return found | (dict(weight=d.weight(D), norm_eps=EPS) if kind in ("mhc_enter", "mhc_boundary") else {})

    return case


def attending(h, W, K, stored=0):
    @own("attention")
    def case(d, M):
        cos, sin = d.tables(M, 1, 1, 32)
        rows = lambda count: d.cache("bytes" if stored else bf16, stored, M, count, 512)  # noqa: E731
        rows = dict(keys=rows(150), entries=rows(300) if K else None, stored=stored)
        lists = dict(window=d.integers(-1, 150, M, 1, W), index=d.integers(-1, 300, M, 1, K) if K else None)
        q, sink = d.normal(M, 1, h, 512, dtype=bf16), d.normal(h)
        return rows | lists | dict(q=q, sink=sink, scale=0.05, sink_on_window=False, cos=cos, sin=sin)

    return case


@own("indexer")
def indexing(d, M):
    cos, sin = d.tables(M, 1, 1, 16)
    q, keys = d.normal(M, 1, 32, 128, dtype=bf16), d.normal(M, 700, 128, dtype=bf16)
    visible, w = d.integers(300, 701, M, 1), d.normal(M, 1, 32)
    return dict(q=q, keys=keys, w=w, visible=visible, k=100, cos=cos, sin=sin)


@own("norm_rope")
def turned(d, M):
    cos, sin = d.tables(M, 1, 1, 32)
    return dict(x=d.normal(M, 1, 5, 512, dtype=bf16), weight=None, eps=EPS, cos=cos, sin=sin)


@own("shared_expert")
def shared(d, M):
    found = generated.of_shared_expert(d, M, 4096, 1024, "fp8", bf16)
    comb = d.normal(M, 4, 4).softmax(-1)
    return found | dict(X=d.normal(M, 4, 4096, dtype=bf16), post=d.uniform(0, 2, M, 4), comb=comb)


@own("router")
def routing(d, M):
    return dict(logits=d.normal(M, 256), bias=d.uniform(0, 1, 256), k=6, scale=1.5, eps=1e-20)


@own("expert_gates")
def gating(d, M):
    return dict(logits=d.normal(M, 256), expert=d.integers(0, 256, M, 6), scale=1.5, eps=1e-20)


CASES = {
    **{f"linear {f}": counted("linear", 0, 1090, 2048, f, bf16) for f in (*FORMATS, "fp8 fp32")},
    "linear, odd": counted("linear", 0, 33, 96, "mxfp4", bf16),
    "linear in fp32": counted("linear", 0, 200, 1056, "fp32", fp32),
    "grouped_linear": counted("grouped_linear", 1, 3, 130, 512, "fp8", bf16, axis=1, out=1),
    "output_projection": counted("output_projection", 1, 3, 128, 512, 130, "fp8", "fp8", bf16, axis=1),
    "linear_wide": counted("linear_wide", 0, 256, 4096, "bf16", bf16),
    "linears_2": counted("linears_2", 0, (1024, 512), 4096, "fp8"),
    "linears_7": counted("linears_7", 0, (1024, 48, 512, 256, 256, 96, 96), 512, "fp8 and bf16", 0b101010),
    "normed_linears_2": counted("normed_linears_2", 0, (8320, 2048), 1024, "fp8", 0, fp32),
    "shared_expert": shared,
    "moe mxfp4": counted("moe", 0, 6, 24, 1024, 512, "mxfp4", bf16),
    "moe nvfp4": counted("moe", 0, 4, 7, 96, 160, "nvfp4", bf16),
    "moe bf16": counted("moe", 0, 2, 16, 256, 96, "bf16", bf16),
    "experts mxfp4": counted("experts", 0, 6, 24, 1024, 512, 512, "mxfp4", "fp8", False, 4, bf16),
    "experts bf16": counted("experts", 0, 4, 40, 512, 256, 128, "bf16", "bf16", True, 0, bf16),
    "experts by a table": counted("experts", 0, 4, 40, 512, 256, 128, "fp8", "bf16", 77, 0, bf16),
    "router": routing,
    "expert_gates": gating,
    "mhc_enter": with_streams("mhc_enter", 4, 192, fp32, 3),
    "mhc_boundary": with_streams("mhc_boundary", 4, 4096, bf16, 20),
    "mhc_pre": with_streams("mhc_pre", 4, 192, bf16, 3),
    "mhc_post": with_streams("mhc_post", 4, 192, bf16, 3),
    "head": counted("head", 0, 4, 192, 1000, bf16, True),
    "rms_norm": sized("rms_norm", 4096, bf16, fp32),
    "unit_norm": sized("unit_norm", 512, bf16),
    "norm_rope": turned,
    "norm_rope_append": sized("norm_rope_append", 512, 64, bf16, bf16),
    "norm_rope_append, bytes": sized("norm_rope_append", 512, 64, bf16, "bytes"),
    "attention, few rows": attending(16, 20, 0),
    "attention": attending(32, 128, 512),
    "attention, bytes": attending(32, 128, 512, 64),
    "indexer": indexing,
    "compressor": sized("compressor", 512, 4, 64, True, fp32),
    "compressor_append": sized("compressor_append", 512, 128, 64, False, bf16),
    "compressor_append, bytes": sized("compressor_append", 512, 128, 64, False, "bytes"),
    "compressor_append_fp8": sized("compressor_append_fp8", *generated.SCALED[0]),
    "prologue_2": sized("prologue_2", *generated.PROLOGUE[0], *generated.MEMORY[:2]),
    "prologue_2_fp8": sized("prologue_2_fp8", *generated.PROLOGUE[0], generated.MEMORY[0], generated.SCALED[0]),
}
ON_A_CPU = {
    "linear": counted("linear", 0, 200, 320, "fp8", fp32),
    "grouped_linear": counted("grouped_linear", 1, 3, 17, 96, "nvfp4", fp32, axis=1, out=1),
    "moe": counted("moe", 0, 3, 9, 96, 32, "mxfp4", fp32),
    "moe, plain": counted("moe", 0, 3, 9, 96, 40, "fp32", fp32),
    "moe, bf16": counted("moe", 0, 3, 9, 96, 32, "mxfp4", bf16),
    "mhc_pre": with_streams("mhc_pre", 4, 192, fp32, 3),
}
