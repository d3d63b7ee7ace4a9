"""Wire the application: `uvicorn agent.main:app` and `durable worker agent.main:durable`."""

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from .app import create_app
from .settings import DATABASE_URL
from .tasks import make_durable

engine = create_async_engine(DATABASE_URL, hide_parameters=True)
sessions = async_sessionmaker(engine, expire_on_commit=False)
durable = make_durable(sessions)
app = create_app(sessions, durable)
