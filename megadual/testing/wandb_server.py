"""A wandb server on loopback that keeps what wandb's own client sends: enough of GraphQL, file_stream and uploads.

The client finds it through WANDB_BASE_URL and takes any WANDB_API_KEY of 40 characters.
"""

import contextlib
import dataclasses
import gzip
import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = "megadual"


@dataclasses.dataclass
class Run:
    """What the server holds of a run id. The client says which place a line of history, events or output has."""

    project: str
    id: str
    name: str | None = None
    group: str | None = None
    config: dict = dataclasses.field(default_factory=dict)
    lines: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of files that grow, by their names
    summary: str = "{}"
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def history(self) -> list[dict]:
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    def put(self, file: str, offset: int, content: list[str]) -> None:
        """A line for a place that is taken replaces what was there: the client sends again what was not answered."""
        if file == "wandb-summary.json":
            self.summary = content[-1]
            return
        lines = self.lines.setdefault(file, [])
        assert offset <= len(lines), f"{file}: lines from {offset} on, but only {len(lines)} are there"
        lines[offset : offset + len(content)] = content


class WandbServer:
    """Listens from `start` to `stop`, always on the same port, and keeps what it holds; `with` does both."""

    def __init__(self):
        self.runs: dict[str, Run] = {}
        self.lock = threading.Lock()
        self.connections: set[socket.socket] | None = None  # while it listens
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.connections = set()
        self.http = _Http(("127.0.0.1", self.port), _Handler)
        self.http.wandb, self.port = self, self.http.server_port
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Refuse connections from now on, and break those there are."""
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):  # its client may have left
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_) -> None:
        if self.connections is not None:
            self.stop()

    def answer(self, operation: str, variables: dict) -> dict | None:
        """The data of one GraphQL request; None to one that it does not know."""
        project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": ENTITY}}
        match operation:
            case "RunResumeStatus":
                run = self.runs.get(variables["name"])
                return {"model": {**project, "bucket": run and _resume_status(run)}}
            case "UpsertBucket":
                run = self.runs.setdefault(variables["name"], Run(variables["project"], variables["name"]))
                run.name = variables["displayName"] or run.name
                run.group = variables["groupName"] or run.group
                run.config = json.loads(variables["config"] or "null") or run.config
                bucket = {**_described(run), "description": None, "sweepName": None, "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": variables["id"] is None}}
            case "CreateRunFiles":
                run, names = variables["run"], variables["files"]
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in names]
                return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": None}
        return None


def _described(run: Run) -> dict:
    return {
        "id": run.id,
        "name": run.id,
        "displayName": run.name,
        "config": json.dumps(run.config),
        "historyLineCount": len(run.lines.get("wandb-history.jsonl", [])),
    }


def _resume_status(run: Run) -> dict:
    history, events, output = (
        run.lines.get(name, []) for name in ("wandb-history.jsonl", "wandb-events.jsonl", "output.log")
    )
    return {
        **_described(run),
        "summaryMetrics": run.summary,
        "historyTail": json.dumps(history[-1:]),
        "eventsTail": json.dumps(events[-1:]),
        "eventsLineCount": len(events),
        "logLineCount": len(output),
        "tags": [],
        "notes": None,
        "wandbConfig": json.dumps({"t": 1}),  # that it has been started
    }


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    wandb: WandbServer

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # clients that are killed leave broken connections
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.wandb = self.server.wandb
        with self.wandb.lock:
            if self.wandb.connections is None:
                raise ConnectionAbortedError
            self.wandb.connections.add(self.connection)

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            with self.wandb.lock:
                data = self.wandb.answer(request["operationName"], request.get("variables") or {})
            self._reply({"data": data} if data else {"errors": [{"message": f"unknown: {request['operationName']}"}]})
        elif self.path.endswith("/file_stream"):  # /files/ENTITY/PROJECT/RUN/file_stream
            run = self.path.split("/")[-2]
            with self.wandb.lock:
                for name, chunk in json.loads(body).get("files", {}).items():
                    self.wandb.runs[run].put(name, chunk["offset"], chunk["content"])
            self._reply({})
        else:
            self._reply({})  # telemetry

    def do_PUT(self) -> None:
        _, _, run, name = self.path.split("/", 3)  # /upload/RUN/NAME
        body = self._body()
        with self.wandb.lock:
            self.wandb.runs[run].files[name] = body
        self._reply({})

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
