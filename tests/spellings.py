"""The reference model written otherwise: its source with expressions put in other words that mean the same.

TABLE says how. In a pattern A and B stand for expressions that are tensors, and names that start with `_` for others. What
is a tensor is known from running the model once with every expression noted.
"""

import ast
import copy
import importlib
import linecache
import random
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dsv4_compile import reference_model
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

PACKAGE = reference_model.__name__
FILES = ("layers", "model")
KINDS = (SWA, CSA, HCA)
KEPT = {"__init__", "_apply", "check", "new_state", "allocate", "draft", "predict", "join", "of", "parts"}  # functions
# Calls that do something, or that lead to some: their order and number stay.
ONCE = {"extend", "put", "next", "of", "compressor", "indexer", "score", "attn", "region", "layer", "run"}


@dataclass
class Seen:
    """What an expression was, over all runs."""

    tensor: set[bool] = field(default_factory=set)
    rank: set[int] = field(default_factory=set)
    dtype: set[torch.dtype] = field(default_factory=set)

    def note(self, x: Any) -> None:
        self.tensor.add(isinstance(x, torch.Tensor))
        if isinstance(x, torch.Tensor):
            self.rank.add(x.dim())
            self.dtype.add(x.dtype)

    @property
    def is_tensor(self) -> bool:
        return self.tensor == {True}

    @property
    def floating(self) -> bool:
        return all(d.is_floating_point for d in self.dtype)


# One pattern a line, and other words for it. In brackets: what A must be for them to mean the same.
TABLE = """
A + B -> B + A | torch.add(A, B) | A.add(B) | B.add(A)
A + _n -> _n + A | torch.add(A, _n) | A.add(_n)
_n + A -> A + _n
A - B -> torch.sub(A, B) | A.sub(B) | A + -B | -B + A
A * B -> B * A | torch.mul(A, B) | A.mul(B) | B.multiply(A)
A * _n [floats] -> _n * A | torch.mul(A, _n) | A.mul(_n) | A / (1 / _n)
_n * A -> A * _n | A.mul(_n)
A / B [floats] -> torch.div(A, B) | A.div(B) | A * B.reciprocal() | A * (1 / B) | B.reciprocal() * A
-A [floats] -> A.neg() | torch.neg(A) | A * -1 | -1.0 * A | 0 - A
2 * A -> A + A | A * 2.0 | A.mul(2)
A // _n [integers] -> torch.div(A, _n, rounding_mode='floor') | A.floor_divide(_n)
A.square() -> A * A | A ** 2 | A.pow(2) | torch.square(A) | torch.mul(A, A) | A.pow(2.0) | torch.pow(A, 2)
torch.rsqrt(A) -> A.rsqrt() | 1 / torch.sqrt(A) | 1.0 / A.sqrt() | A ** -0.5 | A.pow(-0.5) |
    A.sqrt().reciprocal() | A.pow(0.5).reciprocal() | torch.pow(A, -0.5)
A * torch.rsqrt(B) -> A / torch.sqrt(B) | A / B ** 0.5 | torch.rsqrt(B) * A | A.div(B.sqrt())
A.sqrt() -> torch.sqrt(A) | A ** 0.5 | A.pow(0.5)
A.mean(-1, keepdim=True) -> A.sum(-1, keepdim=True) / A.shape[-1] | A.mean(-1).unsqueeze(-1) |
    A.mean((-1,), True) | A.sum(-1, keepdim=True) * (1 / A.shape[-1]) | torch.mean(A, dim=-1, keepdim=True) |
    A.mean(dim=-1)[..., None] | A.sum(-1).div(A.shape[-1]).unsqueeze(-1)
A.sum(_d, keepdim=True) -> A.sum(_d).unsqueeze(_d) | torch.sum(A, _d, keepdim=True) |
    A.sum(dim=(_d,), keepdim=True)
A.sum(_d) -> A.sum(_d, keepdim=True).squeeze(_d) | torch.sum(A, _d) | A.sum((_d,)) | torch.sum(A, dim=_d)
A @ B -> torch.matmul(A, B) | A.matmul(B) | torch.einsum('...ij,...jk->...ik', A, B)
A @ B [rank 3] -> torch.bmm(A, B) | A.bmm(B) | torch.einsum('bij,bjk->bik', A, B)
A @ B.transpose(-1, -2) -> torch.einsum('...ik,...jk->...ij', A, B) | A @ B.mT
A.transpose(-1, -2) @ B -> torch.einsum('...ji,...jk->...ik', A, B) | A.mT @ B | torch.matmul(A.mT, B)
F.linear(A, B) -> A @ B.T | torch.matmul(A, B.t()) | A.matmul(B.transpose(0, 1)) | A @ B.mT |
    torch.einsum('...k,nk->...n', A, B) | F.linear(A.flatten(0, -2), B).unflatten(0, A.shape[:-1])
torch.einsum('btgk,grk->btgr', A, B) -> torch.einsum('btgk,grk->btgr', (A, B)) |
    torch.einsum('grk,btgk->btgr', B, A) | (A.unsqueeze(-2) @ B.mT).squeeze(-2) |
    (A.flatten(0, 1).transpose(0, 1) @ B.mT).transpose(0, 1).unflatten(0, A.shape[:2])
A.transpose(-1, -2) -> A.mT | A.swapaxes(-1, -2) | A.movedim(-1, -2) | torch.transpose(A, -2, -1)
A.unsqueeze(-1) -> A[..., None] | A.reshape(*A.shape, 1) | A.view(*A.shape, 1) | torch.unsqueeze(A, -1) |
    A.unsqueeze(A.dim())
A.unsqueeze(-2) -> A[..., None, :] | torch.unsqueeze(A, -2)
A.unsqueeze(1) -> A[:, None] | torch.unsqueeze(A, 1)
A.unsqueeze(2) -> A[:, :, None] | A.unflatten(1, (-1, 1))
A.squeeze(2) -> A[:, :, 0] | A.flatten(1, 2) | torch.squeeze(A, 2) | A.select(2, 0)
A.flatten(-2) -> A.reshape(*A.shape[:-2], -1) | torch.flatten(A, -2) | A.flatten(-2, -1)
A.flatten(0, 1) -> A.reshape(-1, *A.shape[2:]) | torch.flatten(A, 0, 1)
A.flatten() -> A.reshape(-1) | torch.flatten(A) | A.reshape(A.numel()) | A.ravel()
A.unflatten(-1, _s) -> A.reshape(*A.shape[:-1], *_s) | torch.unflatten(A, -1, _s)
A.view(-1, _k, _d) [rank 2] -> A.reshape(-1, _k, _d) | A.unflatten(0, (-1, _k))
A.repeat_interleave(_k, 0) [rank 2] -> A.unsqueeze(1).expand(-1, _k, -1).flatten(0, 1) |
    A[:, None].repeat(1, _k, 1).flatten(0, 1) | torch.repeat_interleave(A, _k, dim=0) |
    torch.stack([A] * _k, 1).flatten(0, 1)
A.repeat(1, 1, _n, 1) -> A.expand(-1, -1, _n, -1) | A.expand(*A.shape[:2], _n, A.shape[-1]) |
    torch.cat([A] * _n, 2) | A.tile(1, 1, _n, 1)
A.split([_a, _b, _c], -1) -> (A[..., :_a], A[..., _a : _a + _b], A[..., _a + _b :]) |
    torch.split(A, [_a, _b, _c], -1) | (A.narrow(-1, 0, _a), A.narrow(-1, _a, _b), A.narrow(-1, _a + _b, _c)) |
    A.tensor_split((_a, _a + _b), -1) | A.split_with_sizes([_a, _b, _c], -1)
A.split([_a, _b, _c]) -> (A[:_a], A[_a : _a + _b], A[_a + _b :]) | A.tensor_split((_a, _a + _b)) |
    (A.narrow(0, 0, _a), A.narrow(0, _a, _b), A.narrow(0, _a + _b, _c))
A[..., :-_n] -> A.narrow(-1, 0, A.shape[-1] - _n) | A[..., : A.shape[-1] - _n] |
    A.split([A.shape[-1] - _n, _n], -1)[0]
A[..., -_n:] -> A.narrow(-1, A.shape[-1] - _n, _n) | A[..., A.shape[-1] - _n :] |
    A.split([A.shape[-1] - _n, _n], -1)[1]
A[..., 0::2] -> A[..., ::2] | A.unflatten(-1, (-1, 2))[..., 0] | A.reshape(*A.shape[:-1], -1, 2).select(-1, 0) |
    A.unflatten(-1, (-1, 2)).unbind(-1)[0] | A.unflatten(-1, (-1, 2)).chunk(2, -1)[0].squeeze(-1)
A[..., 1::2] -> A.unflatten(-1, (-1, 2))[..., 1] | A.reshape(*A.shape[:-1], -1, 2).select(-1, 1) |
    A.unflatten(-1, (-1, 2)).unbind(-1)[1] | A.unflatten(-1, (-1, 2)).split(1, -1)[1].squeeze(-1)
torch.cat([A, B], _d) -> torch.concat((A, B), dim=_d) | torch.cat((A, B), _d) | torch.concatenate([A, B], _d)
torch.stack([A, B], -1).flatten(-2) -> torch.cat([A.unsqueeze(-1), B.unsqueeze(-1)], -1).flatten(-2) |
    torch.stack((A, B), A.dim()).flatten(-2) | torch.stack([A, B], dim=-1).reshape(*A.shape[:-1], -1)
A.gather(-1, B) -> torch.gather(A, -1, B) | torch.take_along_dim(A, B, -1) | A.take_along_dim(B, 1)
A.topk(_k, -1).indices -> torch.topk(A, _k, dim=-1)[1] | A.topk(_k).indices |
    A.topk(_k, -1, sorted=False).indices | A.argsort(-1, descending=True)[..., :_k] |
    A.sort(-1, descending=True).indices[..., :_k] | torch.sort(A, descending=True)[1].narrow(-1, 0, _k)
(A * B.unsqueeze(-1)).sum(1) -> torch.einsum('nkd,nk->nd', A, B) | (B.unsqueeze(1) @ A).squeeze(1) |
    torch.bmm(B[:, None], A)[:, 0]
(A * B.unsqueeze(-1)).sum(-2) -> torch.einsum('...ne,...n->...e', A, B) | (B.unsqueeze(-2) @ A).squeeze(-2)
(A.unsqueeze(-1) * B).sum(-2) -> torch.einsum('...n,...nd->...d', A, B) | (A.unsqueeze(-2) @ B).squeeze(-2) |
    (B.mT @ A.unsqueeze(-1)).squeeze(-1)
(A * B).sum(2) -> torch.einsum('bnrc,bnrc->bnc', A, B) | torch.linalg.vecdot(A, B, dim=2)
A.unsqueeze(-1) * B.unsqueeze(-2) -> torch.einsum('...n,...d->...nd', A, B) | A[..., :, None] * B[..., None, :]
torch.stack([A * C - B * D, A * D + B * C], -1).flatten(-2) ->
    torch.view_as_real(torch.complex(A, B) * torch.complex(C, D)).flatten(-2) |
    torch.view_as_real(torch.view_as_complex(torch.stack([A, B], -1)) * torch.complex(C, D)).flatten(-2) |
    torch.view_as_real(torch.complex(A, B) * torch.complex(C, -D).conj()).flatten(-2)
A[B, C.clamp(min=0)] ->
    A.gather(1, C.clamp(min=0).flatten(1).unsqueeze(-1).expand(-1, -1, A.shape[-1])).unflatten(1, C.shape[1:]) |
    A.gather(1, C.flatten(1).clamp(min=0)[..., None].repeat(1, 1, A.shape[-1])).unflatten(1, C.shape[1:]) |
    torch.take_along_dim(A, C.clamp(min=0).flatten(1).unsqueeze(-1), 1).unflatten(1, C.shape[1:])
torch.searchsorted(A[B], C, right=True).int() -> F.one_hot(A, C.shape[0]).sum(0).cumsum(0).int() |
    torch.zeros_like(C).scatter_add(0, A, torch.ones_like(A)).cumsum(0).int()
A.argsort(stable=True) -> A.sort(stable=True).indices | torch.argsort(A, stable=True) | A.sort(stable=True)[1]
A.argsort() -> A.sort().indices | torch.argsort(A) | A.argsort(stable=True)
A.masked_fill(B, _n) -> torch.where(B, _n, A) | torch.where(~B, A, _n) | torch.masked_fill(A, B, _n)
torch.where(A, B, _n) -> B.masked_fill(~A, _n) | torch.where(~A, _n, B) | torch.where(A.logical_not(), _n, B)
A < _n -> A.lt(_n) | _n > A | torch.lt(A, _n) | ~(A >= _n)
A < B -> B > A | ~(A >= B) | A.lt(B)
A >= B -> B <= A | ~(A < B) | A.ge(B)
torch.softmax(A, _d) -> A.softmax(_d) | F.softmax(A, dim=_d) |
    EXP / EXP.sum(_d, keepdim=True) |
    EXP * EXP.sum(_d, keepdim=True).reciprocal() |
    EXP / EXP.sum(_d).unsqueeze(_d) |
    EXP2 / EXP2.sum(_d, keepdim=True)
torch.sigmoid(A) -> A.sigmoid() | F.sigmoid(A) | torch.special.expit(A) | 1 / (1 + torch.exp(-A)) |
    (1 + (-A).exp()).reciprocal()
F.silu(A) -> A * torch.sigmoid(A) | A.sigmoid() * A | A / (1 + torch.exp(-A)) | A * (1 / (1 + torch.exp(-A))) |
    torch.nn.functional.silu(A)
F.softplus(A) -> F.softplus(A, 1.0, 20.0) | torch.where(A > 20, A, torch.log1p(torch.exp(A))) |
    torch.where(A > 20, A, torch.exp(A).log1p())
F.relu(A) -> A.relu() | torch.relu(A) | A.clamp(min=0) | A.clamp_min(0) | torch.maximum(A, torch.zeros_like(A))
A.clamp(max=_n) [floats] -> torch.clamp(A, max=_n) | A.clamp_max(_n) | A.clip(max=_n) |
    torch.minimum(A, NUMBER) |
    torch.minimum(A, torch.full_like(A, _n)) | torch.clamp(A, None, _n)
A.clamp(-_n, _n) -> A.clamp(min=-_n, max=_n) | A.clamp_min(-_n).clamp_max(_n) | A.clamp(max=_n).clamp(min=-_n) |
    torch.clip(A, -_n, _n) | F.hardtanh(A, -_n, _n) |
    torch.maximum(torch.minimum(A, NUMBER), -NUMBER)
A.clamp(min=0) [integers] -> A.clamp_min(0) | torch.clamp(A, min=0) | A.relu() |
    torch.maximum(A, torch.zeros_like(A))
A.float() -> A.to(torch.float32) | A.type(torch.float32) | A.to(dtype=torch.float)
A.to(B.dtype) -> A.type_as(B) | A.type(B.dtype) | A.to(dtype=B.dtype) | A.to(B)
acc(A) -> A.to(torch.promote_types(A.dtype, torch.float32))
acc(A).flatten(-2) -> acc(A.flatten(-2))
acc(A).unsqueeze(-2) -> acc(A.unsqueeze(-2))
acc(A).clamp(max=_n) -> acc(A.clamp(max=_n))
acc(A).transpose(-1, -2) -> acc(A.mT)
rms_norm(A, B, _e) -> F.rms_norm(acc(A), (A.shape[-1],), B, _e).to(A.dtype)
rms_norm(A, None, _e) -> F.rms_norm(acc(A), (A.shape[-1],), None, _e).to(A.dtype)
"""
SHORT = {
    "EXP2": "torch.exp(A - A.max(_d, keepdim=True).values)",
    "EXP": "torch.exp(A - A.amax(_d, keepdim=True))",
    "NUMBER": "torch.full((), _n, dtype=A.dtype, device=A.device)",
}

# Words that change nothing, put around calls and sums.
NOISE = ["A.contiguous()", "A.unsqueeze(0).squeeze(0)", "A.to(A.dtype)", "A.reshape(A.shape)", "A.clone()", "A.view(A.shape)",
         "A.expand(A.shape)", "A * 1", "A.unsqueeze(-1).squeeze(-1)"]  # fmt: skip


@dataclass
class Rule:
    """A pattern of TABLE."""

    pattern: ast.expr
    others: list[str]
    when: str

    def applies(self, node: ast.expr, seen: dict[int, Seen]) -> dict[str, ast.expr] | None:
        """What the pattern's names stand for, if it fits."""
        found: dict[str, ast.expr] = {}
        if not fits(self.pattern, node, found, seen):
            return None
        a = seen[found["A"].number]
        right = {"": True, "floats": a.floating, "integers": not a.floating}
        right |= {f"rank {n}": a.rank == {n} for n in (2, 3)}
        return found if right[self.when] else None


def fits(p: Any, x: Any, found: dict[str, ast.expr], seen: dict[int, Seen]) -> bool:
    """Whether the source x says what the pattern p says."""
    if isinstance(p, ast.Name) and (p.id.startswith("_") or p.id in set("ABCD")):
        what = seen.get(getattr(x, "number", None), Seen())
        right = what.is_tensor if p.id.isupper() else isinstance(x, ast.Constant) or what.tensor == {False}
        if right and p.id in found:
            return ast.dump(found[p.id]) == ast.dump(x)
        return right and found.setdefault(p.id, x) is x
    if type(p) is not type(x):
        return False
    if isinstance(p, ast.AST):
        return all(fits(getattr(p, f, None), getattr(x, f, None), found, seen) for f in p._fields if f != "ctx")
    if isinstance(p, list):
        return len(p) == len(x) and all(fits(i, j, found, seen) for i, j in zip(p, x, strict=True))
    return p == x


def parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@cache
def rules() -> list[Rule]:
    text = TABLE.strip()
    for word, meaning in SHORT.items():
        text = text.replace(word, meaning)
    found = []
    for line in re.sub(r"\n +", " ", text).splitlines():
        pattern, others = line.split(" -> ")
        pattern, _, when = pattern.partition(" [")
        found.append(Rule(parsed(pattern), others.split(" | "), when.rstrip("]")))
    return found


# What the model's expressions are


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name not in KEPT:
            yield node


def is_value(node: Any) -> bool:
    """An expression that may be put into a call."""
    if not isinstance(node, ast.expr) or isinstance(node, (ast.Slice, ast.Starred, ast.Constant)):
        return False
    if isinstance(node, ast.Tuple) and any(isinstance(e, (ast.Slice, ast.Starred)) for e in node.elts):
        return False
    return isinstance(getattr(node, "ctx", ast.Load()), ast.Load)


@cache
def sources() -> dict[str, ast.Module]:
    """The files as trees; every expression in the body of a function has a `number`."""
    trees, number = {}, 0
    for name in FILES:
        tree = ast.parse(Path(importlib.import_module(f"{PACKAGE}.{name}").__file__).read_text())
        for function in functions(tree):
            for node in (n for statement in function.body for n in ast.walk(statement)):
                if is_value(node):
                    node.number = number
                    number += 1
        trees[name] = tree
    return trees


class Noting(ast.NodeTransformer):
    """note(number, expression) in the place of each expression that has a number."""

    def visit(self, node: Any) -> Any:
        node = self.generic_visit(node)
        if not hasattr(node, "number"):
            return node
        note = ast.Call(ast.Name("note", ast.Load()), [ast.Constant(node.number), node], [])
        return ast.copy_location(note, node)


@cache
def facts() -> dict[int, Seen]:
    """What each expression is when the model runs."""
    seen: dict[int, Seen] = {}

    def note(number: int, x: Any) -> Any:
        seen.setdefault(number, Seen()).note(x)
        return x

    model = load("noted", {name: Noting().visit(copy.deepcopy(tree)) for name, tree in sources().items()}, note=note)
    for kind in KINDS:
        for router in ("moe", "hash_moe"):
            run = small(model.DSV4, (kind,), (router,))
            state = run.new_state(2, 32)
            for length in (19, 1):
                run(tokens(run, length), state)
                run(tokens(run, length))
    return seen


def load(name: str, trees: dict[str, ast.Module], **names: Any) -> types.ModuleType:
    """Execute trees as modules beside those of the reference model; returns the last."""
    module = types.ModuleType("")
    for file, tree in trees.items():
        module = types.ModuleType(f"{PACKAGE}.{file}_{name}")
        module.__package__ = PACKAGE
        vars(module).update(names)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in FILES and node.level == 1:
                node.module = f"{node.module}_{name}"
        text = ast.unparse(ast.fix_missing_locations(tree))
        path = f"<{file} {name}>"
        linecache.cache[path] = len(text), None, text.splitlines(keepends=True), path  # so that reports show the line
        sys.modules[module.__name__] = module
        module.__file__ = path
        exec(compile(text, path, "exec"), vars(module))
    return module


# Writing otherwise


class Writer(ast.NodeTransformer):
    """Other words for some of the expressions of one function; keeps what it did."""

    def __init__(self, rng: random.Random, share: float, only: str | None = None, avoid: str = "nothing"):
        self.rng, self.share, self.only, self.avoid, self.done = rng, share, only, avoid, []

    def visit(self, node: Any) -> Any:
        if isinstance(node, ast.FunctionDef) and node.name in KEPT:
            return node
        if not hasattr(node, "number") or does_something(node):
            return self.generic_visit(node)
        number = node.number
        if self.rng.random() < self.share:
            fitting = [(r, found) for r in rules() if (found := r.applies(node, facts())) is not None]
            words = [(o, found) for r, found in fitting for o in r.others if self.only in (None, o)]
            choices = [(o, found) for o, found in words if not re.search(self.avoid, o)]
            if choices:
                return self.put(*self.rng.choice(choices), number)
        node = self.generic_visit(node)
        if self.only is None and self.rng.random() < self.share / 10 and isinstance(node, (ast.Call, ast.BinOp)):
            seen = facts().get(number, Seen())
            if seen.is_tensor:
                noise = [words for words in NOISE if "*" not in words or torch.bool not in seen.dtype]
                return self.put(self.rng.choice(noise), {"A": node}, number, visit=False)
        return node

    def put(self, words: str, found: dict[str, ast.expr], number: int, visit: bool = True) -> ast.expr:
        self.done.append(words)
        parts = {k: self.visit(v) if visit else v for k, v in found.items()}

        class Fill(ast.NodeTransformer):
            def visit_Name(self, node: ast.Name) -> Any:
                return copy.deepcopy(parts.get(node.id, node))

            def visit_Starred(self, node: ast.Starred) -> Any:
                return ast.Starred(self.visit(node.value), ast.Load())

        return Fill().visit(parsed(words))


def shuffled(body: list[ast.stmt], rng: random.Random) -> list[ast.stmt]:
    """Neighbours that do not depend on each other change places."""
    body = list(body)
    for i in range(len(body) - 1):
        a, b = body[i : i + 2]
        if rng.random() < 0.5 and free(a, b) and free(b, a):
            body[i : i + 2] = b, a
    return body


def free(a: ast.stmt, b: ast.stmt) -> bool:
    """Plain assignments, of which the first writes nothing that the second reads or writes; none calls what writes to
    the memory of the model."""
    if not all(isinstance(s, ast.Assign) for s in (a, b)):
        return False
    names = [n for n in ast.walk(b) if isinstance(n, ast.Name)]
    written = {n.id for n in ast.walk(a) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    stores = any(isinstance(t, (ast.Attribute, ast.Subscript)) for s in (a, b) for t in s.targets)
    return not (stores or does_something(a) or written & {n.id for n in names})


def does_something(tree: ast.AST) -> bool:
    """Whether it calls what is in ONCE, or what writes to a tensor, by its name."""
    names = {getattr(n.func, "attr", getattr(n.func, "id", "")) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return any(name in ONCE or (name.endswith("_") and not name.startswith("_")) for name in names)


@dataclass
class Variant:
    """The model's classes, written otherwise."""

    module: types.ModuleType
    done: list[str]

    @property
    def text(self) -> str:
        return "".join(linecache.getlines(self.module.__file__))


def variant(seed: int, share: float = 0.35, only: str | None = None, avoid: str = "nothing") -> Variant:
    """`share`: how many of the expressions that could be written otherwise are. `only`: by these words alone; `avoid`: not
    by words that hold this."""
    rng = random.Random(seed)
    writer = Writer(rng, 1.0 if only else share, only, avoid)
    trees = {}
    for name, tree in sources().items():
        new = trees[name] = writer.visit(copy.deepcopy(tree))
        for function in functions(new):
            if only is None:
                function.body = shuffled(function.body, rng)
    return Variant(load(f"s{seed}", trees), writer.done)


def small(make: Any, kinds: tuple[str, ...], routers: tuple[str, ...], **change: Any) -> Any:
    """tiny with these layers."""
    fields = dict(
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        mlp_layer_types=routers,
        hc_sinkhorn_iters=2,
        num_nextn_predict_layers=0,
    )
    torch.manual_seed(0)
    return make(reference_model.DSV4Config.tiny().replace(**(fields | change))).eval().requires_grad_(False)


def tokens(model: Any, length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
