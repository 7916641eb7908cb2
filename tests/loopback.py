"""Servers on 127.0.0.1: plain files that come slowly, break off or move, and a small Hugging Face hub."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.server.owner.answer(self)

    def do_GET(self):
        self.server.owner.answer(self)

    def do_POST(self):
        self.server.owner.answer(self)

    def do_PUT(self):
        self.server.owner.answer(self)

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def reply(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, fields, status=200, **headers):
        self.reply(status, json.dumps(fields).encode(), Content_Type="application/json", **headers)


class Server:
    """Serves on a port of its own while it is a context."""

    def __init__(self):
        self.requests = []  # (method, path, Range)

    def __enter__(self):
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.owner = True, self
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request):
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        self.serve(request)


class Files(Server):
    """Files by their path. `breaks` gives how many bytes of an answer come before the connection ends."""

    def __init__(self, files=(), *, breaks=(), pause=0.0, redirects=(), ranges=True, kind="application/octet-stream"):
        super().__init__()
        self.files, self.breaks, self.pause = dict(files), list(breaks), pause
        self.redirects, self.ranges, self.kind = dict(redirects), ranges, kind

    def serve(self, request):
        if request.path in self.redirects:
            request.reply(302, Location=self.redirects[request.path])
            return
        content = self.files.get(request.path)
        if content is None:
            request.reply(404, b"<html>no such file</html>", Content_Type="text/html")
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if self.ranges and (asked := request.headers.get("Range")) and request.headers.get("If-Range") in (None, tag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                request.reply(416)
                return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in {"ETag": tag, "Content-Length": len(content) - start, "Content-Type": self.kind}.items():
            request.send_header(name, str(value))
        request.end_headers()
        end = start + self.breaks.pop(0) if self.breaks else len(content)
        with contextlib.suppress(OSError):
            for at in range(start, min(end, len(content)), 1 << 20):
                time.sleep(self.pause)
                request.wfile.write(content[at : min(end, at + (1 << 20))])
        request.close_connection = True


def rerouted(open_request, server):
    """`open_request` of tnt_jax, by which every address is fetched from a server here that has /HOST/PATH of it."""

    def opened(request):
        if not request.full_url.startswith(server):
            request.full_url = f"{server}/{request.full_url.partition('://')[2]}"
        return open_request(request)

    return opened


class Hub(Server):
    """Repositories by name, each with its files; new ones are pushed with the token `hf_loopback`."""

    COMMIT = "c" * 40
    REVISIONS = ("main", "v1", COMMIT)

    def __init__(self, repositories=()):
        super().__init__()
        self.repositories, self.objects = dict(repositories), {}

    def serve(self, request):
        path, _, _ = request.path.partition("?")
        if request.command in ("POST", "PUT"):
            self.receive(request, path, request.body())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.give(request, *found.groups())
        elif path.startswith("/api/whoami"):
            request.reply_json({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path)) and (
            found[1] in self.repositories
        ):
            revision = (found[2] or "/revision/main").rpartition("/")[2]
            if revision in self.REVISIONS:
                request.reply_json({"id": found[1], "modelId": found[1], "sha": self.COMMIT, "siblings": []})
            else:
                request.reply_json({"error": "Invalid rev"}, 404, X_Error_Code="RevisionNotFound")
        else:
            request.reply_json({"error": "no such thing"}, 404, X_Error_Code="RepoNotFound")

    def give(self, request, name, revision, file):
        if name not in self.repositories:
            request.reply_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif revision not in self.REVISIONS:
            request.reply_json({"error": "Invalid rev"}, 404, X_Error_Code="RevisionNotFound")
        elif file not in self.repositories[name]:
            request.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.COMMIT)
        else:
            content = self.repositories[name][file]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            request.reply(200, content, X_Repo_Commit=self.COMMIT, ETag=tag)

    def receive(self, request, path, body):
        if path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            request.reply(200)
        elif path == "/api/validate-yaml":
            request.reply_json({"errors": [], "warnings": []})
        elif request.headers.get("Authorization") != "Bearer hf_loopback":
            request.reply_json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            fields = json.loads(body)
            name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
            self.repositories.setdefault(name, {})
            request.reply_json({"url": f"{self.address}/{name}", "id": name})
        elif path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            request.reply_json({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.address}/objects/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            request.reply_json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repositories[found[1]][value["path"]] = self.objects[value["oid"]]
            request.reply_json(
                {
                    "commitUrl": f"{self.address}/{found[1]}/commit/{self.COMMIT}",
                    "commitOid": self.COMMIT,
                    "success": True,
                }
            )
        else:
            request.reply_json({"error": f"no such thing: {path}"}, 404)


class Datasets(Server):
    """Repositories of datasets, {OWNER/NAME: {path: bytes}}, as far as the library `datasets` asks for them."""

    COMMIT = "c" * 40

    def __init__(self, repositories):
        super().__init__()
        self.repositories = repositories

    def serve(self, request):
        path, _, _ = request.path.partition("?")
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.repositories.get(found[1], {}).get(found[2])
            if content is None:
                request.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.COMMIT)
            else:
                tag = f'"{hashlib.sha256(content).hexdigest()}"'
                request.reply(200, content, X_Repo_Commit=self.COMMIT, ETag=tag)
        elif not (found := re.match(r"/api/datasets/([^/]+/[^/]+)(.*)", path)) or found[1] not in self.repositories:
            request.reply_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif tree := re.fullmatch(r"/tree/[^/]+/?(.*)", found[2]):
            request.reply_json(self.entries(found[1], f"{tree[1]}/" if tree[1] else ""))
        else:
            siblings = [{"rfilename": name} for name in self.repositories[found[1]]]
            request.reply_json({"id": found[1], "sha": self.COMMIT, "private": False, "tags": [], "siblings": siblings})

    def entries(self, name, folder):
        """What lies in a folder: files, and folders."""
        inside = {path: len(content) for path, content in self.repositories[name].items() if path.startswith(folder)}
        folders = {folder + path.removeprefix(folder).split("/")[0] for path in inside if "/" in path[len(folder) :]}
        found = [{"type": "directory", "path": path, "size": 0, "oid": "d" * 40} for path in sorted(folders)]
        return found + [
            {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path, size in inside.items()
            if "/" not in path[len(folder) :]
        ]
