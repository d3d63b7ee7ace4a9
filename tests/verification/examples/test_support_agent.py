"""The chat with an agent in real processes, which are killed and restarted while a browser follows the answer."""

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text

pytest.importorskip("pydantic_ai", reason="the extra pydantic-ai is not installed")

from tests.verification.examples.applications import EXAMPLES, PASSWORD, Application, Run, has_a_dashboard, until

AUTH = ("operator", PASSWORD)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUESTION = "The lamp of order 17 is scratched. I would like a refund of 500 cents."
FOUND = "Order 17: lamp, 1200 cents, of which {} are refunded."
ANSWER = "I have asked about it, and here is what I know. {} Is there anything else?"
REFUNDED = ANSWER.format("500 cents of order 17 are refunded.")


WATCH = """
window.shown = [];
const talk = document.getElementById("talk");
const observer = new MutationObserver(() => window.shown.push(talk.lastChild.textContent));
observer.observe(talk, { childList: true, subtree: true, characterData: true });
"""


class Browser:
    """What a browser shows of an answer while it comes: as agent/pages/chat.js does, in a thread."""

    def __init__(self, http: httpx.Client, turn: int, after: int | None = None) -> None:
        self.events: dict[int, Any] = {}
        self.restarts = 0
        self.ended = False
        self._address = str(http.base_url.join(f"/turns/{turn}/events"))
        self._headers = {} if after is None else {"Last-Event-ID": str(after)}
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        fields: dict[str, str] = {}
        with httpx.stream("GET", self._address, headers=self._headers, timeout=60) as response:
            for line in response.iter_lines():
                if not line:
                    self._take(fields)
                    fields = {}
                    if self.ended:
                        return
                elif not line.startswith(":"):
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()

    def _take(self, fields: dict[str, str]) -> None:
        match fields:
            case {"event": "restart", "data": position}:
                self.restarts += 1
                self.events = {key: event for key, event in self.events.items() if key <= int(position)}
            case {"event": "end"}:
                self.ended = True
            case {"id": position, "data": data}:
                assert int(position) > max(self.events, default=0)
                self.events[int(position)] = json.loads(data)

    @property
    def text(self) -> str:
        shown = ""
        for event in list(self.events.values()):
            match event:
                case {"event_kind": "part_start", "part": {"part_kind": "text", "content": words}}:
                    shown += words
                case {"event_kind": "part_delta", "delta": {"part_delta_kind": "text", "content_delta": words}}:
                    shown += words
        return shown

    def count(self, kind: str) -> int:
        return sum(event["event_kind"] == kind for event in self.events.values())


class Shop:
    def __init__(self, application: Application, http: httpx.Client) -> None:
        self.http = http
        self._application = application
        self._engine = create_engine(application.url.set(drivername="postgresql+psycopg2"))

    def worker(self, module: str = "agent.main", **options: int) -> subprocess.Popen[bytes]:
        arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return self._application.start("durable_sa.cli", "worker", f"{module}:durable", *arguments)[0]

    def ask(self, question: str = QUESTION) -> int:
        response = self.http.post("/turns", json={"question": question})
        assert response.status_code == 201, response.text
        return int(response.json()["id"])

    def turn(self, turn: int) -> dict[str, Any]:
        found: dict[str, Any] = next(one for one in self.http.get("/turns").json() if one["id"] == turn)
        return found

    def answer(self, turn: int) -> str:
        return str(until(lambda: self.turn(turn)["answer"]))

    def refund(self) -> int:
        """The refund that waits for a human, once the task is suspended."""
        (refund,) = until(lambda: self.http.get("/refunds", auth=AUTH).json())
        return int(refund["id"])

    def decide(self, refund: int) -> int:
        return self.http.put(f"/refunds/{refund}/verdict", json={"approved": True}, auth=AUTH).status_code

    def refunded(self) -> int:
        return int(self.http.get("/orders/17", auth=AUTH).json()["refunded"])

    def hands(self, turn: int) -> tuple[str, int]:
        """The state of a turn's task, and how often it has changed hands: a claim is one more."""
        query = text("SELECT state, fence FROM durable.tasks JOIN turns USING (task_id) WHERE turns.id = :turn")
        with self._engine.connect() as connection:
            state, fence = connection.execute(query, {"turn": turn}).one()
        return state, fence

    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def opened(run: Run) -> Generator[Shop]:
    path = os.pathsep.join(str(part) for part in (EXAMPLES / "support_agent", Path(__file__).parent / "workers"))
    application = run("support_agent", "asyncpg", AGENT_OPERATOR_PASSWORD=PASSWORD, PYTHONPATH=path)
    with application.serve("uvicorn", "agent.main:app", "--port", "0") as http:
        order = {"customer": "ada", "item": "lamp", "cents": 1200}
        assert http.put("/orders/17", json=order, auth=AUTH).status_code == 200
        shop = Shop(application, http)
        yield shop
        shop.close()


@pytest.fixture
def shop(run: Run) -> Generator[Shop]:
    with opened(run) as shop:
        yield shop


def test_a_worker_that_is_killed_in_the_middle_of_an_answer(shop: Shop) -> None:
    has_a_dashboard(shop.http)
    worker = shop.worker("stuck", claim_timeout=5)
    turn = shop.ask()
    browser = Browser(shop.http, turn)
    assert shop.decide(shop.refund()) == 200
    until(lambda: browser.text == "I have asked ")
    worker.kill()
    worker.wait()
    assert (shop.turn(turn)["answer"], browser.restarts) == (None, 0)

    worker = shop.worker()
    assert shop.answer(turn) == REFUNDED
    until(lambda: browser.ended)
    assert (browser.text, browser.restarts) == (REFUNDED, 1)
    # The events of both tools, and the question to the human, came once; and the money was paid once.
    assert browser.count("function_tool_result") == 2
    assert browser.count("deferred_tool_requests") == 1
    assert shop.refunded() == 500
    # A browser that comes back is sent no more than it has missed.
    positions = list(browser.events)
    late = Browser(shop.http, turn, after=positions[-5])
    until(lambda: late.ended)
    assert (list(late.events), late.restarts) == (positions[-4:], 0)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0


def test_a_worker_that_is_killed_as_soon_as_the_refund_is_committed(shop: Shop) -> None:
    worker = shop.worker("killed", claim_timeout=5)
    turn = shop.ask()
    assert shop.decide(shop.refund()) == 200
    assert worker.wait(30) == -signal.SIGKILL
    assert shop.refunded() == 500
    shop.worker()
    assert shop.answer(turn) == REFUNDED
    assert shop.refunded() == 500


def test_workers_come_and_go_while_the_agent_waits_for_a_human(shop: Shop) -> None:
    worker = shop.worker(concurrency=1)
    turn = shop.ask()
    refund = shop.refund()
    # It holds no slot: the only one of this worker answers another question.
    assert shop.answer(shop.ask("Where is order 17?")) == ANSWER.format(FOUND.format(0))
    state, hands = shop.hands(turn)
    assert state == "sleeping"
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0

    worker = shop.worker(concurrency=1)
    assert shop.answer(shop.ask("Where is order 17 now?")) == ANSWER.format(FOUND.format(0))
    worker.kill()
    worker.wait()
    assert shop.hands(turn) == ("sleeping", hands)
    # Two clicks are one verdict, which waits for the next worker.
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(shop.decide, [refund, refund])) == [200, 409]
    assert shop.refunded() == 0

    shop.worker()
    assert shop.answer(turn) == REFUNDED
    assert shop.refunded() == 500
    assert shop.answer(shop.ask("Where is order 17 now?")) == ANSWER.format(FOUND.format(500))


def test_the_pages_in_a_browser(shop: Shop) -> None:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt install chromium")
    problems: list[str] = []
    with playwright_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def opened(path: str, **options: Any) -> Any:
            page = chromium.new_context(base_url=str(shop.http.base_url), **options).new_page()
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda said: problems.append(said.text) if "Policy" in said.text else None)
            page.goto(path)
            return page

        worker = shop.worker("stuck", claim_timeout=5)
        chat = opened("/")
        chat.evaluate(WATCH)
        chat.get_by_label("Your question").fill(QUESTION)
        chat.get_by_role("button", name="Ask").click()
        desk = opened("/desk", http_credentials={"username": AUTH[0], "password": AUTH[1]})
        chat.get_by_text("(A colleague looks at it.)").wait_for()
        desk.get_by_text("500 cents of order 17").get_by_role("button", name="Refund").click()
        chat.get_by_text("(A colleague looks at it.) I have asked").wait_for()
        desk.get_by_text("500 cents of order 17").wait_for(state="detached")
        worker.kill()
        shop.worker()
        chat.get_by_text(REFUNDED, exact=True).wait_for()
        shown = chat.evaluate("window.shown")
        chat.reload()
        chat.get_by_text(REFUNDED, exact=True).wait_for()
        chromium.close()
    # Half of the answer was taken back before the words of the whole one came, one after another.
    whole = f"(A colleague looks at it.) {REFUNDED}"
    assert [text for text in shown[:-1] if not whole.startswith(text)] == []
    assert whole[: whole.index("about")] in shown
    assert whole[: whole.index("it, and")] in shown
    assert shown[-1] == REFUNDED
    assert problems == []
    assert shop.refunded() == 500
