"""Transactions: writes of the application that commit together with their checkpoint."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ..database.failover import timeline_of
from ..errors import ReplayMismatch
from ..execution.calls import Call
from ..ids import is_part
from ..serialization.annotations import is_coroutine_function
from ..serialization.canonical import encode_arguments
from ..serialization.codec import Codec
from ..serialization.failures import mark_step
from ..signals import ControlFlow
from ..steps import result_codec
from .base import NULL, ContextBase, check_function
from .steps import invoke

if TYPE_CHECKING:
    from ..execution.session_transactions import InThread

P = ParamSpec("P")
T = TypeVar("T")
AsyncSessionT = TypeVar("AsyncSessionT", bound=AsyncSession)
SessionT = TypeVar("SessionT", bound=Session)


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
    @overload
    async def transaction(
        self,
        name: str,
        fn: Callable[Concatenate[AsyncSessionT, P], Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    async def transaction(
        self, name: str, fn: Callable[Concatenate[SessionT, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...

    def transaction(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn(session, *args, **kwargs)` in one database transaction with its checkpoint.

        Its writes are committed exactly once, or not at all. The session comes from the client's sessionmaker or
        engine; `spawn_with` and `emit_event_with` on it commit with it. A coroutine function is awaited with an
        `AsyncSession`. A plain one is called in a thread, with a `Session` of the client's `sync_bind`; if the client
        has only asyncpg, on the event loop, where it should do nothing slow besides its statements. It is retried
        from the beginning: up to 5 times after serialization failures and deadlocks, up to 20 times after lost
        connections. It may use savepoints.

        Raises:
            InvalidState: `fn` commits or rolls back the whole transaction itself, or closes the session.
            SerializationError, PayloadTooLarge: the result cannot be stored; nothing is committed then.
        """
        call = self._transaction_call(name, fn, args, kwargs)
        return self._begun(call, self._transaction(call, fn, args, kwargs))

    def transaction_by(
        self, in_thread: InThread, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Run a transaction as :meth:`transaction` does, but call a plain function by `in_thread`."""
        call = self._transaction_call(name, fn, args, kwargs)
        return self._begun(call, self._transaction(call, fn, args, kwargs, in_thread))

    def _transaction_call(self, name: str, fn: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = self._call("transaction", name, encode_arguments(args, kwargs, f"transaction {name!r}"))
        check_function(fn, "transaction", name)
        return call

    async def _transaction(
        self,
        call: Call,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_thread: InThread | None = None,
    ) -> Any:
        run = self._run
        try:
            codec = result_codec(fn)
            if (entry := await self._recall(call)) is not None:
                return codec.decode(entry.value or NULL, f"the result of transaction {call.name!r}")
            warned = self._check_replay(call)
            run.steps[call.key] = call, time.monotonic()
            try:
                with run.branches.busy(), run.branches.scope(str(call.key)):
                    value = await self._execute_transaction(call, codec, fn, args, kwargs, in_thread)
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
                await self._note_streams(call.key, error)
            mark_step(error, run.claimed.run_id, call.name, call.summary, inner=is_part(call.key))
            raise

    async def _execute_transaction(
        self,
        call: Call,
        codec: Codec[Any],
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_thread: InThread | None,
    ) -> Any:
        # Imported late, because only workers execute transactions.
        from ..execution.session_transactions import run_session_transaction
        from ..execution.transactions import run_transaction

        run, database = self._run, self._app.database
        sessions = None if is_coroutine_function(fn) else self._app.sync_database
        if sessions is None:
            with self._around(call):
                return await run_transaction(run, database, call.key, call.name, codec, fn, args, kwargs)
        timeline = timeline_of(database.engine.dialect)

        def body(session: Session) -> Any:
            return fn(session, *args, **kwargs)

        if in_thread is None:
            threads = functools.partial(invoke, run.host.threads)
            with self._around(call):
                return await run_session_transaction(run, sessions, timeline, threads, call.key, call.name, codec, body)

        def around(execute: Callable[[], Any]) -> Any:
            with self._around(call):
                return execute()

        # The hooks are entered in the thread of the task, for each attempt, to set its context variables.
        own_thread = in_thread
        return await run_session_transaction(
            run,
            sessions,
            timeline,
            lambda execute: own_thread(functools.partial(around, execute)),
            call.key,
            call.name,
            codec,
            body,
        )
