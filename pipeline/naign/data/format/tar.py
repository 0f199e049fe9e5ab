"""The members of a tar, from its headers in the formats of ustar, GNU and pax: tarfile takes twenty times as long."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from naign.errors import InputError

BLOCK = 512  # bytes; headers and data are padded to multiples of it

Read = Callable[[int, int], bytes]  # bytes [first, last) of a tar, fewer at its end


class Member(NamedTuple):
    """A file of a tar, or what is passed over: a directory, a device."""

    name: str
    begin: int  # first byte of its headers
    end: int  # first byte of the next member's headers
    data: bytes | None  # None for all but files


def members(read: Read, where: str = "the tar", *, hashed: bool = False) -> Iterator[Member]:
    """The members up to the end-of-archive mark, or to where the bytes end.

    Checksums of plain headers are not compared where the bytes are `hashed`: they have a hash that was checked. Raises
    tarfile.TarError or ValueError where they are no tar or cut within a member, InputError for links and sparse files.
    """
    at = 0
    while True:
        header = read(at, at + BLOCK)
        if header[257:262] == b"ustar" and header[156] == 0x30 and not header[345] and header[124] < 0x80:  # plain
            name = header[:100].split(b"\0", 1)[0].decode(errors="surrogateescape")
            size = _octal(header[124:136]) if hashed else _checked_size(header)
            member: Member | None = _member(read, name, at, at + BLOCK, size)
        else:
            member = _with_extended_headers(read, at, where)
        if member is None:
            return
        yield member
        at = member.end


def _member(read: Read, name: str, begin: int, start: int, size: int) -> Member:
    """The file whose data are `size` bytes from `start` on."""
    data, last = read(start, start + size), start + size
    end = start + -(-size // BLOCK) * BLOCK
    if len(data) < size or (last < end and not read(end - 1, end)):
        raise tarfile.ReadError("unexpected end of data")
    return Member(name, begin, end, None if name.endswith("/") else data)


def _with_extended_headers(read: Read, begin: int, where: str) -> Member | None:
    """The member at byte `begin`, whose name or size extended headers may give; None at the end."""
    at, name, size, sparse = begin, None, None, False
    while True:
        header = read(at, at + BLOCK)
        if not header.strip(b"\0"):
            return None
        if len(header) < BLOCK:
            raise tarfile.ReadError("unexpected end of data")
        kind, length, start = header[156:157], _checked_size(header), at + BLOCK
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            _, _, at, data = _member(read, "", at, start, length)
            assert data is not None
            if kind == b"L":  # GNU's long name of a file; K is of what it links to
                name = data.rstrip(b"\0").decode(errors="surrogateescape")
            elif kind != b"K":
                keywords = _keywords(data)
                if kind == b"g" and keywords.keys() & {"path", "size"}:
                    raise tarfile.ReadError("a global header names a file")
                name, size = keywords.get("path", name), keywords.get("size", size)
                sparse = sparse or any(keyword.startswith("GNU.sparse") for keyword in keywords)
        else:
            name = _name(header) if name is None else name
            if kind in (b"1", b"2", b"S") or sparse:
                raise InputError(f"{where}: {name} is a link or sparse: repack it with the files")
            if kind in (b"3", b"4", b"5", b"6"):  # devices, directories, pipes
                return Member(name, begin, start, None)
            member = _member(read, name, begin, start, length if size is None else int(size))
            return member if kind in (b"0", b"\0", b"7") else member._replace(data=None)


def _checked_size(header: bytes) -> int:
    """The size in a header. Raises ReadError unless the header has the checksum that it records."""
    checksum = header[148:156]
    if (1 + _octal(checksum) - 8 * 32 + sum(checksum)) % 65521 != zlib.adler32(header) & 0xFFFF:
        raise tarfile.ReadError("bad checksum")  # Adler-32's lower half is a sum of bytes
    if header[124] & 0x80:  # in base 256
        return int.from_bytes(header[125:136])
    return _octal(header[124:136])


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # int would take a sign and underscores
        raise tarfile.ReadError("invalid header")
    return int(digits, 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU's format has other fields there
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode(errors="surrogateescape")


def _keywords(data: bytes) -> dict[str, str]:
    """The values in an extended header, by keyword."""
    values, at = dict[str, str](), 0
    while at < len(data) and data[at]:
        digits, space, _ = data[at : at + 20].partition(b" ")
        if not space or not digits.isdigit() or not int(digits):
            raise tarfile.ReadError("invalid header")
        keyword, _, value = data[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        values[keyword.decode(errors="replace")] = value.decode(errors="surrogateescape")
        at += int(digits)
    if not values.get("size", "0").isdecimal():
        raise tarfile.ReadError("invalid header")
    return values
