"""The worker: `durable worker billing.worker:durable`."""

from durable_sa import Durable
from durable_sa.integrations.flask import FlaskTasks

from .app import create_app
from .database import db
from .settings import DATABASE_URL
from .tasks import subscription

durable = Durable(DATABASE_URL, hooks=[FlaskTasks(create_app(), db)], tasks=[subscription])
