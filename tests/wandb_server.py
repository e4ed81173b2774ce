"""A W&B server as far as ``wandb.Api().runs`` needs one: GraphQL over HTTP on this machine, a page of a project's runs at a time."""

import json
import re
from base64 import b64encode
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

KEY = "0" * 40
AUTHORIZATION = "Basic " + b64encode(f"api:{KEY}".encode()).decode()


class Server(ThreadingHTTPServer):
    """``projects``: "ENTITY/PROJECT" -> runs, each {"name", "displayName", "state", "group", "config", "summary"}, or
    a text, why it is refused; ``asked``: operations."""

    daemon_threads = True

    def __init__(self, projects: dict[str, list[dict[str, Any]] | str], page: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.projects, self.page, self.asked = projects, page, []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/graphql":
            return self._send(404, b"")
        if self.headers.get("Authorization") != AUTHORIZATION:
            return self._send(401, b'{"errors": [{"message": "no such key"}]}')
        asked = json.loads(content)
        operation = re.search(r"\b(?:query|mutation)\s+(\w+)", asked["query"])
        self.server.asked.append(operation.group(1) if operation else asked["query"])
        self._send(200, json.dumps(self._answer(asked["query"], asked.get("variables") or {})).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "viewer" in query:
            user = {"id": "u", "entity": "us", "username": "us", "flags": "{}", "email": None, "admin": False}
            return {"data": {"viewer": user | {"teams": {"edges": []}}}}
        if "runs(" not in query:
            return {"errors": [{"message": f"not served here: {query}"}]}
        runs = self.server.projects.get(f"{variables['entity']}/{variables['project']}")
        if isinstance(runs, str):
            return {"errors": [{"message": runs}]}
        if runs is None:
            return {"data": {"project": None}}
        start = int(variables.get("cursor") or 0)
        shown = runs[start : start + min(self.server.page, variables.get("perPage") or 50)]
        edges = [{"node": _node(run, "summaryMetrics" in query), "cursor": str(start + i + 1)} for i, run in enumerate(shown)]
        end = start + len(shown)
        page = {"edges": edges, "pageInfo": {"endCursor": str(end), "hasNextPage": end < len(runs)}}
        return {"data": {"project": {"internalId": "1", "runCount": len(runs), "readOnly": False, "runs": page}}}


def _node(run: dict[str, Any], whole: bool) -> dict[str, Any]:
    """A run as W&B sends it: configuration and summary are texts of JSON, each setting under ``value``."""
    told = {key: run[key] for key in ("name", "displayName", "state", "group")}
    node = {"id": run["name"], "projectId": "1", "tags": [], "sweepName": None, "jobType": "train", "commit": None, "readOnly": False}
    node |= {"createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00", "description": None, "notes": None}
    node |= {"historyLineCount": 1, "user": {"name": "us", "username": "us"}, **told}
    if whole:
        config = {"_wandb": {"value": {"cli_version": "0"}}, **{key: {"desc": None, "value": v} for key, v in run["config"].items()}}
        node |= {"config": json.dumps(config), "summaryMetrics": json.dumps(run["summary"]), "systemMetrics": "{}", "historyKeys": None}
    return node


@contextmanager
def serving(projects: dict[str, list[dict[str, Any]] | str], page: int = 50):
    """The server and the environment of a process that asks it."""
    server = Server(projects, page)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
    finally:
        server.shutdown()
        server.server_close()
