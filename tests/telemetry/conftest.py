"""A client whose spans and metrics stay in memory."""

from collections.abc import AsyncGenerator

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, RetryStrategy
from durable_sa.telemetry import Telemetry
from tests.telemetry.support import Spans, Values


@pytest.fixture
def tracer_provider() -> TracerProvider:
    return TracerProvider(shutdown_on_exit=False)


@pytest.fixture
def spans(tracer_provider: TracerProvider) -> Spans:
    exporter = InMemorySpanExporter()
    tracer_provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(exporter)


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def metrics(reader: InMemoryMetricReader) -> Values:
    return Values(reader)


@pytest.fixture
def telemetry(tracer_provider: TracerProvider, reader: InMemoryMetricReader) -> Telemetry:
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    return Telemetry(tracer_provider=tracer_provider, meter_provider=meter_provider)


@pytest.fixture
async def durable(engine: AsyncEngine, telemetry: Telemetry) -> AsyncGenerator[Durable]:
    async with Durable(engine, telemetry=telemetry, default_retry_strategy=RetryStrategy.fixed(0)) as durable:
        yield durable
