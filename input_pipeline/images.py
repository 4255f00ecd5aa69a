"""Pictures opened safely: from a file below a folder, from bytes, or, where that is allowed, from the web.

A row of a dataset is somebody else's text, so what it names is not simply opened. A file must lie below `root` once
links are followed. The web is off unless `remote`; then https only, no address of a private network, whatever a name
resolves to or a redirect leads to, within a time and a size. Bytes and pixels are counted before anything is decoded,
and only formats that pictures are kept in are decoded at all. Whatever is wrong is a RowError of kind "image".
"""

import base64
import binascii
import contextlib
import hashlib
import http.client
import io
import ipaddress
import os
import socket
import ssl
import stat
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from input_pipeline.examples import RowError, show

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow's names; what else it opens is not needed
_REDIRECTS = 5


class Picture(NamedTuple):
    """Where a picture is: a "path", a "url" (https: or data:), or "bytes"; or it is a "PIL" image already."""

    kind: str
    value: Any

    def __repr__(self) -> str:
        return f"{len(self.value):,} bytes" if self.kind == "bytes" else f"{self.kind} {show(self.value)}"


@dataclass(frozen=True, kw_only=True)
class Opener:
    """What pictures of a dataset may be, and where its files are."""

    root: str | None = None  # folder that paths are relative to, and files below; None: the current one
    remote: bool = False  # https addresses are fetched
    max_pixels: int = 50_000_000  # of a picture
    max_bytes: int = 20_000_000  # of its file
    max_images: int = 16  # of a row
    seconds: float = 10.0  # to fetch one
    kept: str | None = field(default=None, repr=False, compare=False)  # folder where what was fetched is kept

    def open(self, pictures: Sequence[Picture]) -> list[Any]:
        """The pictures of a row, upright and RGB, as PIL images; RowError says what is wrong with which one."""
        if len(pictures) > self.max_images:
            raise RowError(f"has {len(pictures)} pictures; allowed: {self.max_images} (max_images_per_row)", "image")
        return [self._one(picture) for picture in pictures]

    def _one(self, picture: Picture) -> Any:
        if picture.kind == "PIL":
            return upright(picture.value)
        if picture.kind == "bytes":
            return decode(self._sized(picture.value, "a picture"), "a picture", max_pixels=self.max_pixels)
        if picture.kind == "path":
            return decode(self._read(picture.value), f"picture {show(picture.value)}", max_pixels=self.max_pixels)
        data, name = self._from_url(picture.value), f"picture {show(picture.value)}"
        return decode(self._sized(data, name), name, max_pixels=self.max_pixels)

    def _from_url(self, url: str) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return data_url(url, self.max_bytes)
        if "://" not in url:  # what many datasets call a URL is a path
            return self._read(url)
        if scheme != "https":
            raise RowError(f"picture {show(url)}: {scheme}: is not allowed; https: and data: are", "image")
        if not self.remote:
            raise RowError(f"picture {show(url)} is on the web; to fetch it, set allow_remote_images: true", "image")
        place = Path(self.kept, hashlib.sha256(url.encode()).hexdigest()) if self.kept else None
        if place is not None and place.is_file():
            return place.read_bytes()
        data = fetch(url, max_bytes=self.max_bytes, seconds=self.seconds)
        if place is not None:  # the same picture in every epoch, and asked for once
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as stream:
                stream.write(data)
            os.replace(stream.name, place)
        return data

    def _read(self, path: str) -> bytes:
        """The bytes of a file below `root`."""
        name = f"picture {show(path)}"
        root = os.path.realpath(self.root or os.getcwd())
        if "\0" in path:
            raise RowError(f"{name} is no path", "image")
        place = os.path.realpath(os.path.join(root, os.path.expanduser(path)))
        if os.path.commonpath([root, place]) != root:
            raise RowError(f"{name} is not below image_root ({root}); files elsewhere are not opened", "image")
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not hold us up
            with os.fdopen(descriptor, "rb") as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise RowError(f"{name} is no file", "image")
                return self._sized(stream.read(self.max_bytes + 1), name)
        except FileNotFoundError:
            raise RowError(f"{name}: there is no such file (looked in {root})", "image") from None
        except OSError as error:
            raise RowError(f"{name} cannot be read: {error.strerror}", "image") from None

    def _sized(self, data: bytes, name: str) -> bytes:
        if len(data) > self.max_bytes:
            raise RowError(f"{name} has more than {self.max_bytes:,} bytes (max_image_bytes)", "image")
        return data


def decode(data: bytes, name: str, *, max_pixels: int) -> Any:
    """A picture from the bytes of its file, all of it read, upright and RGB; `name` is for the RowError."""
    import PIL
    from PIL import Image

    if not data:
        raise RowError(f"{name} is empty", "image")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise RowError(f"{name} is {width} x {height}: over {max_pixels:,} pixels (max_image_pixels)", "image")
            opened.load()
            return upright(opened)
    except PIL.UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise RowError(f"{name} is no picture of a known format ({kinds}): begins {data[:12]!r}", "image") from None
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(f"{name} has too many pixels (max_image_pixels {max_pixels:,}): {error}", "image") from None
    except Exception as error:  # noqa: BLE001 (Pillow's readers raise whatever a broken file makes of them)
        raise RowError(f"{name} is broken: {error}", "image") from None


def upright(image: Any) -> Any:
    """A PIL image turned as its EXIF says, in RGB: what is transparent over white, 16 bits scaled to 8."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        most = 65535.0 if image.mode.startswith("I") else 255.0
        if image.mode == "F" and values.size and values.max() <= 1:
            most = 1.0
        image = Image.fromarray(np.clip(np.rint(values * (255.0 / most)), 0, 255).astype(np.uint8))
        return image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URL."""
    head, comma, body = url.partition(",")
    if not comma:
        raise RowError(f"picture {show(url)} is no data: URL; it has no comma", "image")
    if len(body) > 4 * max_bytes:
        raise RowError(f"picture {show(url)} has more than {max_bytes:,} bytes (max_image_bytes)", "image")
    return from_base64(body, show(url)) if head.endswith(";base64") else urllib.parse.unquote_to_bytes(body)


def from_base64(text: str, name: str) -> bytes:
    """The bytes that base64 spells."""
    try:
        return base64.b64decode("".join(urllib.parse.unquote(text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"picture {name} is no base64: {error}", "image") from None


def fetch(url: str, *, max_bytes: int, seconds: float) -> bytes:
    """What an https address gives. Every host on the way, redirects too, must resolve to public addresses only, and is
    spoken to at the very address that was looked at."""
    until = time.monotonic() + seconds
    asked = url
    for _ in range(_REDIRECTS + 1):
        found = _ask(asked, max_bytes=max_bytes, until=until)
        if isinstance(found, bytes):
            return found
        asked = urllib.parse.urljoin(asked, found)
    raise RowError(f"picture {show(url)} is redirected more than {_REDIRECTS} times", "image")


def _ask(url: str, *, max_bytes: int, until: float) -> bytes | str:
    """The body of an answer, or where it is redirected to."""
    name, parts = f"picture {show(url)}", urllib.parse.urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise RowError(f"{name}: only https: is fetched", "image")
    try:
        port = parts.port or 443
        address = public_address(parts.hostname, port, name)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = parts.hostname if parts.port in (None, 443) else f"{parts.hostname}:{port}"
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: einkorn\r\nAccept: image/*\r\n"
        with (
            socket.create_connection((address, port), timeout=_left(until, name)) as plain,
            ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname) as connection,
            _hanging_up(connection, _left(until, name)),
        ):
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode("ascii"))
            return _answer(connection, name, max_bytes=max_bytes, until=until)
    except RowError:
        raise
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        _left(until, name)
        raise RowError(f"{name} cannot be fetched: {error}", "image") from None


@contextlib.contextmanager
def _hanging_up(connection: socket.socket, seconds: float) -> Iterator[None]:
    """The connection ends after so many seconds, also under a server that sends a byte now and then."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _answer(connection: socket.socket, name: str, *, max_bytes: int, until: float) -> bytes | str:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    if answer.status in (301, 302, 303, 307, 308):
        return answer.headers.get("Location") or ""
    if answer.status != 200:
        raise RowError(f"{name} cannot be fetched: {answer.status} {answer.reason}", "image")
    data = bytearray()
    while len(data) <= max_bytes:
        connection.settimeout(_left(until, name))
        piece = answer.read1(65536)
        if not piece:
            _left(until, name)  # hung up by us, what came is no whole picture
            return bytes(data)
        data += piece
    raise RowError(f"{name} has more than {max_bytes:,} bytes (max_image_bytes)", "image")


def _left(until: float, name: str) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise RowError(f"{name} took too long", "image")
    return left


def public_address(host: str, port: int, name: str) -> str:
    """An address of a host, all of whose addresses are public."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        number = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(number, "ipv4_mapped", None) or getattr(number, "sixtofour", None) or number
        if not (number.is_global and mapped.is_global) or mapped.is_multicast:
            raise RowError(f"{name}: {host} is {address}, no public address; it is not asked", "image")
    return found[0]


def root_of(path: str | None, given: str | None) -> str | None:
    """The folder that pictures of a dataset are below: the one given, else that of its file."""
    if given:
        return os.path.expanduser(given)
    if not path or "://" in path:
        return None
    place = Path(os.path.expanduser(path))
    return str(place if place.is_dir() else place.parent)
