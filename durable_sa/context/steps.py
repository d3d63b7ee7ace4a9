"""Steps: code that runs once, whose result is remembered."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

from ..errors import TaskTimeout
from ..execution.writes import Kind
from ..ids import is_part, step_key
from ..policies import RetryStrategy
from ..serialization.annotations import is_coroutine_function
from ..serialization.canonical import encode_arguments
from ..serialization.codec import Codec
from ..serialization.failures import is_retryable
from ..steps import PLAIN, Step, StepOptions, result_codec
from .base import NULL, Call, check_function
from .sleeps import Sleeps

P = ParamSpec("P")
T = TypeVar("T")


class Begun(NamedTuple):
    """A step before it is executed: what is recorded of it, or how often it was tried in vain."""

    call: Call
    codec: Codec[Any]
    recorded: bool
    value: Any
    tries: int


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
        """Run `fn(*args, **kwargs)` once; in replays, its stored result is given back instead.

        A step whose result is stored never runs again. One that was cut off by a crash before that does, so its effects
        happen at least once. The result is stored by `fn`'s return annotation, and what comes back is what was stored,
        the first time too. A coroutine function is awaited, another function runs in a thread.

        The same name with the same arguments, called again, is the next occurrence, counted for each branch.

        Raises:
            InvalidName: the name is empty, longer than 200 bytes, starts with `$` or holds control characters.
            SerializationError: an argument or the result has no faithful JSON form.
            PayloadTooLarge: the result is larger than the client's `max_payload_bytes`.
            TaskTimeout: the step ran longer than its `timeout`.
        """
        function, options = (fn.function, fn.options) if isinstance(fn, Step) else (fn, PLAIN)
        call = self._call("step", name, encode_arguments(args, kwargs, f"step {name!r}"))
        check_function(function, call)
        return self._step(call, function, options, args, kwargs)

    async def _step(
        self,
        call: Call,
        function: Callable[..., Any],
        options: StepOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        run = self._run
        begun = await self._begin(call, function, options)
        if begun.recorded:
            return begun.value
        tries = begun.tries
        while True:
            await run.enter()
            try:
                with (
                    run.branches.busy(),
                    run.branches.scope(str(call.key)),
                    self._within_hooks(call),
                ):
                    result = await self._execute(call, function, options, args, kwargs)
            except Exception as error:
                tries += 1
                if not await self.try_again(call, tries, options, error):
                    raise
            else:
                return await self.end_step(call, begun.codec, result)

    def begin_step(
        self,
        name: str,
        function: Callable[..., Any],
        options: StepOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Coroutine[Any, Any, Begun]:
        """The first part of a step that another thread executes."""
        call = self._call("step", name, encode_arguments(args, kwargs, f"step {name!r}"))
        check_function(function, call)
        return self._begin(call, function, options)

    async def _begin(self, call: Call, function: Callable[..., Any], options: StepOptions) -> Begun:
        run = self._run
        codec = result_codec(function)
        if (entry := await self._recall(call)) is not None:
            value = codec.decode(entry.value or NULL, f"the result of step {call.name!r}")
            return Begun(call, codec, True, value, 0)
        tries = self._failed_tries(call) if options.max_attempts > 1 else 0
        await run.enter()
        if failures := tries % options.max_attempts:
            # What has woken the run may have been something else.
            await self._pause(call, tries, self._strategy(options).delay(failures))
        return Begun(call, codec, False, None, tries)

    async def _execute(
        self,
        call: Call,
        function: Callable[..., Any],
        options: StepOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if options.timeout is None:
            return await _invoke(self._run.host.threads, function, args, kwargs)
        deadline = asyncio.timeout(options.timeout)
        try:
            async with deadline:
                return await _invoke(self._run.host.threads, function, args, kwargs)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise TaskTimeout(f"step {call.name!r}", options.timeout) from None

    def _failed_tries(self, call: Call) -> int:
        """How often the step has failed before, in earlier runs."""
        tries = 0
        while self._run.journal.take(self._try(call, tries).key) is not None:
            tries += 1
        return tries

    def _try(self, call: Call, number: int) -> Call:
        return Call("value", "$try", step_key("try", str(call.key), "", (), number, part=True))

    async def try_again(self, call: Call, tries: int, options: StepOptions, error: Exception) -> bool:
        """Whether a step is to be tried again: remembers that it failed and waits; a long wait suspends the run.

        The last try that it has is remembered, too: the next attempt of the task then begins with a full number of
        them, whereas after a crash it goes on counting.
        """
        strategy = self._strategy(options)
        if options.max_attempts == 1 or strategy.kind == "none" or not is_retryable(error):
            return False
        tried = self._try(call, tries - 1)
        with self._run.branches.busy():
            await self._run.write(Kind.CHECKPOINT, tried.key, (tried.kind, tried.name, "completed", NULL, None))
        failures = tries % options.max_attempts
        if failures == 0:
            return False
        await self._pause(call, tries, strategy.delay(failures))
        return True

    def _strategy(self, options: StepOptions) -> RetryStrategy:
        return options.retry_strategy or self._durable.default_retry_strategy

    async def _pause(self, call: Call, tries: int, delay: float) -> None:
        """Between two tries of a step."""
        if delay < 1.0 or is_part(call.key):
            with self._run.branches.busy():
                await asyncio.sleep(delay)
        else:
            key = step_key("pause", str(call.key), "", (), tries, part=True)
            await self._sleep(Call("sleep", "$retry", key), delay=delay, due_at=None)


async def _invoke(
    executor: Executor, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Await a coroutine function; run any other in a thread, with the caller's context variables."""
    if is_coroutine_function(function):
        return await function(*args, **kwargs)
    context = contextvars.copy_context()

    def call() -> Any:
        try:
            return context.run(function, *args, **kwargs)
        except StopIteration as error:
            # No future can hold one. Where a coroutine raises it, Python does the same.
            raise RuntimeError("the step raised StopIteration") from error

    result = await asyncio.get_running_loop().run_in_executor(executor, call)
    return await result if inspect.isawaitable(result) else result
