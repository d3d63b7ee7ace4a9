"""A virtual environment for each system, so that the requirements of one do not constrain those of another.

Environments are made below the user's cache directory, with uv if it is installed, and kept until requirements change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the Python of an environment with these packages, made if it is missing. ``.`` stands for this project.

    Raises:
        subprocess.CalledProcessError: the packages cannot be installed; `output` says why.
    """
    key = [sys.version, *requirements]
    if "." in requirements:
        key += [str(ROOT), (ROOT / "pyproject.toml").read_text()]
    digest = hashlib.blake2b("\n".join(key).encode(), digest_size=6).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "durable_sa-benchmarks" / f"{name}-{digest}"
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        packages = [part for each in requirements for part in (("--editable", str(ROOT)) if each == "." else (each,))]
        if uv := shutil.which("uv"):
            run(uv, "venv", "--quiet", "--python", sys.executable, str(directory))
            run(uv, "pip", "install", "--quiet", "--python", str(python), *packages)
        else:
            run(sys.executable, "-m", "venv", str(directory))
            run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
        (directory / "complete").touch()
    return python


def run(*command: str) -> None:
    """Run a program, with its output in the error if it fails."""
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
