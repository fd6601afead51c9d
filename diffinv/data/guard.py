"""Damage of files as one line: what a broken header or column makes a reader raise becomes an InputError with the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffinv.core.checks import DiffinvError, InputError


@contextmanager
def readable(path: str | Path, what: str) -> Iterator[None]:
    """Read within: errors that name the file already pass, others get its name.

    Arguments: path. what: the file is meant to be, "an RMF".
    Raises: InputError.
    """
    try:
        yield
    except DiffinvError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, AttributeError) as error:
        cause = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: cannot be read as {what} ({cause}); fetch or write it again.") from error
