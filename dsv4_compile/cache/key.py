"""What an entry of the cache is for, in clear."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Plain = str | int | bool | None | list | dict


@dataclass(frozen=True)
class Key:
    """kind: "object" (a compiled kernel) or "tuning" (measured times). fields: everything that the entry depends on.

    Two keys are equal when their canonical JSON is, on every machine. Fields are strings, integers, booleans, None, lists
    and dicts with string keys: never a float (its text may differ), a path, a device index, a time or a `repr`. Raises
    TypeError for anything else, naming the field.
    """

    kind: str
    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.kind.isidentifier():
            raise ValueError(f"kind {self.kind!r}: expected a plain name, such as 'object'")
        object.__setattr__(self, "fields", _plain("fields", dict(self.fields)))

    @cached_property
    def text(self) -> str:
        """Canonical JSON."""
        about = {"kind": self.kind, "fields": self.fields}
        return json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.text == other.text

    def differences(self, other: "Key") -> dict[str, tuple[Any, Any]]:
        """Fields (dotted within dicts) in which the two differ: ours and theirs; None where one has no such field."""
        ours, theirs = flat(self.fields), flat(other.fields)
        names = sorted(ours.keys() | theirs.keys())
        return {n: (ours.get(n), theirs.get(n)) for n in names if ours.get(n) != theirs.get(n)}


def nearest(key: Key, others: "list[Key]") -> Key | None:
    """The key of the same kind that differs in the fewest fields; None if there is no other."""
    same = [k for k in others if k.kind == key.kind and k != key]
    return min(same, key=lambda k: (len(key.differences(k)), k.text), default=None)


def flat(fields: Mapping[str, Any], stem: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        out |= flat(value, f"{stem}{name}.") if isinstance(value, dict) else {f"{stem}{name}": value}
    return out


def _plain(name: str, value: Any) -> Any:
    """The value with tuples as lists; what JSON would not give back as it was is refused."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{i}]", v) for i, v in enumerate(value)]
    if isinstance(value, dict):
        wrong = [k for k in value if type(k) is not str]
        if wrong:
            raise TypeError(f"cache key: {name} has the key {wrong[0]!r}; expected strings")
        return {k: _plain(f"{name}.{k}", v) for k, v in value.items()}
    raise TypeError(
        f"cache key: {name} is {value!r} ({type(value).__name__}); expected a string, an integer, a boolean, None, or lists "
        "and dicts of them"
    )
