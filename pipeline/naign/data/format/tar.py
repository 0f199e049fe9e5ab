"""The members of a tar, from its headers in the formats of ustar, GNU and pax: tarfile takes twenty times as long."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from naign.errors import InputError

TAR_BLOCK = 512  # bytes; headers and data are padded to multiples of it
EXTENDED = (b"L", b"K", b"x", b"X", b"g")  # headers that describe the next member
LINKS = (b"1", b"2", b"S")  # hard, symbolic, and GNU's sparse files
NOT_FILES = (b"3", b"4", b"5", b"6")  # devices, directories, pipes
FILES = (b"0", b"\0", b"7")

Read = Callable[[int, int], bytes]  # bytes [first, last) of a tar, fewer at its end


class Member(NamedTuple):
    """A file of a tar, or what is passed over: a directory, a device."""

    name: str
    begin: int  # first byte of its headers
    end: int  # first byte of the next member's headers
    data: bytes | None  # None for all but files


def members(read: Read, where: str = "the tar", *, hashed: bool = False) -> Iterator[Member]:
    """The members up to the end-of-archive mark, or to where the bytes end.

    Checksums of plain headers are not compared if the bytes are `hashed`: their SHA-256 was checked. Raises
    tarfile.TarError or ValueError for bytes that are not a tar or end within a member, InputError for links and sparse
    files.
    """
    begin = 0
    while True:
        header = read(begin, begin + TAR_BLOCK)
        is_plain = header[257:262] == b"ustar" and header[156] == 0x30 and not header[345]
        if is_plain:
            if not hashed:
                _check_sum(header)
            size = _octal(header[124:136])
            member: Member | None = _file(
                read,
                _text(header[:100]),
                begin,
                begin + TAR_BLOCK,
                size,
            )
        else:
            member = _extended(read, begin, where)
        if member is None:
            return
        yield member
        begin = member.end


def _file(
    read: Read,
    name: str,
    begin: int,
    start: int,
    size: int,
) -> Member:
    """The file with `size` bytes of data from `start` on."""
    last = start + size
    end = start + -(-size // TAR_BLOCK) * TAR_BLOCK
    data = read(start, last)
    if len(data) < size or (last < end and not read(end - 1, end)):
        raise tarfile.ReadError("unexpected end of data")
    if name.endswith("/"):
        return Member(name, begin, end, None)
    return Member(name, begin, end, data)


def _extended(read: Read, begin: int, where: str) -> Member | None:
    """The member at byte `begin`, whose name or size extended headers may give; None at the end."""
    found: dict[str, str] = {}  # what extended headers say, by keyword
    start = begin
    while True:
        header = read(start, start + TAR_BLOCK)
        if not header.strip(b"\0"):
            return None
        if len(header) < TAR_BLOCK:
            raise tarfile.ReadError("unexpected end of data")
        _check_sum(header)
        kind = header[156:157]
        size = _octal(header[124:136])
        start += TAR_BLOCK
        if kind not in EXTENDED:
            break
        extension = _file(
            read,
            "",
            begin,
            start,
            size,
        )
        start = extension.end
        found |= _keywords(kind, extension.data or b"")
    name = found.get("path") or _name(header)
    if kind in LINKS or any(keyword.startswith("GNU.sparse") for keyword in found):
        raise InputError(f"{where}: {name} is a link or sparse: repack it with the files")
    if kind in NOT_FILES:
        return Member(name, begin, start, None)
    member = _file(
        read,
        name,
        begin,
        start,
        int(found.get("size", size)),
    )
    if kind in FILES:
        return member
    return member._replace(data=None)


def _check_sum(header: bytes) -> None:
    """Raise ReadError unless the header has the checksum that it records."""
    checksum = header[148:156]
    expected = 1 + _octal(checksum) - 8 * ord(" ") + sum(checksum)  # it counts as blanks in the sum of all bytes
    if expected % 65521 != zlib.adler32(header) & 0xFFFF:  # Adler-32's lower half is that sum plus 1
        raise tarfile.ReadError("bad checksum")


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # int would take a sign and underscores
        raise tarfile.ReadError("invalid header")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":  # GNU's format has other fields there
        return f"{_text(header[345:500])}/{name}"
    return name


def _keywords(kind: bytes, data: bytes) -> dict[str, str]:
    """What the data of an extended header say of the next member."""
    if kind == b"K":  # the name that a link leads to
        return {}
    if kind == b"L":  # GNU's long name
        return {"path": _text(data)}
    values: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:
        digits, _, _ = data[at : at + 20].partition(b" ")
        if not digits.isdigit() or not int(digits):
            raise tarfile.ReadError("invalid header")
        record = data[at + len(digits) + 1 : at + int(digits) - 1]
        keyword, _, value = record.partition(b"=")
        values[keyword.decode(errors="replace")] = value.decode(errors="surrogateescape")
        at += int(digits)
    if not values.get("size", "0").isdecimal():
        raise tarfile.ReadError("invalid header")
    if kind == b"g" and values.keys() & {"path", "size"}:
        raise tarfile.ReadError("a global header names a file")
    return values
