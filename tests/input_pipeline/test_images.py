"""Pictures that must not be opened, which are errors that say why, and those that must, which are upright and RGB."""

import base64
import contextlib
import http.server
import io
import os
import socket
import struct
import threading
import time
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image, ImageOps

from input_pipeline import images
from input_pipeline.examples import RowError
from input_pipeline.images import Opener, Picture, fetch


def _photo(width=23, height=17, mode="RGB"):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def _bytes(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bomb(width=60_000, height=60_000):
    """A PNG of a few hundred bytes that says it is 60,000 pixels wide."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path):
    """A folder of hostile pictures beside a good one, and a secret outside it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    jpeg = _bytes(_photo(), "JPEG")
    files = {
        "good.jpg": jpeg,
        "bomb.png": _bomb(),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": _bytes(_photo())[:-40],
        "page.jpg": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(secret) run\n",
        "empty.png": b"",
        "large.png": _bytes(_photo(200, 200)),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    _photo().save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inner.png").symlink_to(folder / "good.jpg")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    return folder


HOSTILE = {
    "a bomb": (Picture("path", "bomb.png"), r"too many pixels \(max_image_pixels 1,000,000\)"),
    "half a JPEG": (Picture("path", "truncated.jpg"), "is broken: .*[Tt]runcated"),
    "half a PNG": (Picture("path", "truncated.png"), "is broken"),
    "a web page": (Picture("path", "page.jpg"), "is no picture of a known format .*DOCTYPE"),
    "a drawing": (Picture("path", "drawing.svg"), "is no picture of a known format"),
    "a program": (Picture("path", "script.eps"), "is no picture of a known format"),
    "nothing": (Picture("path", "empty.png"), "is empty"),
    "too many bytes": (Picture("path", "large.png"), r"has more than 50,000 bytes \(max_image_bytes\)"),
    "missing": (Picture("path", "none.png"), "there is no such file"),
    "a folder": (Picture("path", "folder.png"), "cannot be read|is no file"),
    "a pipe": (Picture("path", "pipe.png"), "is no file"),
    "a way out": (Picture("path", "../secret.png"), "is not below image_root"),
    "another way out": (Picture("path", "/etc/passwd"), "is not below image_root"),
    "a link out": (Picture("path", "link.png"), "is not below image_root"),
    "a zero byte": (Picture("path", "good.jpg\0.png"), "is no path"),
    "file:": (Picture("url", "file:///etc/passwd"), "file: is not allowed"),
    "http:": (Picture("url", "http://example.com/a.png"), "http: is not allowed"),
    "ftp:": (Picture("url", "ftp://example.com/a.png"), "ftp: is not allowed"),
    "the web": (Picture("url", "https://example.com/a.png"), "to fetch it, set allow_remote_images: true"),
    "no comma": (Picture("url", "data:image/png;base64"), "it has no comma"),
    "no base64": (Picture("url", "data:image/png;base64,@@@@"), "is no base64"),
    "a bomb in the row": (Picture("bytes", _bomb(9000, 9000)), r"9000 x 9000: over 1,000,000 pixels"),
    "long data": (Picture("url", "data:image/png," + "a" * 60_000), "has more than 50,000 bytes"),
}


@pytest.mark.parametrize(("picture", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_picture_is_an_error_that_says_what_it_is(root, picture, message):
    opener = Opener(root=str(root), max_pixels=1_000_000, max_bytes=50_000)
    with pytest.raises(RowError, match=message) as error:
        opener.open([picture])
    assert error.value.kind == "image"
    assert "\n" not in str(error.value)


def test_a_row_of_a_hundred_pictures_is_refused_before_any_is_opened(root):
    with pytest.raises(RowError, match=r"has 100 pictures; allowed: 16 \(max_images_per_row\)"):
        Opener(root=str(root)).open([Picture("path", "none.png")] * 100)


@pytest.mark.parametrize(
    "url",
    [
        "https://169.254.169.254/latest/meta-data",
        "https://127.0.0.1/a.png",
        "https://localhost/a.png",
        "https://10.0.0.1/a.png",
        "https://192.168.1.1/a.png",
        "https://[::1]/a.png",
        "https://[::ffff:169.254.169.254]/a.png",
        "https://0.0.0.0/a.png",
        "https://2130706433/a.png",
    ],
)
def test_no_address_of_a_private_network_is_asked(url):
    with pytest.raises(RowError, match=r"no public address; it is not asked|cannot be fetched") as error:
        Opener(remote=True).open([Picture("url", url)])
    assert error.value.kind == "image"


class _Answers(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.startswith("/slow"):
            head = b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if self.path == "/slow-body" else b"")
            with contextlib.suppress(OSError):
                for byte in head + b"X-Filler: 1\r\n" * 5:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            return
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        body = {"/photo": _bytes(_photo()), "/long": b"x" * 100_000}.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


@contextmanager
def _served(monkeypatch, *, private=("private.test", "127.0.0.1")):
    """A server on this machine that names ending in .test lead to, as if it were a public one, without encryption;
    the one private name leads to where it does."""
    _Answers.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def connect(_, timeout):
            connection = socket.socket()
            connection.settimeout(timeout)
            connection.connect(server.server_address)
            return connection

        def look_up(host, *_, **__):
            address = private[1] if host == private[0] else "93.184.216.34"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))]

        class Plain:
            def wrap_socket(self, plain, **_):
                return plain

        monkeypatch.setattr(images.socket, "getaddrinfo", look_up)
        monkeypatch.setattr(images.socket, "create_connection", connect)
        monkeypatch.setattr(images.ssl, "create_default_context", Plain)
        yield _Answers.asked
        server.shutdown()


def test_a_redirect_is_followed_to_public_addresses_over_https_only(monkeypatch):
    with _served(monkeypatch) as asked:
        found = fetch("https://a.test/to?https://b.test/photo", max_bytes=50_000, seconds=5)
        assert found == _bytes(_photo())
        for url, message in [
            ("https://a.test/to?https://private.test/photo", "private.test is 127.0.0.1, no public address"),
            ("https://a.test/to?http://b.test/photo", "only https: is fetched"),
            ("https://a.test/to?file:///etc/passwd", "only https: is fetched"),
            ("https://a.test/long", "has more than 50,000 bytes"),
            ("https://a.test/none", "cannot be fetched: 404"),
        ]:
            with pytest.raises(RowError, match=message):
                fetch(url, max_bytes=50_000, seconds=5)
    assert asked.count("/photo") == 1  # never by way of the private name


def test_what_was_fetched_is_kept_and_asked_for_once(monkeypatch, tmp_path):
    opener = Opener(remote=True, kept=str(tmp_path / "kept"))
    with _served(monkeypatch) as asked:
        first, again = (opener.open([Picture("url", "https://a.test/photo")])[0] for _ in range(2))
    assert first.tobytes() == again.tobytes() == _photo().tobytes()
    assert asked == ["/photo"]


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_a_server_that_sends_a_byte_now_and_then_runs_out_of_time(monkeypatch, path):
    begun = time.monotonic()
    with _served(monkeypatch), pytest.raises(RowError, match=r"took too long"):
        fetch(f"https://a.test{path}", max_bytes=50_000, seconds=0.4)
    assert time.monotonic() - begun < 3


def test_a_path_an_address_with_data_and_bytes_are_the_same_picture(root):
    data = (root / "good.jpg").read_bytes()
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    inside = str(root / "good.jpg")
    pictures = [Picture("path", "good.jpg"), Picture("path", inside), Picture("path", "inner.png")]
    pictures += [Picture("url", "good.jpg"), Picture("url", url), Picture("bytes", data)]
    opened = Opener(root=str(root)).open(pictures)
    assert len({image.tobytes() for image in opened}) == 1
    assert {(image.mode, image.size) for image in opened} == {("RGB", (23, 17))}


def test_a_picture_is_turned_as_its_camera_says():
    seen = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = _bytes(_photo(), exif=exif)
        opened = images.decode(data, "a picture", max_pixels=1000)
        assert opened.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes()
        assert opened.size == ((23, 17) if orientation < 5 else (17, 23))
        seen.add(opened.tobytes())
    assert len(seen) == 8


def test_every_mode_becomes_rgb_with_nothing_clipped():
    grey = np.linspace(0, 65535, 20 * 10).reshape(10, 20)
    sixteen = images.upright(Image.fromarray(grey.astype(np.uint16)))
    assert np.abs(np.asarray(sixteen, float)[..., 0] - grey / 257).max() <= 0.51
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(images.upright(clear)).min() == 255  # over white, not the red nobody sees
    for mode in ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"):
        image = (
            Image.new("L", (4, 4), 200).convert("RGB").convert(mode) if mode == "LAB" else _photo(4, 4).convert(mode)
        )
        assert images.upright(image).mode == "RGB", mode
