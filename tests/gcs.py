"""A stand-in for Google Cloud Storage: its JSON API over HTTP, as far as tensorstore, gcsfs and
google-cloud-storage ask for it. Objects live in memory.

    storage = gcs.of_this_process()
    ... checkpoints in gs://bucket/run ...
    storage.objects["bucket", "run/3/state/manifest.ocdbt"].data
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email
import functools
import hashlib
import http.server
import itertools
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator

_SAVED = "2026-01-01T00:00:00.000Z"


@dataclasses.dataclass
class Object:
    """data: its bytes. generation: counts the writes of the whole storage."""

    data: bytes
    generation: int


@dataclasses.dataclass
class Storage:
    """refuse: given method and path of a request, the HTTP status to fail it with, or None."""

    port: int = 0
    buckets: set[str] = dataclasses.field(default_factory=lambda: {"bucket"})
    objects: dict[tuple[str, str], Object] = dataclasses.field(default_factory=dict)
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    _generations: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))
    _uploads: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def answer(self, method, target, headers, body) -> tuple[int, dict[str, str], bytes]:
        """One request: its status, headers and body."""
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        status = self.refuse(method, target)
        if status:
            return _problem(status)
        if url.path.startswith("/batch/"):
            return self._batch(headers, body)
        path = re.sub(r"^/(upload/|download/)?storage/v1/", "", url.path).rstrip("/")
        place = re.fullmatch(r"b/([^/]+)(?:/o(?:/([^/]+))?)?", path)
        move = re.fullmatch(r"b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path)
        if not (place or move):
            return _problem(501)
        bucket, name, *target = map(_unquoted, (place or move).groups())
        if bucket not in self.buckets:
            return _problem(404)
        if move:
            if (bucket, name) not in self.objects:
                return _problem(404)
            return _json(self._write(bucket, target[0], self.objects.pop((bucket, name)).data))
        if url.path.startswith("/upload/"):
            return self._upload(method, bucket, query, headers, body)
        if name is None:
            if path == f"b/{bucket}":
                return _json({"kind": "storage#bucket", "name": bucket, "id": bucket})
            return self._list(bucket, query)
        found = self.objects.get((bucket, name))
        if found is None:
            return _problem(404)
        if method == "DELETE":
            del self.objects[bucket, name]
            return 204, {}, b""
        if query.get("alt") == "media" or url.path.startswith("/download/"):
            return self._read(found, headers, query)
        return _json(self._describe(bucket, name))

    def _write(self, bucket: str, name: str, data: bytes) -> dict:
        self.objects[bucket, name] = Object(data, next(self._generations))
        return self._describe(bucket, name)

    def _describe(self, bucket: str, name: str) -> dict:
        found = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "id": f"{bucket}/{name}/{found.generation}",
            "generation": str(found.generation),
            "metageneration": "1",
            "size": str(len(found.data)),
            "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
            "timeCreated": _SAVED,
            "updated": _SAVED,
        }

    def _list(self, bucket: str, query: dict[str, str]):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        first, last = query.get("startOffset", ""), query.get("endOffset")
        for where, name in sorted(self.objects):
            if where != bucket or not name.startswith(prefix) or name < first:
                continue
            if last and name >= last:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._describe(bucket, name))
        return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _read(self, found: Object, headers, query):
        answer = {
            "x-goog-generation": str(found.generation),
            "x-goog-metageneration": "1",
            "Content-Type": "application/octet-stream",
        }
        if query.get("ifGenerationNotMatch") == str(found.generation):
            return 304, answer, b""
        if query.get("ifGenerationMatch", str(found.generation)) != str(found.generation):
            return _problem(412)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range") or "")
        if not wanted:
            return 200, answer, found.data
        size = len(found.data)
        if wanted[1]:
            first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        else:
            first, last = max(0, size - int(wanted[2])), size - 1
        if first > last:
            return _problem(416)
        answer["Content-Range"] = f"bytes {first}-{last}/{size}"
        return 206, answer, found.data[first : last + 1]

    def _upload(self, method, bucket, query, headers, body):
        kind = query.get("uploadType")
        if method == "PUT" or "upload_id" in query:
            place = self._uploads.pop(query["upload_id"])
            return _json(self._write(*place, body))
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            token = str(next(self._generations))
            self._uploads[token] = bucket, name
            where = f"http://localhost:{self.port}/upload/storage/v1/b/{bucket}/o"
            return 200, {"Location": f"{where}?uploadType=resumable&upload_id={token}"}, b""
        if kind == "multipart":
            description, content = _parts(headers["Content-Type"], body)
            name, data = json.loads(description)["name"], content
        else:
            name, data = query["name"], body
        expected = query.get("ifGenerationMatch")
        found = self.objects.get((bucket, name))
        if expected is not None and int(expected) != (found.generation if found else 0):
            return _problem(412)
        return _json(self._write(bucket, name, data))

    def _batch(self, headers, body):
        answers = []
        for part in _parts(headers["Content-Type"], body):
            first, rest = part.decode().split("\r\n" if b"\r\n" in part else "\n", 1)
            method, target, _ = first.split(" ")
            status, _, _ = self.answer(method, target, email.message_from_string(rest), b"")
            answers.append(
                f"--b\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} X\r\n\r\n\r\n"
            )
        text = "".join(answers) + "--b--\r\n"
        return 200, {"Content-Type": "multipart/mixed; boundary=b"}, text.encode()


def _parts(kind: str, body: bytes) -> list[bytes]:
    boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
    out = []
    for part in body.split(b"--" + boundary)[1:-1]:
        part = part.removeprefix(b"\r\n").removeprefix(b"\n")
        gap = b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n"
        out.append(part.split(gap, 1)[1].removesuffix(b"\n").removesuffix(b"\r"))
    return out


def _unquoted(text: str | None) -> str | None:
    return text and urllib.parse.unquote(text)


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _problem(status: int):
    text = {"error": {"code": status, "message": f"stand-in says {status}", "errors": []}}
    return status, {"Content-Type": "application/json"}, json.dumps(text).encode()


@functools.cache
def of_this_process() -> Storage:
    """A storage with the empty bucket ``bucket``, which this process and those that it starts use
    from now on: tensorstore reads once in the life of a process where its storage is."""
    storage, lock = Storage(), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                status, headers, data = storage.answer(self.command, self.path, self.headers, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # has read enough
                    self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    storage.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{storage.port}"
    os.environ |= {
        "TENSORSTORE_GCS_HTTP_URL": url,
        "STORAGE_EMULATOR_HOST": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # of array_record
        "GOOGLE_CLOUD_PROJECT": "project",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks over gRPC, with credentials
    }
    return storage
