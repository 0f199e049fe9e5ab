"""Headers of tars: those that writers of WebDatasets make are read here, faster than by tarfile, which reads others."""

import tarfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

BLOCK = 512  # bytes


class Unusual(Exception):
    """A header that tarfile should read: of a link, a sparse file, a file beyond 8 GB, ..."""


class Member(NamedTuple):
    """A file of a tar, or what is no regular file."""

    name: str
    begin: int  # of its first header
    start: int  # of its data
    size: int
    end: int  # where the next header is
    is_file: bool


def next_member(get: Callable[[int, int], bytes], at: int) -> Member | None:
    """The member whose first header is at byte `at`; None at the end of the archive, or where its bytes end.

    `get` gives the bytes [first, last) of the archive, fewer at its end. Raises Unusual, and tarfile.ReadError for what
    is no header.
    """
    begin, name, size = at, None, None
    while True:
        block = get(at, at + BLOCK)
        if not block.strip(b"\0"):
            return None
        if len(block) < BLOCK:
            raise tarfile.ReadError("unexpected end of data")
        _check(block)
        kind, length = block[156:157], _number(block[124:136])
        start, end = at + BLOCK, at + BLOCK + -(-length // BLOCK) * BLOCK
        if kind in (b"x", b"g", b"L"):
            data = get(start, start + length)
            if len(data) < length:
                raise tarfile.ReadError("unexpected end of data")
            if kind == b"L":
                name = data.rstrip(b"\0").decode(errors="surrogateescape")
            else:
                said = _records(data)
                if kind == b"g" and said.keys() & {"path", "size"}:
                    raise Unusual
                name, size = said.get("path", name), said.get("size", size)
            at = end
            continue
        if kind not in (b"0", b"\0", b"5") or block[257:262] != b"ustar":
            raise Unusual
        if size is not None:
            length = int(size)
            end = start + -(-length // BLOCK) * BLOCK
        if kind == b"5":
            length, end = 0, start
        found = _name(block) if name is None else name
        return Member(found, begin, start, length, end, kind != b"5" and not found.endswith("/"))


def _check(block: bytes) -> None:
    """Raise ReadError unless the header's sum is the one it says: Adler-32's lower half is a sum of bytes."""
    field = block[148:156]
    said = _octal(field)
    if (1 + said - 8 * 32 + sum(field)) % 65521 != zlib.adler32(block) & 0xFFFF:
        raise tarfile.ReadError("bad checksum")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # in base 256
        raise Unusual
    return _octal(field)


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):  # int would take a sign and underscores
        raise tarfile.ReadError("invalid header")
    return int(digits, 8)


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":  # GNU's format has other things there
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode(errors="surrogateescape")


def _records(data: bytes) -> dict[str, str]:
    """The keywords of an extended header. Raises Unusual for those that say more than names, sizes and times."""
    found, at = dict[str, str](), 0
    while at < len(data) and data[at]:
        digits, space, _ = data[at : at + 20].partition(b" ")
        if not space or not digits.isdigit() or not int(digits):
            raise Unusual
        keyword, _, value = data[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        if keyword.startswith(b"GNU.sparse") or keyword == b"hdrcharset":
            raise Unusual
        found[keyword.decode(errors="replace")] = value.decode(errors="surrogateescape")
        at += int(digits)
    if "size" in found and not found["size"].isdecimal():
        raise tarfile.ReadError("invalid header")
    return found
