"""A server on OpenAI's interface that is wrong in one way: the first part of the path says in which."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-the-right-key"


class Odd(BaseHTTPRequestHandler):
    """What the class holds is that of the one server there is at a time: ``left`` is set when a client leaves while it
    is answered, and ``closing`` ends what waits."""

    protocol_version = "HTTP/1.1"
    left = threading.Event()
    closing = threading.Event()
    busy_once: list[str] = []

    def log_message(self, *arguments) -> None:
        pass

    @property
    def way(self) -> str:
        return self.path.split("/")[1]

    def say(self, status: int, body, kind: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.way == "html":
            self.say(200, "<html>Welcome</html>", "text/html")
        elif self.way == "key" and self.headers["Authorization"] != f"Bearer {KEY}":
            self.say(401, {"error": {"message": f"Wrong: {self.headers['Authorization']}"}})
        else:
            names = {"named": ["left", "/srv/right"], "nothing": []}.get(self.way, ["model"])
            self.say(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        shown = not isinstance(asked["messages"][-1]["content"], str)
        if self.way == "html":
            self.say(200, "<html>Welcome</html>", "text/html")
        elif self.way == "key" and self.headers["Authorization"] != f"Bearer {KEY}":
            self.say(401, {"error": {"message": f"Wrong: {self.headers['Authorization']}"}})
        elif self.way == "unknown":
            self.say(404, {"error": {"message": f"The model `{asked['model']}` does not exist.", "code": 404}})
        elif self.way == "blind" and shown:
            self.say(400, {"error": {"message": "model is not a multimodal model"}})
        elif asked.get("stream"):
            self.stream(asked)
        else:
            told = {"prompt_tokens": 10 + 50 * (shown and self.way != "dropping"), "completion_tokens": 1}
            choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
            self.say(200, self.made(asked, choices=[choice], usage=told | {"total_tokens": 99}))

    def stream(self, asked: dict) -> None:
        errors = {
            "failing": (500, {"error": {"message": "CUDA is lost (device 0)\nTraceback"}}),
            "gateway": (502, "<html>Bad Gateway</html>"),
            "full": (429, {"detail": "queue full"}),
            "long": (400, {"error": {"message": "The maximum context length is 9 tokens, and 12 were given"}}),
            "large": (413, "Request Entity Too Large"),
            "strict": (400, {"object": "error", "message": f"This model reads 5 tokens; key {KEY}"}),
        }
        once = self.way == "once" and asked["messages"][-1]["content"] not in self.busy_once
        if once:
            self.busy_once.append(asked["messages"][-1]["content"])
        if once or self.way in errors:
            self.say(*errors["full" if once else self.way])
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if self.way == "silent":
            self.closing.wait(60)
            return
        self.piece(asked, {"role": "assistant", "content": ""})
        for word in ["One", " two", " three"]:
            self.piece(asked, {"content": word})
        if self.way == "stalling":
            self.closing.wait(60)
        elif self.way == "endless":
            with contextlib.suppress(OSError):
                while not self.closing.wait(0.02):
                    self.piece(asked, {"content": " more"})
            self.left.set()
        elif self.way == "erring":
            self.wfile.write(b'data: {"error": "a "quote" too many"}\n\n')
        elif self.way != "breaking":
            self.piece(asked, {}, "stop")
            self.event(self.made(asked, choices=[], usage=dict(prompt_tokens=9, completion_tokens=7, total_tokens=16)))
            self.wfile.write(b"data: [DONE]\n\n")

    def piece(self, asked: dict, delta: dict, reason: str | None = None) -> None:
        self.event(self.made(asked, choices=[{"index": 0, "delta": delta, "finish_reason": reason}]))

    def event(self, body: dict) -> None:
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
        self.wfile.flush()

    @staticmethod
    def made(asked: dict, **more) -> dict:
        return {"id": "1", "created": 1, "object": "chat.completion", "model": asked["model"], **more}


@contextlib.contextmanager
def odd_server():
    """Yields its address; the way in which it is wrong is to follow, as in ``ADDRESS/silent/v1``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    server.daemon_threads = True
    Odd.closing.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        Odd.closing.set()
        server.shutdown()
        server.server_close()
