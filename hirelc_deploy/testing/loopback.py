"""In: a folder. Out: boards on this machine's loopback: real sshd with keys, homes and locks of their own.

For tests and benchmarks of remote execution. It needs OpenSSH's server (Debian: openssh-server) but no rights: each
board is an `sshd` of the calling user on a port of its own.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hirelc_deploy.measure.remote import Board

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin")
SSH = shutil.which("ssh")


def why_not() -> str | None:
    """Return None where loopback boards can be made, else what is missing."""
    if SSH is None or SSHD is None or shutil.which("ssh-keygen") is None:
        return "needs OpenSSH's client and server (apt install openssh-client openssh-server)"
    return None


class LoopbackBoard:
    """One sshd of ours. `home` and `temporary` are what the board takes for $HOME and $TMPDIR."""

    def __init__(self, folder: Path, name: str = "board") -> None:
        self.folder, self.name = folder / name, name
        self.home, self.temporary = self.folder / "home", self.folder / "tmp"
        for path in (self.home, self.temporary):
            path.mkdir(parents=True)
        self.key, self.host_key = self.folder / "key", self.folder / "host_key"
        for key in (self.key, self.host_key):
            make_key(key)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.known_hosts = self.folder / "known_hosts"
        kind, public = self.host_key.with_suffix(".pub").read_text().split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {public}\n")
        self.config = self.folder / "ssh_config"
        self.write_config()
        self._sshd: subprocess.Popen[bytes] | None = None
        self.start()

    def write_config(self, **options: object) -> None:
        """Write the client's configuration; `options` replace or add entries."""
        entries: dict[str, object] = {
            "HostName": "127.0.0.1",
            "Port": self.port,
            "User": getpass.getuser(),
            "IdentityFile": self.key,
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": self.known_hosts,
            "GlobalKnownHostsFile": "/dev/null",
            **options,
        }
        lines = [f"  {key} {value}" for key, value in entries.items()]
        self.config.write_text("\n".join([f"Host {self.name}", *lines]) + "\n")

    def onto_path(self) -> None:
        """Put an `ssh` that knows this board first on this process's PATH."""
        programs = self.folder / "bin"
        programs.mkdir()
        (programs / "ssh").write_text(f'#!/bin/sh\nexec {SSH} -F {self.config} "$@"\n')
        (programs / "ssh").chmod(0o755)
        os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"

    def start(self, environment: Mapping[str, str] = {}, command: str = "") -> None:
        """Start the sshd, or start it again.

        Args:
            environment: What it sets for whoever logs in.
            command: What runs instead of what was asked for ($SSH_ORIGINAL_COMMAND), as shells that greet do.
        """
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for its folder of privilege separation
        measured = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
        variables = {"HOME": str(self.home), "TMPDIR": str(self.temporary), **measured, **environment}
        lines = [
            f"ListenAddress 127.0.0.1:{self.port}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.key}.pub",
            f"PidFile {self.folder / 'sshd.pid'}",
            *("UsePAM no", "StrictModes no", "PasswordAuthentication no", "KbdInteractiveAuthentication no"),
            *("PermitRootLogin prohibit-password", "MaxStartups 100", "UseDNS no"),
            *([f"ForceCommand {command}"] if command else []),
            "SetEnv " + " ".join(f'"{name}={value}"' for name, value in variables.items()),
        ]
        config = self.folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        assert SSHD is not None
        with (self.folder / "sshd.log").open("ab") as log:
            self._sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log, stdin=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            time.sleep(0.01)
        raise RuntimeError(f"sshd does not start: {(self.folder / 'sshd.log').read_text()[-500:]}")

    def stop(self) -> None:
        """End the sshd and its connections; what was started over them goes on."""
        if self._sshd is not None:
            self.drop_connections()
            self._sshd.terminate()
            self._sshd.wait()
            self._sshd = None

    def drop_connections(self) -> None:
        """End every connection, as when the network goes away."""
        for pid in self.sessions():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def sessions(self) -> list[int]:
        """Return the processes of sshd that hold its connections."""
        assert self._sshd is not None
        children = children_of(self._sshd.pid)
        every = [one for child in children for one in (*children_of(child), child)]
        return [pid for pid in every if b"sshd" in command_of(pid)]

    def keepers(self) -> list[int]:
        """Return the processes that hold this board's home open as worker keepers or their children."""
        marks = (str(self.home).encode(), str(self.temporary).encode())
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (entry / "environ").read_bytes()
                if any(mark in environment for mark in marks) and b"python" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    def leftovers(self) -> list[str]:
        """Return files of ours that are still on the board, and processes that still run."""
        # os.walk passes over folders that vanish meanwhile, which rglob does not.
        there = (Path(folder, name) for folder, _, names in os.walk(self.home) for name in names)
        files = [str(path.relative_to(self.folder)) for path in there if path.is_file()]
        return files + [f"process {pid}" for pid in self.keepers()]

    def kill_everything(self) -> None:
        """End keepers and their children at once, as a power cut does; files stay."""
        for pid in self.keepers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def connect(self, **options: Any) -> Board:
        """Return this board as the tool sees it."""
        defaults: dict[str, Any] = {"python": sys.executable, "patience_s": 20.0, "say": lambda text: None}
        return Board(self.name, ssh=("ssh", "-F", str(self.config)), **{**defaults, **options})


def make_key(path: Path) -> None:
    """Write a key pair without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)


def children_of(pid: int) -> list[int]:
    """Return the processes that `pid` started and that still run."""
    found = []
    with suppress(OSError):  # the process may end meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def command_of(pid: int) -> bytes:
    """Return the command line of a process, or nothing."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
