"""The worker: `durable worker billing.worker:durable`."""

from durable_sa import Durable

from .settings import DATABASE_URL
from .tasks import subscription

durable = Durable(DATABASE_URL, tasks=[subscription])
