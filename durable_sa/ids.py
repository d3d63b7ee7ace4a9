"""Ids: UUIDv7, so that tables grow at one end, and derived ids where a repeated call must get the same id.

In a process that uses asyncpg they are instances of its subclass of `uuid.UUID`, which is faster to make, to hash and
to send.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import uuid
from collections.abc import Callable
from typing import Final

import uuid_utils

_FAMILY_BYTES: Final = 4


_make_uuid: Callable[[bytes], uuid.UUID] | None = None


def _uuid(raw: bytes) -> uuid.UUID:
    global _make_uuid  # noqa: PLW0603 - looked up until it is found
    if _make_uuid is None:
        # The class is looked up, because a process without asyncpg is not to import it for this.
        _make_uuid = getattr(sys.modules.get("asyncpg.pgproto.pgproto"), "UUID", None)
    return uuid.UUID(bytes=raw) if _make_uuid is None else _make_uuid(raw)


def new_id() -> uuid.UUID:
    """Return a new UUIDv7."""
    return _uuid(uuid_utils.uuid7().bytes)


def plain(value: uuid.UUID) -> uuid.UUID:
    """Return an id for the application as a plain `uuid.UUID`, because orjson and others refuse a subclass."""
    return value if type(value) is uuid.UUID else uuid.UUID(int=value.int)


def step_key(
    kind: str, name: str, arguments: str, path: tuple[int | str, ...], occurrence: int, *, part: bool = False
) -> uuid.UUID:
    """Return the key of a checkpoint, which identifies a call of a task in every run of the same code.

    The last bit of the key is set if the call is `part` of a step; once the step is recorded, no replay asks for it.
    Calls with arguments (steps and transactions) of the same kind, name and branch have the first four bytes in common.
    """
    identity = repr((kind, name, arguments, path, occurrence)).encode("utf-8", "surrogatepass")
    raw = hashlib.blake2b(identity, digest_size=16).digest()
    if kind in ("step", "transaction"):
        raw = _family(kind, name, path) + raw[_FAMILY_BYTES:]
    return _uuid(raw if raw[15] & 1 == part else raw[:15] + bytes((raw[15] ^ 1,)))


@functools.lru_cache(maxsize=4096)
def _family(kind: str, name: str, path: tuple[int | str, ...]) -> bytes:
    identity = repr((kind, name, path)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(identity, digest_size=_FAMILY_BYTES).digest()


def family(key: uuid.UUID) -> bytes:
    """Return what the keys of steps with one name in one branch have in common."""
    return key.bytes[:_FAMILY_BYTES]


def without_family(key: uuid.UUID) -> bytes:
    """Return the part of a key that identifies the call: all that keys had in common with today's at first."""
    return key.bytes[_FAMILY_BYTES:]


def is_part(key: uuid.UUID) -> bool:
    """Return whether a checkpoint belongs to a part of a step."""
    return bool(key.bytes[15] & 1)


def child_id(parent: uuid.UUID, key: uuid.UUID) -> uuid.UUID:
    """Return the id of the child that a call of a task spawns: a UUIDv7 of the parent's time and the call's hash."""
    digest = hashlib.blake2b(parent.bytes + key.bytes, digest_size=10).digest()
    raw = bytearray(parent.bytes[:6] + digest)
    raw[6] = 0x70 | (raw[6] & 0x0F)
    raw[8] = 0x80 | (raw[8] & 0x3F)
    return _uuid(bytes(raw))


def keyed_id(key: str) -> uuid.UUID:
    """Return the id of a message with an idempotency key, which is unique among those of one task."""
    return _uuid(hashlib.blake2b(key.encode(), digest_size=16).digest())


def digest(text: str | None) -> str:
    """Return a short fingerprint of encoded params."""
    return hashlib.blake2b((text or "").encode(), digest_size=12).hexdigest()
