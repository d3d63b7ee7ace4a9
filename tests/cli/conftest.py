"""The command line, connected to the test's database."""

import pytest
from sqlalchemy import URL

from tests.cli.support import CommandLine


@pytest.fixture
def cli(database_url: URL) -> CommandLine:
    return CommandLine(database_url)
