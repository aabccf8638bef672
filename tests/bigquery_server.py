"""A stand-in for BigQuery's REST API, spoken to by Google's own client: datasets, tables, views and insertAll.

What it refuses and how it says so is BigQuery's: missing columns, types, rows of more than a request may have.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import duckdb

from extproc.settings import Dataset
from extproc.usage import views
from extproc.usage.bigquery_schema import TABLES

MAX_BYTES = 10 * 2**20
DATASET = Dataset("my-project", "llm")

_PATH = re.compile(r"/bigquery/v2/projects/([^/]+)/datasets(?:/([^/]+)(?:/tables(?:/([^/]+)(/insertAll)?)?)?)?$")


@dataclass
class Fault:
    """What becomes of one insertAll: a status instead of an answer, time, or the answer lost after the rows went in."""

    status: int = 0
    delay_s: float = 0.0
    lost: bool = False


@dataclass
class FakeBigQuery:
    """`rows` by table as they would be stored, `inserts` each insertAll's rows. `fault` is asked before each.

    `forgets` row ids, as BigQuery does after a minute. `stops`: so many insertAlls don't honour skipInvalidRows.
    """

    forgets: bool = False
    stops: int = 0
    max_bytes: int = MAX_BYTES
    fault: Callable[[], Fault | None] = lambda: None
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    inserts: list[list[dict[str, Any]]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    largest_bytes: int = 0  # of an insertAll, refused or not
    port: int = 0
    _ids: set[tuple[str, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes `tollgate` use it."""
        store = f"bigquery://{DATASET.project}/{DATASET.name}"
        return {"TOLLGATE_USAGE_STORE": store, "TOLLGATE_BIGQUERY_ENDPOINT": self.url}

    def start(self) -> FakeBigQuery:
        self._server = _Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuses connections meanwhile."""
        self.close()
        try:
            yield
        finally:
            self.start()

    def create_tables(self) -> None:
        """As `tollgate bigquery apply` would."""
        for table in TABLES:
            self.tables[table.name] = {"schema": {"fields": [one.to_api_repr() for one in table.fields()]}}

    def drop_column(self, table: str, column: str) -> None:
        fields = self.tables[table]["schema"]["fields"]
        fields[:] = [one for one in fields if one["name"] != column]

    def ids(self) -> list[str]:
        """Of the rows of `usage_log`, sorted; one that is there twice twice."""
        return sorted(row["request_id"] for row in self.rows.get("usage_log", ()))

    def usage(self) -> dict[str, int]:
        """Cost by request, as the view `usage` has them. Raises where that has a request twice."""
        (view,) = (view for view in views.load() if view.name == "usage")
        with duckdb.connect() as db:
            names = ("request_id", "ts", "cost_nanousd", "orphan", "duration_ms")
            types = ("TEXT", "TIMESTAMP", "BIGINT", "BOOL", "BIGINT")
            columns = ", ".join(f"{name} {type_}" for name, type_ in zip(names, types, strict=True))
            db.execute(f"CREATE TABLE usage_log ({columns})")
            for row in self.rows.get("usage_log", ()):
                db.execute("INSERT INTO usage_log VALUES (?, ?, ?, ?, ?)", [row[name] for name in names])
            found = db.execute(f"SELECT request_id, cost_nanousd FROM ({views.for_duckdb(view)})").fetchall()
        costs = dict(found)
        assert len(costs) == len(found)
        return costs

    # What a request is answered with ----------------------------------------------------------------------------------

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any] | None:
        """Status and JSON; None for a connection that is closed instead."""
        match = _PATH.match(path.partition("?")[0])
        if match is None:
            return _error(404, "notFound", f"no such path: {path}")
        _, dataset, table, inserting = match.groups()
        if inserting:
            return self._insert_all(table, body)
        with self._lock:
            self.asked.append(f"{method} {table or dataset or 'dataset'}")
            return self._resource(method, dataset, table, json.loads(body or b"{}"))

    def _resource(self, method: str, dataset: str | None, table: str | None, body: Any) -> tuple[int, Any]:
        match method:
            case "GET":
                found = self.tables.get(table) if table else self.datasets.get(dataset or "")
                if found is None:
                    return _error(404, "notFound", f"Not found: {'Table' if table else 'Dataset'} {table or dataset}")
                return 200, self._described(found, dataset, table)
            case "POST" if dataset is None:
                name = body["datasetReference"]["datasetId"]
                self.datasets[name] = body
                return 200, body
            case "POST" if dataset not in self.datasets:
                return _error(404, "notFound", f"Not found: Dataset {dataset}")
            case "POST":
                table = body["tableReference"]["tableId"]
                self.tables[table] = body
                return 200, self._described(body, dataset, table)
            case "PATCH" if table in self.tables:
                for name in body:
                    if name in ("schema", "view"):
                        self.tables[table][name] = body[name]
                return 200, self._described(self.tables[table], dataset, table)
        return _error(400, "invalid", f"{method} is not known here")

    def _described(self, found: dict[str, Any], dataset: str | None, table: str | None) -> dict[str, Any]:
        if table is None:
            return found
        reference = {"projectId": DATASET.project, "datasetId": dataset, "tableId": table}
        return {"type": "VIEW" if "view" in found else "TABLE", **found, "tableReference": reference}

    def _insert_all(self, table: str, body: bytes) -> tuple[int, Any] | None:
        fault = self.fault() or Fault()
        time.sleep(fault.delay_s)
        if fault.status:
            return _error(fault.status, "backendError", "it is out of order")
        self.largest_bytes = max(self.largest_bytes, len(body))
        if len(body) > self.max_bytes:
            return _error(413, "uploadTooLarge", "Request payload size exceeds the limit")
        if table not in self.tables:
            return _error(404, "notFound", f"Not found: Table {table}")
        request = json.loads(body)
        with self._lock:
            errors = self._insert(table, request)
        return None if fault.lost else (200, {"insertErrors": errors} if errors else {})

    def _insert(self, table: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        fields = {one["name"]: one for one in self.tables[table]["schema"]["fields"]}
        self.inserts.append(request["rows"])
        problems = {index: _problem(fields, row["json"]) for index, row in enumerate(request["rows"])}
        errors = {index: problem for index, problem in problems.items() if problem is not None}
        if errors and (self.stops or not request.get("skipInvalidRows")):
            self.stops -= 1
            errors = {index: problem or {"reason": "stopped"} for index, problem in problems.items()}
        for index, row in enumerate(request["rows"]):
            key = (table, row["insertId"])
            if index not in errors and (self.forgets or key not in self._ids):
                self._ids.add(key)
                self.rows.setdefault(table, []).append(row["json"])
        return [{"index": index, "errors": [problem]} for index, problem in errors.items()]


def _error(status: int, reason: str, message: str) -> tuple[int, Any]:
    return status, {"error": {"code": status, "message": message, "errors": [{"reason": reason, "message": message}]}}


def _problem(fields: dict[str, dict[str, Any]], row: dict[str, Any]) -> dict[str, str] | None:
    """BigQuery names the first one."""
    for name, value in row.items():
        if name not in fields:
            return {"reason": "invalid", "location": name, "debugInfo": "", "message": f"no such field: {name}."}
        if value is not None and not _fits(value, fields[name]["type"]):
            return {"reason": "invalid", "location": name, "message": f"Cannot convert value to {fields[name]['type']}"}
    for name, one in fields.items():
        if one.get("mode") == "REQUIRED" and row.get(name) is None:
            return {"reason": "invalid", "location": name, "message": f"Missing required field: {name}."}
    return None


def _fits(value: Any, type_: str) -> bool:
    match type_:
        case "INTEGER":
            return type(value) is int and -(2**63) <= value < 2**63
        case "BOOLEAN":
            return isinstance(value, bool)
        case "TIMESTAMP":
            with suppress(ValueError, TypeError):
                return datetime.fromisoformat(value).year >= 1900
            return False
        case _:
            return isinstance(value, str)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], fake: FakeBigQuery) -> None:
        self.fake = fake
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        answer = cast(_Server, self.server).fake.answer(self.command, self.path, body)
        if answer is None:
            self.close_connection = True
            return
        status, content = answer
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = _respond  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
