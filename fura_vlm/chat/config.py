"""The configuration of a chat. Light: the command line reads it before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ChatConfig:
    """Talk with a model, about a picture if it takes any, in the terminal or in the browser.

    Args:
        image: the picture to talk about in the terminal; a language model takes none.
        model: a run folder, an adapter, or a model (a folder or a name on the hub); by default the newest run in
            runs/, or else the embedded model. With --server the name of one of its models, by default the first.
        adapters: more runs or adapters over the same base, to choose from in the browser.
        server: the address of a server that speaks OpenAI's interface, such as http://localhost:8000 (vLLM, SGLang,
            transformers serve): its models answer, and none is loaded here.
        server_key: the name of the environment variable that holds the server's key; by default none is sent.
        web: open the chat in the browser.
        question: ask this one question in the terminal and end; by default, questions are read from the terminal.
        max_new_tokens: the most tokens of an answer.
        host: the address to listen on; with the default, only this machine can connect.
        port: the port to listen on.
        allowed_hosts: other host names by which browsers may open the chat, such as chat.example.org or *.example.org
            behind a proxy; IP addresses, localhost and this machine's own name always work.
        auth: the browser asks for this NAME:PASSWORD.
        share: make a public link through Gradio's servers.
        max_users: the most answers that are written at the same time.
        max_waiting: the most questions that wait for their turn; further ones are refused.
    """

    image: str | None = None
    model: str | None = None
    adapters: list[str] = field(default_factory=list)
    server: str | None = None
    server_key: str | None = None
    web: bool = False
    question: str | None = None
    max_new_tokens: int = 256
    host: str = "127.0.0.1"
    port: int = 7860
    allowed_hosts: list[str] = field(default_factory=list)
    auth: str | None = None
    share: bool = False
    max_users: int = 24
    max_waiting: int = 64
