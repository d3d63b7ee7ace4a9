"""Ids: UUIDv7, so that tables grow at one end, and derived where a repetition has to collide with the first time.

They are made as asyncpg's kind of `uuid.UUID`, which it also reads from the database: made, hashed and sent faster.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable

import uuid_utils
from asyncpg.pgproto import pgproto  # pyright: ignore[reportMissingTypeStubs] - it has no types

_uuid: Callable[[bytes], uuid.UUID] = pgproto.UUID


def new_id() -> uuid.UUID:
    """A new UUIDv7."""
    return _uuid(uuid_utils.uuid7().bytes)


def plain(value: uuid.UUID) -> uuid.UUID:
    """An id for the application: some encoders of JSON, orjson among them, take no subclass."""
    return value if type(value) is uuid.UUID else uuid.UUID(int=value.int)


def step_key(
    kind: str, name: str, arguments: str, path: tuple[int | str, ...], occurrence: int, *, part: bool = False
) -> uuid.UUID:
    """The key of a checkpoint: which call of a task it belongs to, the same in every run of the same code.

    What is a `part` of a step is not asked for any more once that step is recorded; its last bit says so.
    """
    identity = repr((kind, name, arguments, path, occurrence)).encode("utf-8", "surrogatepass")
    raw = hashlib.blake2b(identity, digest_size=16).digest()
    return _uuid(raw if raw[15] & 1 == part else raw[:15] + bytes((raw[15] ^ 1,)))


def is_part(key: uuid.UUID) -> bool:
    """Whether a checkpoint belongs to a part of a step."""
    return bool(key.bytes[15] & 1)


def child_id(parent: uuid.UUID, key: uuid.UUID) -> uuid.UUID:
    """The id of the child that a call of a task spawns: a UUIDv7 with the parent's time and the call's hash."""
    digest = hashlib.blake2b(parent.bytes + key.bytes, digest_size=10).digest()
    raw = bytearray(parent.bytes[:6] + digest)
    raw[6] = 0x70 | (raw[6] & 0x0F)
    raw[8] = 0x80 | (raw[8] & 0x3F)
    return _uuid(bytes(raw))


def digest(text: str | None) -> str:
    """A short fingerprint of encoded params."""
    return hashlib.blake2b((text or "").encode(), digest_size=12).hexdigest()
