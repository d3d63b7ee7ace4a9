"""Without vacuum, claims read what they read at the beginning, however many tasks have come and gone; and those go.

`python -m tests.verification --churn 1000000` does the same with more of them.
"""

import asyncpg
from sqlalchemy import URL

from durable_sa import Durable

from .churn import BATCH, churn


async def test_claims_stay_as_cheap_as_they_were(database_url: URL, durable: Durable) -> None:
    plain = await asyncpg.connect(database_url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        found = await churn(durable, plain, 20 * BATCH, measurements=2)
    finally:
        await plain.close()
    assert len(found.reads) == 2, found
    assert found.complaints == [], found
