"""A hub on loopback for huggingface_hub's own client. It serves a folder as a dataset, supports
range requests, and can break off connections."""

import hashlib
import http.server
import json
import os
import re
import socket
import struct
import threading
import time
import urllib.parse
from pathlib import Path

COMMIT = "0123456789" * 4


class Hub(http.server.ThreadingHTTPServer):
    """requests lists the (method, path, range) of each request. drops maps a file's name to a list:
    for each of the first attempts, the number of bytes after which the connection breaks off. It
    is closed in order, or reset (as by a firewall) if reset is set. A stalled file never comes. A
    gated dataset needs a login."""

    daemon_threads = True

    def __init__(self, folder, repo, drops=None, reset=False, stalled=(), gated=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.repo, self.reset, self.stalled = Path(folder), repo, reset, stalled
        self.drops = {name: list(counts) for name, counts in (drops or {}).items()}
        self.requests = []
        self.gated = gated
        self.failures = []  # the status of the first answers for files
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def env(self, home):
        """The environment for the client: where this hub is, and a folder for the cache."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}

    def fetched(self):
        """The names of the files asked for, once each, in the order of the first request."""
        gets = [path for how, path, _ in self.requests if how == "GET" and "/resolve/" in path]
        return list(dict.fromkeys(path.partition(COMMIT + "/")[2] for path in gets))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(body)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.gated:
            said = "Access to this dataset is restricted. You must be authenticated: log in."
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": said}
            return self.answer(401, b"", headers)
        if path in (f"/api/datasets/{hub.repo}", f"/api/datasets/{hub.repo}/revision/{COMMIT}"):
            return self.answer(200, json.dumps({"id": hub.repo, "sha": COMMIT}).encode())
        prefix = f"/api/datasets/{hub.repo}/tree/{COMMIT}"
        folder = hub.folder / path.removeprefix(prefix).strip("/")
        recursive = "recursive=true" in self.path.lower()
        if path.startswith(prefix) and folder.is_dir():
            entries = [
                {
                    "type": "directory" if entry.is_dir() else "file",
                    "path": str(entry.relative_to(hub.folder)),
                    "size": entry.stat().st_size,
                    "oid": "",
                }
                for entry in (folder.rglob("*") if recursive else folder.iterdir())
            ]
            return self.answer(200, json.dumps(entries).encode())
        name = path.removeprefix(f"/datasets/{hub.repo}/resolve/{COMMIT}/")
        if name == path or not (hub.folder / name).is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if hub.failures:
            return self.answer(hub.failures.pop(0), b"")
        while name in hub.stalled and self.command == "GET":
            time.sleep(0.1)
        body = (hub.folder / name).read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        headers, status = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, 200
        if wanted := re.match(r"bytes=(\d+)-$", self.headers.get("Range", "")):
            first, size, status = int(wanted[1]), len(body), 206
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            body = body[first:]
        if self.command == "GET" and hub.drops.get(name):
            self.answer(status, body, headers, cut=hub.drops[name].pop(0))
            if hub.reset:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                os.close(self.connection.detach())
            self.close_connection = True
            return
        self.answer(status, body, headers)

    do_HEAD = do_GET
