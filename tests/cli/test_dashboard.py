"""`durable dashboard` serves one user on this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from http.cookiejar import CookieJar

import httpx
import pytest
from sqlalchemy import URL

from durable_sa import Durable
from durable_sa.dashboard.local import LocalDashboard
from tests.cli.support import CommandLine


async def test_the_token_opens_it_and_leaves_the_address(durable: Durable) -> None:
    local = LocalDashboard(durable)
    transport = httpx.ASGITransport(app=local)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as browser:
        assert (await browser.get("/")).status_code == 403
        assert (await browser.get("/?token=wrong")).status_code == 403
        assert (await browser.get("/assets/dashboard.css")).status_code == 403
        answer = await browser.get(f"/tasks?token={local.token}")
        assert (answer.status_code, answer.headers["location"]) == (303, "/tasks")
        assert "HttpOnly" in answer.headers["set-cookie"]
        page = await browser.get("/tasks")
        assert page.status_code == 200
        # Read-only, and without payloads.
        assert 'method="post"' not in page.text
        form = {"task_id": "00000000-0000-0000-0000-000000000007"}
        assert (await browser.post("/tasks/cancel", data=form)).status_code == 403
    await local.dashboard.close()
    writing = LocalDashboard(durable, write=True)
    assert writing.token != local.token
    transport = httpx.ASGITransport(app=writing)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as browser:
        await browser.get(f"/?token={writing.token}")
        assert 'method="post"' in (await browser.get("/events")).text
    await writing.dashboard.close()


async def test_the_address_keeps_all_but_its_token() -> None:
    local = LocalDashboard(Durable("postgresql://127.0.0.1:1/none"))
    transport = httpx.ASGITransport(app=local)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as browser:
        for path, query in (("/tasks", "?state=failed&key=a+b"), ("/queues/a%2Fb%3Fc", "")):
            answer = await browser.get(f"{path}{query or '?'}&token={local.token}")
            assert (answer.status_code, answer.headers["location"]) == (303, f"{path}{query}")
    await local.dashboard.close()


def test_what_cannot_be_served_is_said(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli.run("dashboard", "a:b", "--app", "c:d")
    assert (result.code, "Name the Durable" in result.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = cli.run("dashboard")
    assert result.code == 1
    assert "pip install 'durable_sa[cli,dashboard]'" in result.stderr


@pytest.mark.slow
def test_it_prints_its_address_and_ends_with_ctrl_c(database_url: URL) -> None:
    environment = {**os.environ, "DURABLE_DATABASE_URL": database_url.render_as_string(hide_password=False)}
    command = [sys.executable, "-m", "durable_sa.cli", "dashboard", "--port", "0"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+)/\?token=\S+", url)
        assert found, url
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        with pytest.raises(urllib.error.HTTPError, match="403"):
            opener.open(f"{found[1]}/")
        with opener.open(url) as answer:
            assert b"<h1>Overview</h1>" in answer.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "database: " in errors


@pytest.mark.slow
def test_a_port_in_use_is_said(database_url: URL) -> None:
    environment = {**os.environ, "DURABLE_DATABASE_URL": database_url.render_as_string(hide_password=False)}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "durable_sa.cli", "dashboard", "--port", str(port)]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"Port {port} is in use" in done.stderr
