"""A stand-in for the API of Weights & Biases on loopback: answers what publishing and syncing ask, and records it.

It knows one account, "me", and takes every project to be there. It is written after the requests of wandb 0.31 and
wandb-workspaces 0.4, not after the service.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"
_PROJECT = {"id": "1", "internalId": "1", "name": "autolora", "entityName": "me", "entity": {"id": "1", "name": "me"}}
Variables = Mapping[str, Any]


@dataclass
class StandIn:
    """What was asked: GraphQL operations with their variables, files by address, and targets that are elsewhere."""

    url: str = ""
    refuses: bool = False
    asked: list[tuple[str, Variables]] = field(default_factory=list)
    put: dict[str, bytes] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)

    def all_of(self, operation: str) -> list[Variables]:
        """The variables of every call of an operation."""
        return [variables for name, variables in self.asked if name == operation]

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """For a process that has nothing of W&B but this server, and whose requests to others arrive here too."""
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("WANDB", "NETRC"))}
        folders = {f"WANDB_{name}_DIR": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        proxies = {name: self.url for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
        direct = {name: "127.0.0.1" for name in ("NO_PROXY", "no_proxy")}
        ours = {"HOME": str(home), "WANDB_DIR": str(home), "WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}
        return kept | folders | proxies | direct | ours | changes

    def answer(self, operation: str, variables: Variables) -> dict[str, Any]:
        """The data of an operation that is known."""
        return _ANSWERS[operation](self, variables)

    def file(self, name: str) -> dict[str, Any]:
        """A file that may be sent to an address of its own."""
        return {"id": name, "name": name, "uploadUrl": f"{self.url}/put/{name}", "uploadHeaders": []}


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """The server, as long as the context."""
    service = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            if not self.path.startswith("/"):  # as it is asked of a proxy
                service.elsewhere.append(self.path)
                self._reply(403, {})  # an error that nobody repeats a request for
            elif self.path != "/graphql":
                if self.command == "PUT":
                    service.put[self.path] = body
                self._reply(200, {})
            elif service.refuses:
                self._reply(403, {"errors": [{"message": "permission denied"}]})
            else:
                request = json.loads(body)
                found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                operation, variables = found[1] if found else "", request.get("variables") or {}
                service.asked.append((operation, variables))
                if operation in _ANSWERS:
                    self._reply(200, {"data": service.answer(operation, variables)})
                else:
                    self._reply(400, {"errors": [{"message": f"the stand-in does not know {operation}"}]})

        do_GET = do_HEAD = do_PUT = do_CONNECT = do_POST

        def _reply(self, status: int, content: Mapping[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield service
        finally:
            server.shutdown()


def _viewer(service: StandIn, variables: Variables) -> dict[str, Any]:
    return {"viewer": {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}


def _bucket(service: StandIn, variables: Variables) -> dict[str, Any]:
    bucket = {"id": "1", "name": variables["name"], "config": "{}", "historyLineCount": 0, "project": _PROJECT}
    return {"upsertBucket": {"bucket": bucket, "inserted": True}}


def _run_files(service: StandIn, variables: Variables) -> dict[str, Any]:
    files = [service.file(f"{variables['run']}/{name}") for name in variables["files"]]
    named = [one | {"name": name} for one, name in zip(files, variables["files"], strict=True)]
    return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": named}}


def _artifact(service: StandIn, variables: Variables) -> dict[str, Any]:
    artifact = {"id": "1", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
    return {"createArtifact": {"artifact": artifact}}


def _manifest(service: StandIn, variables: Variables) -> dict[str, Any]:
    return {"createArtifactManifest": {"artifactManifest": {"id": "1", "file": service.file("manifest")}}}


def _artifact_files(service: StandIn, variables: Variables) -> dict[str, Any]:
    names = [one["name"] for one in variables["input"]["artifactFiles"]]
    nodes = [service.file(f"artifact/{name}") | {"storagePath": name, "artifact": {"id": "1"}} for name in names]
    return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}


def _commit(service: StandIn, variables: Variables) -> dict[str, Any]:
    return {"commitArtifact": {"artifact": {"id": "1", "digest": ""}}}


def _committed(service: StandIn, variables: Variables) -> dict[str, Any]:
    sequence = {"__typename": "ArtifactSequence", "name": "comparison", "project": _PROJECT}
    artifact: dict[str, Any] = {
        "__typename": "Artifact", "id": "1", "artifactSequence": sequence, "artifactType": {"name": "comparison"},
        "versionIndex": 0, "state": "COMMITTED", "size": 0, "digest": "", "commitHash": "", "fileCount": 0,
        "createdAt": "2026-01-01T00:00:00", "updatedAt": None, "description": None, "metadata": None,
        "ttlDurationSeconds": -1, "ttlIsInherited": False, "historyStep": None, "tags": [], "aliases": [],
    }  # fmt: skip
    return {"artifact": artifact}


def _projects(service: StandIn, variables: Variables) -> dict[str, Any]:
    node = {"__typename": "Project", "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
    page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    return {"models": {"pageInfo": page, "edges": [{"node": node | _PROJECT}]}}


def _view(service: StandIn, variables: Variables) -> dict[str, Any]:
    told = {name: variables[name] for name in ("type", "name", "displayName", "description", "spec")}
    view = told | {"id": "Vmlldzox", "project": _PROJECT, "updatedAt": "2026-01-01T00:00:00"}
    return {"upsertView": {"view": view, "inserted": True}}


_ANSWERS: dict[str, Callable[[StandIn, Variables], dict[str, Any]]] = {
    "Viewer": _viewer,
    "GetDefaultEntity": _viewer,
    "ServerFeaturesQuery": lambda service, variables: {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": lambda service, variables: {"entity": None},
    "UpsertBucket": _bucket,
    "CreateRunFiles": _run_files,
    "ArtifactType": lambda service, variables: {"project": {"artifact": None}},
    "CreateArtifact": _artifact,
    "CreateArtifactManifest": _manifest,
    "CreateArtifactFiles": _artifact_files,
    "CommitArtifact": _commit,
    "ArtifactByID": _committed,
    "GetProjects": _projects,
    "ProjectInternalId": lambda service, variables: {"project": _PROJECT},
    "upsertView": _view,
}
