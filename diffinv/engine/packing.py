"""When products are packed: as soon as all objects of a range of the list have ended.

Ranges are of the list as it was given, so that runs side by side make the same packs. A range that a run leaves before its end
stays in files of its own, for the next run. Invariant: only products that are done are packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diffinv.data.catalog import Entry
from diffinv.data.packs import Packs


class Packing:
    """The ranges of a run's objects.

    Arguments: packs: of the output directory. entries: of this process's shard. size: objects a range.
    """

    def __init__(self, packs: Packs, entries: Sequence[Entry], size: int) -> None:
        self.packs, self.size = packs, size
        self.numbers = {entry.object_id: number for number, entry in enumerate(entries)}
        self.left = Counter(number // size for number in self.numbers.values())
        self.products: dict[int, dict[int, Path]] = {}  # range → number → file

    def end(self, object_id: str, path: Path | None) -> None:
        """Note that an object has ended, with this file or none, and pack its range if it was the last.

        Raises: OSError if the disk refuses the pack.
        """
        number = self.numbers[object_id]
        part = number // self.size
        if path is not None:
            self.products.setdefault(part, {})[number] = path
        self.left[part] -= 1
        if not self.left[part]:
            files = self.products.pop(part, {})
            self.packs.pack([files[number] for number in sorted(files)])
