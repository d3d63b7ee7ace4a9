"""Flask-SQLAlchemy, and with it the session of requests and tasks."""

from flask_sqlalchemy import SQLAlchemy

from .models import Base

db = SQLAlchemy(model_class=Base)
