"""Both type checkers agree with what the modules beside this one assert."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MODULES = [str(path) for path in sorted(Path(__file__).parent.glob("*.py")) if not path.name.startswith("test_")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_mypy() -> None:
    checked = run("mypy", "--follow-imports=silent", *MODULES)
    assert checked.returncode == 0, checked.stdout
    assert f"no issues found in {len(MODULES)} source files" in checked.stdout


@pytest.mark.timeout(300)
def test_pyright() -> None:
    checked = run("pyright", "--pythonpath", sys.executable, "--outputjson", *MODULES)
    report = json.loads(checked.stdout)
    assert report["generalDiagnostics"] == []
    assert report["summary"]["filesAnalyzed"] == len(MODULES)
