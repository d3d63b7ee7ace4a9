"""The example applications, run as their READMEs say: `alembic`, a web server and a worker, driven over HTTP."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from durable_sa.testing import TestServer
from tests.verification.examples.applications import EXAMPLES, PASSWORD, Run, has_a_dashboard, until

APPLICATIONS = ("fastapi_orders", "flask_billing", "litestar_reviews", "support_agent")


def test_orders_with_fastapi_and_asyncpg(run: Run) -> None:
    shop = run("fastapi_orders", "asyncpg", ORDERS_OPERATOR_PASSWORD=PASSWORD)
    worker, _ = shop.start("durable_sa.cli", "worker", "orders.main:durable")
    with shop.serve("uvicorn", "orders.main:app", "--port", "0") as http:
        assert http.put("/products/lamp", json={"stock": 5}).status_code == 200
        has_a_dashboard(http)

        def order(reference: str) -> str:
            body = {"reference": reference, "sku": "lamp", "quantity": 2}
            response = http.post("/orders", json=body)
            assert response.status_code == 201, response.text
            return f"/orders/{response.json()['id']}"

        def becomes(order: str, status: str) -> dict[str, Any]:
            until(lambda: http.get(order).json()["status"] == status)
            found: dict[str, Any] = http.get(order).json()
            return found

        first, second = order("A-1"), order("A-2")
        assert http.post("/orders", json={"reference": "A-1", "sku": "lamp", "quantity": 1}).status_code == 409
        becomes(first, "reserved")
        becomes(second, "reserved")
        assert http.get("/products/lamp").json() == {"stock": 1}

        # Whatever becomes of the worker, orders go on with the next.
        worker.kill()
        worker.wait()
        assert http.post(f"{first}/payment").status_code == 202
        assert http.delete(second).status_code == 204
        worker, log = shop.start("durable_sa.cli", "worker", "orders.main:durable")
        assert becomes(first, "shipped")["tracking_code"] == "TRACK-1"
        until(lambda: http.get(first).json()["task_state"] == "completed")
        assert http.get(second).json()["task_state"] == "cancelled"
        assert http.get("/products/lamp").json() == {"stock": 3}
        assert http.delete(first).status_code == 409

        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0, log.read_text()


def test_reviews_with_litestar_and_psycopg(run: Run) -> None:
    desk = run("litestar_reviews", "psycopg", REVIEWS_OPERATOR_PASSWORD=PASSWORD)
    worker, log = desk.start("durable_sa.cli", "worker", "reviews.main:durable", "--concurrency", "5")
    with desk.serve("uvicorn", "reviews.main:app", "--port", "0") as http:
        response = http.post("/articles", json={"title": "Owls", "text": "Teh owl is is a bird."})
        assert response.status_code == 201, response.text
        has_a_dashboard(http)
        article = f"/articles/{response.json()['id']}"
        until(lambda: http.get(article).json()["status"] == "reading")
        assert http.get(article).json()["findings"] == ["spelling: Teh", "repeated: is"]
        verdict = {"reader": "Ada", "accepted": True}
        assert http.put(f"{article}/verdict", json=verdict).status_code == 200
        assert http.put(f"{article}/verdict", json=verdict).status_code == 409
        assert http.get(article).json()["reader"] == "Ada"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0, log.read_text()


def test_billing_with_flask_and_synchronous_sessions(run: Run) -> None:
    pytest.importorskip("flask_sqlalchemy", reason="flask-sqlalchemy is not installed")
    office = run("flask_billing", "psycopg", BILLING_TRIAL_DAYS="0", BILLING_OPERATOR_PASSWORD=PASSWORD)
    worker, log = office.start("durable_sa.cli", "worker", "billing.worker:durable", "--concurrency", "5")
    with office.serve("flask", "--app", "billing.web", "run", "--port", "0") as http:
        has_a_dashboard(http)

        def subscribe(card: str) -> str:
            response = http.post("/subscriptions", json={"customer": "ada", "card": card})
            assert response.status_code == 201, response.text
            return f"/subscriptions/{response.json()['id']}"

        paid, refused = subscribe("visa"), subscribe("expired")
        until(lambda: http.get(paid).json()["status"] == "active")
        until(lambda: http.get(refused).json()["status"] == "overdue")
        assert http.put(f"{refused}/card", json={"card": "visa"}).status_code == 200
        until(lambda: http.get(refused).json()["status"] == "active")
        for subscription in (paid, refused):
            (receipt,) = http.get(subscription).json()["receipts"]
            assert receipt.startswith("receipt for 900 cents")
            assert http.delete(subscription).status_code == 204
            assert http.get(subscription).json()["task_state"] == "cancelled"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0, log.read_text()


@pytest.mark.parametrize("name", APPLICATIONS)
def test_its_own_tests_pass(name: str, durable_server: TestServer) -> None:
    if name == "flask_billing":
        pytest.importorskip("flask_sqlalchemy", reason="flask-sqlalchemy is not installed")
    if name == "support_agent":
        pytest.importorskip("pydantic_ai", reason="the extra pydantic-ai is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=EXAMPLES / name,
        env={**os.environ, "DURABLE_TEST_DATABASE_URL": durable_server.url.render_as_string(hide_password=False)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_test_for_each_application() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/alembic.ini")} == set(APPLICATIONS)
