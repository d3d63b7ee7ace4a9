"""The web server's application, with the dashboard beside it: `flask --app billing.web run`."""

from typing import Any, cast

from a2wsgi import ASGIMiddleware
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from durable_sa import Durable
from durable_sa.dashboard import dashboard

from .app import create_app
from .operators import operator
from .settings import DATABASE_URL

app = create_app()
pages: Any = ASGIMiddleware(cast("Any", dashboard(Durable(DATABASE_URL), auth=operator)))
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/durable": pages})  # type: ignore[method-assign]
