"""Tasks of a Flask application: its context around them, and the session of Flask-SQLAlchemy in their transactions.

```python
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from durable_sa import Durable
from durable_sa.integrations.flask import FlaskTasks

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg:///shop"
db = SQLAlchemy(app)
durable = Durable(app.config["SQLALCHEMY_DATABASE_URI"], hooks=[FlaskTasks(app, db)])
```
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from ..context import TaskContext
from ..hooks import Hooks

if TYPE_CHECKING:
    from flask import Flask

__all__ = ["FlaskTasks"]


class FlaskTasks(Hooks):
    """Hooks that push an application context around each task, and one of its own around each step and transaction.

    `current_app`, `g` and extensions work in tasks as they do in views. Functions that Flask calls at the end of a
    context (`teardown_appcontext`) are called at the end of each.

    With `db`, the extension object of Flask-SQLAlchemy, `db.session` inside the function of `ctx.transaction` is the
    session of that transaction: code that uses it commits with the checkpoint. Outside of transactions it is a session
    of its own for each step, which is rolled back at the step's end unless the code commits, as in a view. The client
    needs a URL of psycopg, or `sync_bind=db.session`: with asyncpg alone it raises `InvalidConfiguration`.
    """

    def __init__(self, app: Flask, db: Any = None) -> None:
        self.app = app
        if db is not None:
            self.session_scope = db.session

    @asynccontextmanager
    async def around_task(self, ctx: TaskContext[Any]) -> AsyncGenerator[None]:
        """Push an application context around a run."""
        with self.app.app_context():
            yield

    @contextmanager
    def around_step(self, ctx: TaskContext[Any], name: str) -> Generator[None]:
        """Push an application context around a try of a step, or a transaction."""
        with self.app.app_context():
            yield
