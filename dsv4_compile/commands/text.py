"""Text to token ids and back: a folder's `tokenizer.json`, or bytes."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .inputs import InputError

if TYPE_CHECKING:
    from ..reference_model import DSV4Config


class Text(Protocol):
    """encode: text -> ids, without bos. stream: a function from the next id to the text that it completes."""

    def encode(self, text: str) -> list[int]: ...

    def stream(self) -> Stream: ...


class Stream(Protocol):
    def __call__(self, token: int) -> str: ...


class Bytes:
    """Ids 0 to 255 are the bytes of UTF-8; ids above them (bos, eos, padding) have no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def stream(self) -> Stream:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([token])) if token < 256 else ""


class Pieces:
    """The tokenizer that came with a checkpoint."""

    def __init__(self, file: Path):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"cannot read {file} ({error}): fetch the file again") from error

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def stream(self) -> Stream:
        seen: list[int] = []
        shown = ""

        def feed(token: int) -> str:
            nonlocal shown
            seen.append(token)
            text = self.tokenizer.decode(seen)
            if text.endswith("\ufffd"):  # the rest of this character is in a token to come
                return ""
            new, shown = text[len(shown) :], text
            return new

        return feed


def text_of(folder: Path, config: DSV4Config) -> Text:
    """The tokenizer of a checkpoint folder, else bytes. Raises InputError if the vocabulary does not fit."""
    file = folder / "tokenizer.json"
    if file.is_file():
        pieces = Pieces(file)
        size = pieces.tokenizer.get_vocab_size()
        if size > config.vocab_size:
            raise InputError(
                f"{file} has {size} tokens, the model's vocab_size is {config.vocab_size}: take both from one place"
            )
        return pieces
    if config.vocab_size < 256:
        raise InputError(
            f"{folder} has no tokenizer.json, and a vocabulary of {config.vocab_size} is too small to read bytes: "
            "copy the checkpoint's tokenizer.json into it"
        )
    return Bytes()


def special(token: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Token ids of a config field that may hold none, one or several."""
    return () if token is None else token if isinstance(token, tuple) else (token,)
