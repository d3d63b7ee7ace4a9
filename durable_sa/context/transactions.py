"""Transactions: writes of the application that commit together with their checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ..errors import ReplayMismatch
from ..execution.transactions import run_transaction
from ..ids import is_part
from ..serialization.canonical import encode_arguments
from ..serialization.failures import mark_step
from ..signals import ControlFlow
from ..steps import result_codec
from .base import NULL, Call, ContextBase, check_function

P = ParamSpec("P")
T = TypeVar("T")


class Transactions(ContextBase):
    """The part of a context that executes transactions."""

    __slots__ = ()

    @overload
    async def transaction(
        self,
        name: str,
        fn: Callable[Concatenate[AsyncSession, P], Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    async def transaction(
        self, name: str, fn: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...

    def transaction(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn(session, *args, **kwargs)` in one database transaction with its checkpoint.

        Its writes are committed exactly once, or not at all. The session comes from the client's sessionmaker or
        engine; `spawn_with` and `emit_event_with` on it commit with it. `fn` is awaited with an `AsyncSession`, or, if
        it is a plain function, called with a `Session` on the event loop, so it should do nothing slow besides its
        statements. It is retried from the beginning: up to 5 times after serialization failures and deadlocks, up to 20
        times after lost connections. It may use savepoints.

        Raises:
            InvalidState: `fn` commits or rolls back the whole transaction itself, or closes the session.
            SerializationError, PayloadTooLarge: the result cannot be stored; nothing is committed then.
        """
        arguments = encode_arguments(args, kwargs, f"transaction {name!r}")
        call = self._call("transaction", name, arguments)
        check_function(fn, "transaction", name)
        return self._begun(call, self._transaction(call, fn, args, kwargs))

    async def _transaction(
        self, call: Call, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        run = self._run
        try:
            codec = result_codec(fn)
            if (entry := await self._recall(call)) is not None:
                return codec.decode(entry.value or NULL, f"the result of transaction {call.name!r}")
            warned = self._check_replay(call)
            run.steps[call.key] = call.name, time.monotonic()
            try:
                with run.branches.busy(), run.branches.scope(str(call.key)), self._around(call):
                    value = await run_transaction(run, self._app.database, call.key, call.name, codec, fn, args, kwargs)
            finally:
                run.steps.pop(call.key, None)
            if is_part(call.key):
                self._keep_part(call, codec.encode(value, f"the result of transaction {call.name!r}"))
            if not warned:
                self._check_moved(call)
            return value
        except BaseException as error:
            if not issubclass(type(error), ReplayMismatch | ControlFlow):
                await self._note_failure(call)
            mark_step(error, run.claimed.run_id, call.name, inner=is_part(call.key))
            raise
