"""A real server on loopback that speaks OpenAI's chat-completions protocol, and misbehaves."""

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-moonroot-0123456789"
"""The key that clients of the tests send; it must turn up nowhere but in the server's ears."""

FAULTS = (
    "429",
    "500",
    "408",
    "hang",
    "reset",
    "garbage",
    "no choices",
    "no score",
    "score 9",
    "score 0",
)
_ANSWER = re.compile(r"BEGIN ANSWER \w+\n(.*)\nEND ANSWER", re.DOTALL)

Plan = Callable[[str, int], str | None]
"""Takes the judged answer and the number of the attempt (from 1); returns a fault, or None."""


def clean(answer: str, attempt: int) -> str | None:
    """Nothing goes wrong."""
    return None


def three_in_ten(answer: str, attempt: int) -> str | None:
    """Goes wrong in 30 % of all attempts, always the same ones."""
    draw = int(hashlib.sha256(f"petal {attempt} {answer}".encode()).hexdigest(), 16)
    return FAULTS[draw // 100 % len(FAULTS)] if draw % 100 < 30 else None


def true_verdict(answer: str) -> tuple[int, bool]:
    """Score and coherence that the server gives `answer` when nothing goes wrong."""
    draw = int(hashlib.sha256(answer.encode()).hexdigest(), 16)
    return 1 + draw % 5, draw % 7 != 0


class ChatServer(ThreadingHTTPServer):
    """Counts what it is asked.

    Attributes: `requests` bodies in order, `keys` the Authorization headers seen, `most_at_once`
    the largest number of requests that were under way together; `refused_forms` types of
    `response_format` that it does not take.
    """

    daemon_threads = True

    def __init__(self, plan: Plan, before: Callable[[], object] = lambda: None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan = plan
        self.before = before
        self.lock = threading.Lock()
        self.requests: list[dict] = []
        self.keys: set[str] = set()
        self.attempts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.refused_forms: tuple[str, ...] = ()
        self.at_once = 0
        self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Connections that clients gave up are part of the game."""


@contextmanager
def serving(plan: Plan = clean, before: Callable[[], object] = lambda: None):
    """A running server; `before` is called in every request that is under way."""
    with ChatServer(plan, before) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = _ANSWER.search(body["messages"][-1]["content"])[1]
        with server.lock:
            server.requests.append(body)
            server.keys.add(self.headers["Authorization"])
            server.attempts[answer] += 1
            attempt = server.attempts[answer]
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        server.before()
        fault = server.plan(answer, attempt)
        with server.lock:
            server.faults[fault or "none"] += 1
            # Before the reply: with it the client may already send the next request.
            server.at_once -= 1
        form = body.get("response_format", {}).get("type")
        if form in server.refused_forms:
            fault = "bad form"
        if self.path != "/v1/chat/completions":
            fault = "404"
        self._reply(fault, answer)

    def _reply(self, fault, answer):
        score, coherent = true_verdict(answer)
        verdict = json.dumps({"reason": "because", "score": score, "coherent": coherent})
        # Servers like to quote what they were sent.
        gossip = f"you sent {self.headers['Authorization']}"
        if fault == "hang":
            self.connection.recv(1)  # Until the client hangs up.
            self.close_connection = True
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        elif fault == "garbage":
            self._send(200, '{"choices": [{"message": ' + gossip)
        elif fault == "no choices":
            self._send(200, json.dumps({"choices": [], "note": gossip}))
        elif fault == "no score":
            self._send(200, _completion(f"I would rather talk about pancakes. {gossip}"))
        elif fault in ("score 9", "score 0"):
            score = fault.removeprefix("score ")
            self._send(200, _completion(f'{{"score": {score}, "coherent": true}}'))
        elif fault == "cut off":
            self._send(200, _completion(verdict, "length"))
        elif fault == "bad form":
            error = {"message": "This model does not support `response_format`", "code": "x"}
            self._send(400, json.dumps({"error": error}))
        elif fault is None:
            self._send(200, _completion(verdict))
        else:
            headers = {"Retry-After": "0.01"} if fault == "429" else {}
            error = json.dumps({"error": {"message": gossip, "code": "x"}})
            self._send(int(fault), error, headers)

    def _send(self, status, text, headers=None):
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _completion(text, finish_reason="stop"):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]})
