"""Packs: many products in one file, `products/packs/<hash>.zip`, each byte for byte the file that it was.

A pack is a ZIP archive without compression: a product is a range of its bytes, whose headers are read where they lie, and any
unzip gives the files back. Products are packed after they are done: the pack is written whole and read back, and then their own
files are removed. A process that dies in between leaves both, and the next one to pack removes the files.
Where a name is found more than once, the newest file counts. Invariant: at every moment a product that was done is whole in a
file of its own, in a pack, or in both.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffinv.core.checks import DiffinvError, InputError
from diffinv.data.atomic import write_atomically
from diffinv.data.headers import Header, read_headers
from diffinv.data.products import Product, decode_product, read_product

FOLDER = "packs"
MOST_BYTES = 2**28  # of a pack, which is held in memory while it is written
_LOCAL_HEADER = 30  # bytes before the name of a member


@dataclass(frozen=True)
class Place:
    """Where a product is. path: a file. name: `<hh>/<safe_id>-<key>.fits`. start, size: of its bytes; None is all of them."""

    path: Path
    name: str
    start: int = 0
    size: int | None = None

    def __str__(self) -> str:
        return str(self.path if self.size is None else self.path / self.name)

    def read(self) -> Product:
        """The product.

        Raises: InputError as `read_product`.
        """
        if self.size is None:
            return read_product(self.path)
        try:
            with open(self.path, "rb") as stream:
                stream.seek(self.start)
                payload = stream.read(self.size)
        except OSError as error:
            raise InputError(f"{self}: cannot be read ({error.strerror}); check the path and its permissions.") from error
        return decode_product(Path(str(self)), payload)

    def headers(self) -> list[Header]:
        """Its headers, which say where its HDUs lie in the file.

        Raises: InputError as `read_headers`.
        """
        return read_headers(self.path, self.start, self.size)


def find_places(out: Path, damaged: list[str]) -> list[Place]:
    """Every product of a directory, oldest first; a pack that cannot be read becomes a line of `damaged`."""
    found: dict[str, Place] = {}
    for path in sorted(_files(out), key=_age):
        try:
            places = read_pack(path) if path.suffix == ".zip" else [Place(path, name_of(path))]
        except InputError as error:
            damaged.append(str(error))
            continue
        for place in places:
            found.pop(place.name, None)
            found[place.name] = place
    return list(found.values())


def _files(out: Path) -> Iterator[Path]:
    yield from (out / "products").glob("[0-9a-f][0-9a-f]/*.fits")
    yield from _folder(out).glob("*.zip")


def _age(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:  # removed since it was listed
        return 0, path.name


def _folder(out: Path) -> Path:
    return out / "products" / FOLDER


def name_of(path: Path) -> str:
    """`<hh>/<safe_id>-<key>.fits` of a product's own path."""
    return f"{path.parent.name}/{path.name}"


def read_pack(path: Path) -> list[Place]:
    """The products of a pack, from its directory alone.

    Raises: InputError if it is no pack, or is cut short.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: not a whole pack ({error}); remove it, and what it held is made again.") from error
    if any(m.compress_type != zipfile.ZIP_STORED or m.extra or m.flag_bits or not m.filename.isascii() for m in members):
        raise InputError(f"{path}: an archive that this package has not written; remove it, or unpack it where it lies.")
    start = lambda m: m.header_offset + _LOCAL_HEADER + len(m.filename)
    return [Place(path, m.filename, start(m), m.file_size) for m in members]


def encode_pack(members: Mapping[str, bytes]) -> bytes:
    """The bytes of a pack: the same members are the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, payload in members.items():
            archive.writestr(zipfile.ZipInfo(name), payload)
    return buffer.getvalue()


class Packs:
    """The packs of an output directory, as they are whenever they are asked for.

    Arguments: out: the directory.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._seen: int | None = None
        self._read: set[str] = set()
        self._places: dict[str, Place] = {}

    def find(self, path: Path) -> Place | None:
        """Where the product of this path lies in a pack; None if it is in none."""
        folder = _folder(self.out)
        try:
            now = folder.stat().st_mtime_ns
        except OSError:
            return None
        if now != self._seen:  # another pack, perhaps of another run; one of a name is never another
            new = [pack for pack in folder.glob("*.zip") if pack.name not in self._read]
            self._places |= {place.name: place for pack in sorted(new, key=_age) for place in _members(pack)}
            self._read |= {pack.name for pack in new}
            self._seen = now
        return self._places.get(name_of(path))

    def hold(self, path: Path) -> bool:
        """Whether a pack holds a valid product of this path."""
        place = self.find(path)
        if place is None:
            return False
        with contextlib.suppress(DiffinvError):
            place.read()
            return True
        return False

    def pack(self, paths: Sequence[Path]) -> None:
        """Move products from their own files into packs of at most `MOST_BYTES`. One alone stays where it is.

        Arguments: paths: of their files; those that a pack holds already are only removed, and those that are gone passed over.
        Raises: OSError if the disk refuses, DiffinvError if a symbolic link leads out of the output directory.
        """
        group: dict[Path, bytes] = {}
        size = 0
        for path in paths:
            if self.hold(path):
                path.unlink(missing_ok=True)
                continue
            try:
                payload = path.read_bytes()
            except FileNotFoundError:
                continue
            if size + len(payload) > MOST_BYTES:
                self._write(group)
                group, size = {}, 0
            group[path] = payload
            size += len(payload)
        self._write(group)

    def _write(self, group: Mapping[Path, bytes]) -> None:
        if len(group) < 2:
            return
        members = {name_of(path): payload for path, payload in group.items()}
        digest = hashlib.sha256("\n".join(members).encode()).hexdigest()[:16]
        folder = _folder(self.out)
        if not folder.resolve().is_relative_to(self.out.resolve()):
            raise DiffinvError(f"{folder}: a symbolic link leads out of {self.out}; remove it.")
        write_atomically(folder / f"{digest}.zip", encode_pack(members), verify=read_pack)
        for path in group:
            path.unlink(missing_ok=True)


def _members(pack: Path) -> list[Place]:
    try:
        return read_pack(pack)
    except InputError:
        return []
