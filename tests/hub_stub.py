"""A hub on 127.0.0.1 that serves folders as data sets and models, as the real one answers."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


def make_handler(root: Path, requests: list[str]):
    class Handler(BaseHTTPRequestHandler):
        """root/datasets/USER/NAME and root/models/USER/NAME hold the files of one commit."""

        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def give_json(self, value) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def handle_request(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} /{path}")
            parts = path.split("/")
            if parts[0] == "api":
                return self.api(parts[1:], content)
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            return self.file(root / kind / parts[0] / parts[1], parts[2:])

        do_GET = do_HEAD = do_POST = handle_request

        def missing(self) -> None:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        def api(self, parts: list[str], content: bytes) -> None:
            if len(parts) < 3 or not (root / Path(*parts[:3])).is_dir():
                return self.missing()
            folder = root / Path(*parts[:3])
            what = parts[3] if parts[3:] else ""
            files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
            if (folder / "GATED").exists():
                return self.answer(403, b"{}", X_Error_Code="GatedRepo")
            entries = [self.entry(folder, file) for file in files]
            if what == "tree":
                under = folder.joinpath(*parts[5:])
                if not under.is_dir():
                    return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
                deep = "recursive=true" in self.path.lower()
                paths = sorted(under.rglob("*") if deep else under.iterdir())
                return self.give_json([self.entry(folder, path) for path in paths])
            if what == "paths-info":
                paths = json.loads(content).get("paths", []) if content[:1] == b"{" else []
                return self.give_json([e for e in entries if e["path"] in paths])
            siblings = [{"rfilename": e["path"], "size": e["size"]} for e in entries]
            about = {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": siblings}
            return self.give_json(about | {"private": False, "gated": False, "tags": []})

        @staticmethod
        def entry(folder: Path, file: Path) -> dict:
            path = str(file.relative_to(folder))
            if file.is_dir():
                return {"type": "directory", "path": path, "oid": "0", "size": 0}
            oid = hashlib.sha1(file.read_bytes()).hexdigest()
            return {"type": "file", "path": path, "size": file.stat().st_size, "oid": oid}

        def file(self, folder: Path, parts: list[str]) -> None:
            file = folder / Path(*parts[2:])
            if parts[:1] != ["resolve"] or not folder.is_dir():
                return self.missing()
            if (folder / "GATED").exists():
                return self.answer(403, b"{}", X_Error_Code="GatedRepo")
            if not file.is_file():
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = file.read_bytes()
            tag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.answer(200, body, ETag=tag, X_Repo_Commit=COMMIT)

        def log_message(self, *args) -> None:
            pass

    return Handler


@contextmanager
def serving(root: Path):
    """The address of a hub that serves `root`, and the list of its requests."""
    requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(root, requests))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
