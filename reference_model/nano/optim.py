"""Muon for the matrices, AdamW for the rest, on fp32 masters of a model that computes in bf16.

The model's own parameters are working copies: a step reads their gradients, moves the masters, and writes the copies
anew, rounded to bf16 or, in the last part of training, through the weight format that the checkpoint will have. The
gradient at the rounded weight is applied to the master: a straight-through estimator without any autograd of its own.
"""

import torch
from torch import Tensor

from ..model import DSV4
from ..quant import dequantize, quantize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic that drives singular values towards 1 (K. Jordan, Muon)


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each m = U S V^T: m [G, r, c] with r <= c, by Newton-Schulz iterations, on a GPU in bf16."""
    a, b, c = COEFFICIENTS
    x = m / (m.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + torch.baddbmm(s, s, s, beta=b, alpha=c) @ x
    return x


class Stack:
    """All matrices of one shape and format as one tensor `master` [G, N, K]; a stack of experts counts as many."""

    def __init__(self, params: list[Tensor], format: str):
        self.params, self.format = params, format
        self.master = self.join([p.detach().float() for p in params])
        self.momentum = torch.zeros_like(self.master)

    def join(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1, *t.shape[-2:]) for t in tensors])

    def step(self, lr: float, decay: float, momentum: float = 0.95) -> None:
        """Muon with the update scaled to the size that AdamW's has: rms 0.2 lr."""
        g = self.join([p.grad.float() for p in self.params])
        self.momentum.lerp_(g, 1 - momentum)
        update = g.lerp(self.momentum, momentum)
        rows, columns = g.shape[-2:]
        update = orthogonalise(update.mT).mT if rows > columns else orthogonalise(update)
        self.master.mul_(1 - lr * decay).add_(update, alpha=-0.2 * lr * max(rows, columns) ** 0.5)

    def publish(self, quantised: bool) -> None:
        """Write the working copies, through the stored format if `quantised`."""
        w = self.master
        if quantised and self.format != "none":
            w = dequantize(*quantize(w, self.format), self.format)
        parts = w.split([p.numel() // (w.shape[-2] * w.shape[-1]) for p in self.params])
        torch._foreach_copy_(self.params, [part.view_as(p) for part, p in zip(parts, self.params, strict=True)])


class Optimizer:
    """Moves all parameters of `model`, which must still be fp32; `formats`: how those named will be stored."""

    def __init__(self, model: DSV4, formats: dict[str, str], muon_lr: float, adam_lr: float, decay: float):
        self.muon_lr, self.adam_lr, self.decay = muon_lr, adam_lr, decay
        stacks: dict[tuple, list[Tensor]] = {}
        self.others: list[Tensor] = []
        for name, p in model.named_parameters():
            if name.endswith("gate.bias"):  # moved by `balance`, never by a gradient
                p.requires_grad_(False)
            elif name in formats or name.endswith(("compressor.wkv.weight", "compressor.wgate.weight")):
                stacks.setdefault((*p.shape[-2:], formats.get(name, "none")), []).append(p)
            else:
                self.others.append(p)
        self.stacks = [Stack(params, format) for (_, _, format), params in stacks.items()]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.others]
        fused = self.masters[0].is_cuda
        self.adam = torch.optim.AdamW(
            self.masters, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=fused
        )

    @torch.no_grad()
    def step(self, factor: float) -> Tensor:
        """One step at `factor` times the peak rates; returns the norm of AdamW's gradients, which are clipped to 1."""
        for master, p in zip(self.masters, self.others, strict=True):
            master.grad = p.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.param_groups[0]["lr"] = self.adam_lr * factor
        self.adam.step()
        for stack in self.stacks:
            stack.step(self.muon_lr * factor, self.decay)
        return norm

    @torch.no_grad()
    def publish(self, quantised: bool) -> None:
        """Refresh every working copy from its master."""
        torch._foreach_copy_(self.others, [m.detach() for m in self.masters])
        for stack in self.stacks:
            stack.publish(quantised)


def formats(stored: DSV4) -> dict[str, str]:
    """Weight format of every quantised matrix of a model, by parameter name."""
    modules = ((name, getattr(module, "format", "none")) for name, module in stored.named_modules())
    return {f"{name}.weight": format for name, format in modules if format != "none"}


@torch.no_grad()
def balance(model: DSV4, loads: list[Tensor], rate: float) -> None:
    """Raise the selection bias of experts that got fewer tokens than the mean, lower that of the others (noaux_tc)."""
    for block, load in zip([*model.layers, *model.mtp], loads, strict=True):
        bias, load = block.ffn.gate.bias, load.float()
        if bias is not None:
            bias.add_(torch.sign(load.mean() - load), alpha=rate)
