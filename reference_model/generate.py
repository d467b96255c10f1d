"""Generation: `generate`, a plain loop of prefill and one token a step; `decode_step`, a step that stays on the device.

On a GPU a compiled step is one CUDA graph, with nothing to copy in or out and nothing to wait for:

    step = torch.compile(decode_step, backend="dsv4", mode="decode")
    loop = Loop.start(model.new_state(1, 2048), token, temperature=0.8)
    for _ in range(100):
        token = step(model, loop)  # [B, 1], overwritten by the next step
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import DSV4
from .sample import draw, sample
from .state import Dtype, State, still


@torch.no_grad()
def generate(
    model: DSV4,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    forward: Callable[..., Tensor] | None = None,
    stop: int | None = None,
    seed: int = 0,
    index_dtype: Dtype = None,
    kv_dtype: Dtype = None,
    **sampling: float,
) -> Iterator[Tensor]:
    """Yield the next tokens [B] int64, one step at a time, after `prompt` [B, T] int64.

    lengths [B]: real tokens in each row of a right-padded prompt. forward: what to call instead of `model`, such as its
    compiled form. stop: end once every row has given this token. index_dtype, kv_dtype: see `new_state`. sampling: see
    `sample`.
    Raises ValueError if prompt and new tokens do not fit the model's context.
    """
    B, T = prompt.shape
    need, context = T + max_new_tokens, model.config.max_position_embeddings
    if need > context:
        raise ValueError(
            f"prompt of {T} tokens and {max_new_tokens} new ones need {need} positions, the model has {context}: "
            "shorten the prompt or ask for fewer tokens"
        )
    forward = model if forward is None else forward
    state = model.new_state(B, need, index_dtype=index_dtype, kv_dtype=kv_dtype)
    generator = torch.Generator(prompt.device).manual_seed(seed)
    done = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    logits = forward(prompt, state, last=1, lengths=lengths)
    for step in range(max_new_tokens):
        token = sample(logits[:, -1], generator=generator, **sampling)
        yield token
        done |= token == (-1 if stop is None else stop)
        if step + 1 == max_new_tokens or (stop is not None and bool(done.all())):
            return
        logits = forward(token.unsqueeze(1), state)


@dataclass
class Loop:
    """What a decode loop keeps on the device: state; token [B, 1] int64, the latest and not yet in the state; temperature
    [1] fp32, 0 being greedy; seed [1] int64. All may be written between steps."""

    state: State
    token: Tensor
    temperature: Tensor
    seed: Tensor

    @staticmethod
    def start(state: State, token: Tensor | int, temperature: float = 0.0, seed: int = 0) -> "Loop":
        """A loop on from this state, whose next token is `token`: [B] int64, or one for all rows."""
        B, device = len(state.position), state.position.device
        first = torch.empty(B, 1, dtype=torch.int64, device=device)
        first[:, 0] = token
        heat = torch.full((1,), temperature, dtype=torch.float32, device=device)
        return Loop(state, still(first), still(heat), still(torch.full((1,), seed, dtype=torch.int64, device=device)))


@torch.no_grad()
def decode_step(model: DSV4, loop: Loop) -> Tensor:
    """Read the loop's token, choose the next one and write it in its place -> that token [B, 1]."""
    logits = model(loop.token, loop.state)[:, -1]
    loop.token.copy_(draw(logits, loop.temperature, loop.seed, loop.state.position).unsqueeze(1))
    return loop.token
