"""Claims: one process at a time has a key, and its end, however it comes, leaves it to the next."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from diffinv.data.locks import Claims

HOLDER = """
import sys
from pathlib import Path
from diffinv.data.locks import Claims
claims = Claims(Path(sys.argv[1]))
print([claims.take(key) for key in sys.argv[2:]], flush=True)
sys.stdin.readline()
claims.drop(sys.argv[2])
print("dropped", flush=True)
sys.stdin.readline()
"""
KEYS = ("00000000000000ff", "ffffffffffffffff", "0123456789abcdef")


def test_a_key_is_one_process_s_until_it_drops_it_or_dies(tmp_path: Path) -> None:
    path = tmp_path / "claims"
    command = [sys.executable, "-c", HOLDER, str(path), *KEYS[:2]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "[True, True]\n"
        ours = Claims(path)
        assert [ours.take(key) for key in KEYS] == [False, False, True]
        assert ours.take(KEYS[2])  # again
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "dropped\n"
        assert [ours.take(key) for key in KEYS[:2]] == [True, False]
        other.kill()
        other.wait()
    assert ours.take(KEYS[1])
    ours.close()
    assert path.read_bytes() == b""


def test_without_locks_everybody_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    claims = Claims(tmp_path / "claims")
    assert claims.take(KEYS[0]) and claims.take(KEYS[0])
    claims.drop(KEYS[0])
    claims.close()


def test_a_disk_that_refuses_a_lock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", broken)
    with pytest.raises(OSError, match="Input/output"):
        Claims(tmp_path / "claims").take(KEYS[0])
