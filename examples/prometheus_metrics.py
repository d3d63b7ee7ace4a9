"""The metrics of a worker, as Prometheus scrapes them.

Needs the `telemetry` extra, opentelemetry-sdk and opentelemetry-exporter-prometheus. It uses the database of
DURABLE_DATABASE_URL, else the embedded one: python examples/prometheus_metrics.py
"""

import asyncio
import re
import urllib.request

from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from prometheus_client import start_http_server

from durable_sa import Durable, TaskContext, UserError, task


@task
async def resize(ctx: TaskContext, picture: str) -> str:
    return await ctx.step("resize", lambda: f"{picture} (small)")


@task
async def publish(ctx: TaskContext, picture: str) -> None:
    if picture == "holiday.tiff":
        raise UserError("nobody can look at a TIFF")
    await ctx.join(await ctx.spawn("resize", resize, picture))
    await ctx.emit_event(f"published-{ctx.task_id}")


def scrape(port: int, *names: str) -> list[str]:
    """Return the metrics as Prometheus scrapes them, without the labels that name the library."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sorted(re.sub(r'otel_scope_\w+="[^"]*",', "", line) for line in lines if line.startswith(names))


async def main() -> None:
    # As soon as the global provider is set, durable's metrics go there. Set it where the application starts.
    metrics.set_meter_provider(MeterProvider([PrometheusMetricReader(disable_target_info=True)], Resource({})))
    server, _ = start_http_server(0, addr="127.0.0.1")
    async with Durable(queue_name="metrics", tasks=[publish, resize]) as durable:
        await durable.migrate()
        await durable.create_queue()
        async with durable.worker(concurrency=4):
            for picture in ("cat.png", "dog.png", "holiday.tiff"):
                spawned = await durable.spawn(publish, picture)
                await durable.wait_for_result(spawned, timeout=30)
            print(*await asyncio.to_thread(scrape, server.server_port, "durable_worker_active"), sep="\n")
        totals = ("durable_tasks_spawned", "durable_tasks_completed", "durable_tasks_failed", "durable_events")
        print(*await asyncio.to_thread(scrape, server.server_port, *totals), sep="\n")
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    asyncio.run(main())
