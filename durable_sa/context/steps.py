"""Steps: code that runs once, and whose result is recorded."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeAlias, TypeVar, overload

from ..errors import TaskTimeout
from ..execution.calls import Call
from ..ids import is_part, step_key
from ..policies import RetryStrategy
from ..serialization.annotations import is_coroutine_function
from ..serialization.canonical import encode_arguments
from ..serialization.failures import encode_try, is_retryable, mark_step, put_off, retry_delay
from ..steps import StepOptions, plain_step, result_codec
from .base import NULL, check_function
from .sleeps import Sleeps

P = ParamSpec("P")
T = TypeVar("T")


Body: TypeAlias = functools.partial[Any]
"""The function of a step with its arguments."""
Attempt: TypeAlias = Callable[[str, Body, float | None, AbstractContextManager[object]], Awaitable[Any]]
"""A function that executes one try of a step, by its name, body and timeout, within its span and the hooks."""


class Steps(Sleeps):
    """The part of a context that executes steps."""

    __slots__ = ()

    @overload
    async def step(
        self, name: str, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    def step(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn(*args, **kwargs)` once; in replays, return its stored result instead.

        A step whose result is stored never runs again. A step that a crash interrupts before that does run again, so
        its effects happen at least once. The result is stored by `fn`'s return annotation, and the stored value is
        returned, in the first run too. A coroutine function is awaited, another function runs in a thread.

        The same name with the same arguments, called again, is the next occurrence, counted for each branch.

        Raises:
            InvalidName: the name is empty, longer than 200 bytes, starts with `$` or holds control characters.
            SerializationError: an argument or the result has no faithful JSON form.
            PayloadTooLarge: the result is larger than the client's `max_payload_bytes`.
            TaskTimeout: the step ran longer than its `timeout`.
        """
        return self.step_by(self._attempt, name, fn, args, kwargs)

    def step_by(
        self, attempt: Attempt, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Run a step as :meth:`step` does, but execute its tries by `attempt`."""
        function, options = plain_step(fn)
        call = self._call("step", name, encode_arguments(args, kwargs, f"step {name!r}"))
        check_function(function, "step", name)
        return self._begun(call, self._step(attempt, call, functools.partial(function, *args, **kwargs), options))

    async def _step(self, attempt: Attempt, call: Call, body: Body, options: StepOptions) -> Any:
        run = self._run
        try:
            codec = result_codec(body.func)
            if (entry := await self._recall(call)) is not None:
                return codec.decode(entry.value or NULL, f"the result of step {call.name!r}")
            tries = self._failed_tries(call) if options.max_attempts > 1 else 0
            warned = not tries and self._check_replay(call)
            if failures := tries % options.max_attempts:
                # The run may have been woken before the pause between the tries was over.
                await run.enter()
                await self._pause(call, tries, self._strategy(options).delay(failures))
            while True:
                await run.enter()
                began = time.monotonic()
                run.steps[call.key] = call, began
                try:
                    try:
                        with run.branches.busy(), run.branches.scope(str(call.key)):
                            result = await attempt(call.name, body, options.timeout, self._around(call))
                    finally:
                        run.steps.pop(call.key, None)
                except Exception as error:
                    if issubclass(type(error), asyncio.CancelledError):
                        raise  # the timeout of the attempt, which is an error as well
                    tries += 1
                    if not await self._retry(call, tries, options, error, time.monotonic() - began):
                        raise
                else:
                    value = await self._end_step(call, codec, result, time.monotonic() - began)
                    if not warned:
                        self._check_moved(call)
                    return value
        except asyncio.CancelledError as error:
            await self._note_failure(call)
            await self._note_streams(call.key, error)
            mark_step(error, run.claimed.run_id, call.name, call.summary, inner=is_part(call.key))
            raise
        except BaseException as error:
            await self._note_streams(call.key, error)
            mark_step(error, run.claimed.run_id, call.name, call.summary, inner=is_part(call.key))
            raise

    async def _attempt(
        self, name: str, body: Body, timeout: float | None, around: AbstractContextManager[object]
    ) -> Any:
        with around:
            if timeout is None:
                return await invoke(self._run.host.threads, body)
            deadline = asyncio.timeout(timeout)
            try:
                async with deadline:
                    return await invoke(self._run.host.threads, body)
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise TaskTimeout(f"step {name!r}", timeout) from None

    def _failed_tries(self, call: Call) -> int:
        """Return how often the step has failed in earlier runs."""
        tries = 0
        while self._run.journal.take(self._try(call, tries).key) is not None:
            tries += 1
        return tries

    async def _retry(self, call: Call, tries: int, options: StepOptions, error: Exception, duration: float) -> bool:
        """Record the failure of a try, and wait if another follows; a long wait suspends the run.

        The failure of the last try is recorded too: the next attempt of the task then begins with the full number of
        tries, whereas after a crash the step continues counting.

        Returns:
            True if the step is to be tried once more.
        """
        strategy = self._strategy(options)
        # Such an error asks for a retry of the task, not of the step.
        asks = retry_delay(error) is not None or put_off(error) is not None
        if options.max_attempts == 1 or strategy.kind == "none" or asks or not is_retryable(error):
            await self._note_failure(call)
            return False
        await self._record_try(self._try(call, tries - 1), encode_try(call.name, call.summary, error), duration)
        failures = tries % options.max_attempts
        if failures == 0:
            return False
        await self._pause(call, tries, strategy.delay(failures))
        return True

    def _strategy(self, options: StepOptions) -> RetryStrategy:
        return options.retry_strategy or self._app.default_retry_strategy

    async def _pause(self, call: Call, tries: int, delay: float) -> None:
        """Wait `delay` seconds between two tries of a step."""
        if delay < 1.0 or is_part(call.key):
            with self._run.branches.busy():
                await self._run.pause(delay)
        else:
            key = step_key("pause", str(call.key), "", (), tries, part=True)
            await self._sleep(Call("sleep", "$retry", key), delay=delay, due_at=None)


async def invoke(executor: Executor, body: Callable[[], Any]) -> Any:
    """Await a coroutine function; run any other in a thread, with the caller's context variables."""
    function: Callable[..., Any] = getattr(body, "func", body)
    if is_coroutine_function(function):
        return await body()
    context = contextvars.copy_context()

    def call() -> Any:
        try:
            return context.run(body)
        except StopIteration as error:
            # A future cannot hold a StopIteration. Python replaces it in the same way if a coroutine raises it.
            raise RuntimeError("the step raised StopIteration") from error

    result = await asyncio.get_running_loop().run_in_executor(executor, call)
    return await result if inspect.isawaitable(result) else result
