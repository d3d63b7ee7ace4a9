"""Environments of their own for the systems, so that none decides about the versions of another.

They are made once below the user's cache directory, with uv where it is found, and kept until requirements change.
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


def cache_directory() -> Path:
    """Where the environments are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "durable_sa-benchmarks"


def environment(name: str, requirements: Sequence[str]) -> Path:
    """The Python of an environment with these packages, made if need be. ``.`` stands for this project.

    Raises:
        subprocess.CalledProcessError: the packages cannot be had; `output` says why.
    """
    key = [sys.version, *requirements]
    if "." in requirements:
        key += [str(ROOT), (ROOT / "pyproject.toml").read_text()]
    digest = hashlib.blake2b("\n".join(key).encode(), digest_size=6).hexdigest()
    directory = cache_directory() / f"{name}-{digest}"
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
    """Run a program; what it says is in the error if it fails."""
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
