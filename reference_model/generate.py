"""A plain generation loop: prefill, then one token a step."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .model import DSV4
from .sample import sample


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
    **sampling: float,
) -> Iterator[Tensor]:
    """Yield the next tokens [B] int64, one step at a time, after `prompt` [B, T] int64.

    lengths [B]: real tokens in each row of a right-padded prompt. forward: what to call instead of `model`, such as its
    compiled form. stop: end once every row has given this token. sampling: see `sample`.
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
    state = model.new_state(B, need)
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
