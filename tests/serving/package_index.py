"""A package index on loopback with small data wheels, and a model hub beside it; both can fail on purpose."""

import hashlib
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from serving.catalogue import Model, Wheel


def write_wheel(folder: Path, name: str, member: str, data: bytes) -> Wheel:
    """A wheel of version 1.0 whose only content beside its metadata is `data` at `member`."""
    stem = f"{name.replace('-', '_')}-1.0"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    content = path.read_bytes()
    return Wheel(name=name, version="1.0", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_model(folder: Path, gguf: bytes, *, parts: int = 3, disk_gib: float = 0.01) -> Model:
    """A catalogue entry whose GGUF is cut into `parts` wheels in `folder`."""
    size = -(-len(gguf) // parts)
    wheels = tuple(
        write_wheel(folder, f"tiny-part{i}", f"tiny_part{i}/data/part{i}.bin", gguf[i * size : (i + 1) * size])
        for i in range(parts)
    )
    return Model(
        alias="tiny",
        wheels=wheels,
        member="*/data/*.bin",
        gguf_bytes=len(gguf),
        gguf_sha256=hashlib.sha256(gguf).hexdigest(),
        disk_gib=disk_gib,
    )


class Site:
    """What the server has and was asked for; `stall` names a file it begins and does not finish until `release`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.stall: str | None = None
        self.stalled = threading.Event()
        self.release = threading.Event()
        self.asked: Counter[str] = Counter()

    def hub_files(self) -> list[dict[str, object]]:
        """The listing of the one hub model, `org/tiny`."""
        root = self.folder / "hub"
        return [
            {"rfilename": str(file.relative_to(root)), "size": file.stat().st_size}
            for file in sorted(root.rglob("*"))
            if file.is_file()
        ]


@contextmanager
def serve_site(folder: Path) -> Iterator[Site]:
    """The wheels in `folder` under /simple and the files in `folder/hub` as the hub model `org/tiny`."""
    site = Site(folder)

    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield site
    finally:
        site.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/simple/"):
            self._index(path.removeprefix("/simple/").strip("/"))
        elif path.startswith("/api/models/org/tiny/tree/"):
            files = [
                {"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0" * 40}
                for f in self.site.hub_files()
            ]
            self._send(json.dumps(files).encode(), "application/json")
        elif path.startswith("/api/models/org/tiny"):
            listing = {"id": "org/tiny", "sha": "a" * 40, "siblings": self.site.hub_files()}
            self._send(json.dumps(listing).encode(), "application/json")
        elif path.startswith("/org/tiny/resolve/"):
            self._file(self.site.folder / "hub" / path.split("/", 5)[5], {"X-Repo-Commit": "a" * 40})
        elif path.startswith("/files/"):
            self._file(self.site.folder / path.removeprefix("/files/"), {})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _index(self, project: str) -> None:
        names = [file.name for file in self.site.folder.glob(f"{project.replace('-', '_')}-*.whl")]
        links = "".join(f'<a href="/files/{name}">{name}</a>' for name in names)
        self._send(f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html")

    def _file(self, file: Path, headers: dict[str, str]) -> None:
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        if self.command == "GET":
            self.site.asked[file.name] += 1
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if file.name == self.site.stall:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.site.stalled.set()
            self.site.release.wait()
            return None
        self.wfile.write(content)
        return None

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests look at `asked`."""
