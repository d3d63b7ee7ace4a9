"""Settings that differ between deployments."""

import os

DATABASE_URL = os.environ.get("AGENT_DATABASE_URL", "postgresql+asyncpg://localhost/agent")
MODEL = os.environ.get("AGENT_MODEL")
"""A model by its name in pydantic-ai, such as `openai:gpt-5`. Without one, agent/scripted.py takes its place."""
OPERATOR_PASSWORD = os.environ.get("AGENT_OPERATOR_PASSWORD")
"""The password of the desk and the dashboard. If it is not set, both refuse every request."""
