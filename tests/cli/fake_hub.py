"""A small Hugging Face Hub in memory: what huggingface_hub's client needs for a commit and a snapshot."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_writes"


class FakeHub:
    """Repositories by name, each with the files of every commit; one token may write."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        """Name, then commit, then path."""
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if hub.down:
                    self.close_connection = True
                    return
                hub.requests.append(f"{self.command} {self.path}")
                path, authorized = self.path.partition("?")[0], self.headers.get("Authorization") == f"Bearer {TOKEN}"
                status, headers, content = hub.respond(self.command, path, body, authorized)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_HEAD = answer  # noqa: N815  (http.server's names)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add a commit with these files."""
        commits = self.repos.setdefault(name, {})
        content = {**(list(commits.values())[-1] if commits else {}), **files}
        sha = hashlib.sha1(repr((name, len(commits), sorted(content.items()))).encode()).hexdigest()
        commits[sha] = content
        return sha

    def respond(self, method: str, path: str, body: bytes, authorized: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""

        def as_json(values: Any, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return status, {"Content-Type": "application/json", **named}, json.dumps(values).encode()

        if path == "/down":
            self.down = True
            return as_json({})
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"], as_json)
        if method == "POST" and not authorized:
            return as_json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.repos:
                return as_json({"error": "exists", "url": f"{self.address}/{name}"}, 409)
            self.repos[name] = {}
            self.commit(name, {".gitattributes": b""})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.private.add(name)
            return as_json({"url": f"{self.address}/{name}", "name": name})
        if not (match := re.match(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(\w+)/([^/]+)(?:/(.*))?)?$", path)):
            return as_json({"error": "no such route"}, 404)
        name, action, revision, file = match.groups()
        if name not in self.repos or (name in self.private and not authorized):
            return as_json({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        commits = self.repos[name]
        sha = list(commits)[-1] if revision in (None, "main") else revision
        if sha not in commits:
            return as_json({"error": "Invalid rev"}, 404, X_Error_Code="RevisionNotFound")
        if action == "preupload":
            asked = json.loads(body)["files"]
            return as_json(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
            )
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            sha = self.commit(name, {one["path"]: base64.b64decode(one["content"]) for one in files})
            return as_json({"success": True, "commitOid": sha, "commitUrl": f"{self.address}/{name}/commit/{sha}"})
        content = commits[sha]
        if action == "resolve":
            if file not in content:
                return as_json({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            etag = hashlib.sha1(content[file]).hexdigest()
            return (
                200,
                {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "X-Linked-Size": str(len(content[file]))},
                content[file],
            )
        if action == "tree":
            return as_json(
                [
                    {"type": "file", "path": one, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for one, data in content.items()
                ]
            )
        siblings = [{"rfilename": one} for one in content]
        return as_json({"id": name, "modelId": name, "sha": sha, "private": name in self.private, "siblings": siblings})

    def validate(self, content: str, as_json: Any) -> Any:
        """The hub's rules for a model card, as far as its documentation gives them."""
        errors = []
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        for name in ("tags", "base_model", "library_name", "model-index"):
            if name not in data:
                errors.append(f"{name} is missing")
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                if not ({"type"} <= set(result["task"]) and {"type", "name"} <= set(result["dataset"])):
                    errors.append("a result has no task or data set")
                if not all({"type", "value"} <= set(metric) for metric in result["metrics"]):
                    errors.append("a metric has no value")
        return as_json({"errors": [{"message": error} for error in errors]}, 400 if errors else 200)
