"""Warnings of several threads: each has its own, and afterwards the process is as it was."""

from __future__ import annotations

import threading
import time
import warnings

from diffinv.data.warned import warned

TURNS = 40


def test_threads_hear_only_their_own_warnings_and_leave_nothing_behind() -> None:
    before = (list(warnings.filters), warnings.showwarning, warnings._showwarnmsg_impl)
    heard: dict[str, set[str]] = {"a": set(), "b": set()}

    def work(name: str) -> None:
        for turn in range(TURNS):
            with warned("always" if turn % 3 else "ignore") as caught:
                time.sleep(1e-4)
                warnings.warn(name, stacklevel=1)
                with warned("ignore"):
                    warnings.warn("nobody hears this", stacklevel=1)
            assert len(caught) == (1 if turn % 3 else 0)
            heard[name] |= {str(one.message) for one in caught}

    threads = [threading.Thread(target=work, args=(name,)) for name in heard]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == {"a": {"a"}, "b": {"b"}}
    assert (list(warnings.filters), warnings.showwarning, warnings._showwarnmsg_impl) == before
