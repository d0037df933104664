"""Downloads from a server of our own, which keeps, breaks and changes its word as it is told to."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from fura_vlm.data import download as module
from fura_vlm.data.config import DownloadConfig
from fura_vlm.data.download import DownloadError, download, read_recipe
from fura_vlm.shipped import ShippedError

COMMAND = [str(Path(sys.executable).with_name("fura-vlm")), "data", "llava-665k"]
ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """Files by path, sent with ranges (RFC 9110), and what goes wrong with them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.tags = True
        self.says_size = True  # of the whole file, where a part of it is sent
        self.break_after: list[int] = []  # bytes sent to the next requests before the connection is cut
        self.busy = 0  # requests answered with 503
        self.pace = 0.0  # seconds between pieces of 64 kB
        self.log: list[tuple[str, str, str | None]] = []
        self.sent = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *arguments):
        pass

    def answer(self, body):
        server, wanted = self.server, self.headers.get("Range")
        server.log.append((self.command, self.path, wanted))
        content = server.files.get(self.path)
        if server.busy and body:
            server.busy -= 1
            return self.head(503, {"Content-Length": "0"})
        if content is None:
            return self.head(404, {"Content-Length": "0"})
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        headers = {"X-Repo-Commit": "0" * 40} | ({"ETag": tag} if server.tags else {})
        start, status = 0, 200
        if wanted and server.ranges and self.headers.get("If-Range", tag) == tag:
            start, status = int(re.fullmatch(r"bytes=(\d+)-(\d+)?", wanted)[1]), 206
            if start >= len(content):
                return self.head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            size = len(content) if server.says_size else "*"
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{size}"
        self.head(status, headers | {"Content-Length": str(len(content) - start)})
        if not body:
            return
        end = len(content)
        if server.break_after:
            end = min(end, start + server.break_after.pop(0))
            self.close_connection = True
        try:
            for at in range(start, end, 1 << 16):
                piece = content[at : min(end, at + (1 << 16))]
                self.wfile.write(piece)
                server.sent += len(piece)
                time.sleep(server.pace)
        except ConnectionError:
            self.close_connection = True

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(module, "_AGAIN", module._AGAIN.new(backoff_factor=0))
    monkeypatch.setattr(module, "_AGAIN_LATER", module._AGAIN_LATER.new(backoff_factor=0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


PICTURES = {f"train2017/{number}.jpg": os.urandom(50_000) for number in range(30)}
BOOKS = {f"{number // 5}/{number}.jpg": os.urandom(2000) for number in range(20)}


@pytest.fixture
def coco(server):
    """The first source: an archive of 1.5 MB."""
    content = server.files["/train2017.zip"] = pack(PICTURES | {"readme.txt": b"hello", "other/1.jpg": b"not wanted"})
    return {
        "url": f"{server.address}/train2017.zip",
        "size": len(content),
        "md5": hashlib.md5(content).hexdigest(),
        "images": 30,
        "inside": "train2017",
        "folder": "coco/train2017",
    }


@pytest.fixture
def run(server, tmp_path, coco):
    """Downloads a recipe of two archives; what is on the hub is there already."""
    server.files["/images.zip"] = pack(BOOKS)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mix.json").write_text("[]")

    def go(**settings):
        recipe = {
            "name": "mix",
            "mixture": {"path": "mix.json", "hub": "nobody/nothing", "records": 3},
            "image_folder": ".",
            "sources": {
                "coco": {"licence": "free", "archives": [coco]},
                "books": {
                    "licence": "free",
                    "archives": [{"url": f"{server.address}/images.zip", "inside": "", "folder": "books"}],
                },
                "covers": {"licence": "theirs", "folder": "covers/images", "by_hand": "Put them into OUTPUT/covers."},
            },
        }
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        download(DownloadConfig(str(tmp_path / "mix.yaml"), str(out), **settings))
        return out

    return go


def whole(out: Path) -> bool:
    """All pictures are there, and nothing else."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    expected = {f"coco/{name}": content for name, content in PICTURES.items()}
    expected |= {f"books/{name}": content for name, content in BOOKS.items()} | {"mix.json": b"[]"}
    return found == expected


def gets(server, path="/train2017.zip"):
    return [wanted for method, asked, wanted in server.log if method == "GET" and asked == path]


# ---------------------------------------------------------------------------------------------------- all goes well


def test_download_and_unpack(run, server, capsys):
    out = run()
    assert whole(out)
    shown = capsys.readouterr().out
    assert f"covers has to be fetched by hand:\nPut them into {out}/covers." in shown
    assert f"fura-vlm data verify {out}/mix.json --image_folder {out}" in shown.replace("\n", "")
    assert len(gets(server)) == len(gets(server, "/images.zip")) == 1

    asked = len(server.log)
    run()
    assert len(server.log) == asked and whole(out)  # it is all there


def test_archives_are_kept_if_one_wants(run, coco):
    out = run(keep_archives=True, sources=["coco"])
    assert (out / "coco/train2017.zip").stat().st_size == coco["size"]
    assert not (out / "books").exists()


def test_what_is_there_is_left_alone(run, server, tmp_path):
    """Many have COCO already, and a link to it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number in range(30):
        (elsewhere / f"{number}.jpg").touch()
    (tmp_path / "out/coco").mkdir()
    (tmp_path / "out/coco/train2017").symlink_to(elsewhere)
    run()
    assert not gets(server)
    (elsewhere / "7.jpg").unlink()
    with pytest.raises(DownloadError, match="coco/train2017 holds 29 files, but 30 are published: complete it"):
        run()


def test_a_link_to_what_is_not_there(run, server, tmp_path):
    """Of a disk that is not mounted, for example."""
    (tmp_path / "out/coco").mkdir()
    (tmp_path / "out/coco/train2017").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DownloadError, match="coco/train2017 is a file or a broken link: correct or"):
        run()
    assert not server.log


# --------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("tags", [True, False])
def test_lost_connections(run, server, tags):
    server.break_after, server.tags = [100_000, 0, 700_000, 1, 65_536], tags
    assert whole(run(workers=1))
    [first, *rest] = gets(server)
    assert first is None and all(rest)
    assert server.sent < sum(map(len, server.files.values())) + 1_000  # nothing twice


def test_a_server_that_does_not_say_the_size(run, server):
    """RFC 9110, section 14.4: an asterisk stands for a size that is not known."""
    server.break_after, server.says_size = [400_000], False
    assert whole(run(workers=1))


def test_a_server_without_ranges(run, server):
    server.break_after, server.ranges = [400_000], False
    assert whole(run(workers=1))


def test_a_busy_server(run, server):
    server.busy = 3
    assert whole(run())


def test_going_on_in_another_process(run, server, coco, monkeypatch):
    monkeypatch.setattr(module, "_AGAIN", module._AGAIN.new(total=0))
    server.break_after = [600_000]
    with pytest.raises(DownloadError, match="cannot be downloaded .*: start the same command again to go on"):
        run(sources=["coco"])
    run(sources=["coco"])
    assert gets(server) == [None, "bytes=600000-"]
    server.files["/train2017.zip"] = b"changed"
    assert whole(run())


def test_the_file_changes_in_between(run, server, coco, monkeypatch):
    monkeypatch.setattr(module, "_AGAIN", module._AGAIN.new(total=0))
    old = server.files["/train2017.zip"]
    server.files["/train2017.zip"] = os.urandom(len(old))
    server.break_after = [600_000]
    with pytest.raises(DownloadError, match="cannot be downloaded"):
        run(sources=["coco"])
    server.files["/train2017.zip"] = old
    assert whole(run())
    assert gets(server) == [None, "bytes=600000-"]  # the answer is the whole new file


def test_unpacking_goes_on(run, server, coco, tmp_path, monkeypatch):
    copy, done = module.shutil.copyfileobj, []

    def interrupted(source, file, length):
        if len(done) == 12:
            file.write(b"half")
            raise KeyboardInterrupt
        done.append(file.name)
        copy(source, file, length)

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfileobj", interrupted)
        with pytest.raises(SystemExit):
            run(sources=["coco"])
    assert not (tmp_path / "out/coco/train2017").exists()
    times = {name: os.stat(name).st_mtime_ns for name in done}
    # The archive and what is unpacked of it take room already: what is left has to do for the rest, and it does.
    free = coco["size"] - 12 * 50_000 + len(server.files["/images.zip"])
    usage = module.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    out = run()
    assert whole(out) and len(gets(server)) == 1
    assert all(os.stat(name.replace(".tmp", "")).st_mtime_ns == time for name, time in times.items())


def test_ctrl_c(run, server, tmp_path):
    """As a user meets it: a slow server, Ctrl-C, the same command again."""
    server.pace = 0.2
    with pytest.raises(DownloadError, match="holds 0 files"):  # writes the recipe
        (tmp_path / "out/coco/train2017").mkdir(parents=True)
        run()
    (tmp_path / "out/coco/train2017").rmdir()
    command = [*COMMAND, "--recipe", str(tmp_path / "mix.yaml"), "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while server.sent < 300_000 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Stopped; the same command goes on" in output and "Traceback" not in output
    server.pace = 0
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    assert whole(tmp_path / "out")
    assert gets(server)[-1] is not None


# ------------------------------------------------------------------------------------------------------- bad input


def test_no_such_file(run, server):
    del server.files["/train2017.zip"]
    with pytest.raises(DownloadError, match=r"/train2017.zip answers 404 Not Found: check whether it has moved"):
        run()


def test_no_server(run, coco):
    coco["url"] = "http://127.0.0.1:1/train2017.zip"
    with pytest.raises(DownloadError, match=r"cannot be downloaded \(.*refused.*\): start the same command again"):
        run()


def test_a_server_that_stays_busy(run, server):
    server.busy = 100
    with pytest.raises(DownloadError, match=r"cannot be downloaded \(too many 503 .*\): try again later"):
        run()


def test_another_size_than_published(run, coco, tmp_path):
    size, coco["size"] = coco["size"], 5
    with pytest.raises(DownloadError, match=f"has {size:,} bytes, but 5 are published: it is another file"):
        run()
    assert not (tmp_path / "out/coco/train2017.zip").exists()


def test_another_sum_than_published(run, coco, tmp_path):
    coco["md5"] = "0" * 32
    with pytest.raises(DownloadError, match=f"train2017.zip has another MD5 sum than the published {'0' * 32}"):
        run()
    assert not list((tmp_path / "out").rglob("train2017.zip*"))


def test_a_damaged_archive(run, server, coco, tmp_path):
    good = server.files["/train2017.zip"]
    at = good.index(PICTURES["train2017/7.jpg"])
    server.files["/train2017.zip"] = good[:at] + b"\0" + good[at + 1 :]
    coco["md5"] = None
    with pytest.raises(DownloadError, match=r"is damaged \(Bad CRC-32.*\); it has been removed: start the same"):
        run()
    assert not (tmp_path / "out/coco/train2017").exists()
    server.files["/train2017.zip"] = good
    assert whole(run())


@pytest.mark.parametrize("content", [b"<html>gone</html>", b""])
def test_no_archive_at_all(run, server, coco, content):
    server.files["/train2017.zip"] = content
    coco.update(size=None, md5=None)
    with pytest.raises(DownloadError, match="is damaged|cannot be downloaded"):
        run()


def test_another_folder_in_the_archive(run, coco):
    coco["inside"] = "train2014"
    with pytest.raises(DownloadError, match="has no folder train2014; it has other, readme.txt, train2017: correct"):
        run()


def test_an_archive_that_leads_out(run, server, coco, tmp_path):
    server.files["/train2017.zip"] = pack({"train2017/../../../evil": b"x"})
    coco.update(size=None, md5=None)
    with pytest.raises(DownloadError, match="holds the path '"):
        run()
    assert not list(tmp_path.rglob("evil"))


def test_no_room(run, server, coco):
    coco["size"] = 10**18
    with pytest.raises(DownloadError, match="needs about 2,000,000,000.0 GB more, and .* GB are free: make room"):
        run()
    assert not gets(server)


def test_unknown_source_and_recipe(run, tmp_path):
    with pytest.raises(DownloadError, match="has no source 'cocoa': choose from coco, books, covers"):
        run(sources=["cocoa"])
    with pytest.raises(ShippedError, match="There is no data recipe at nowhere.yaml, .* llava-558k, llava-665k$"):
        download(DownloadConfig("nowhere.yaml"))
    (tmp_path / "bad.yaml").write_text("name: x\nsources: {a: {licence: b, sise: 3}}\n")
    with pytest.raises(DownloadError, match="bad.yaml is no data recipe .*'sise'"):
        download(DownloadConfig(str(tmp_path / "bad.yaml")))
    (tmp_path / "bad.yaml").write_text("sources: {a: {licence: b, archives: [{folder: f, inside: x, hub: o/s}]}}\n")
    with pytest.raises(DownloadError, match="the archive of f needs either url, or hub and file"):
        download(DownloadConfig(str(tmp_path / "bad.yaml")))
    (tmp_path / "bad.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(DownloadError, match="bad.yaml is no data recipe .*'utf-8' codec"):
        download(DownloadConfig(str(tmp_path / "bad.yaml")))


# --------------------------------------------------------------------------------------------------------- the hub


def test_annotations_come_from_the_hub(server, tmp_path):
    """The hub's own client, told to ask our server."""
    content = json.dumps([{"id": "1"}] * 1000).encode()
    server.files["/datasets/owner/set/resolve/main/mix.json"] = content
    server.files["/datasets/owner/set/resolve/main/images.zip"] = pack(BOOKS)
    archive = {"hub": "owner/set", "file": "images.zip", "inside": "", "folder": "images"}
    recipe = {
        "name": "mix",
        "mixture": {"path": "mix.json", "hub": "owner/set", "records": 1000},
        "image_folder": "images",
        "sources": {"images": {"licence": "free", "archives": [archive]}},
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [*COMMAND, "--recipe", str(tmp_path / "mix.yaml"), "--output_dir", str(tmp_path / "mix")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mix/mix.json").read_bytes() == content
    assert all((tmp_path / "mix/images" / name).read_bytes() == content for name, content in BOOKS.items())
    assert not (tmp_path / "mix/images.zip").exists()

    (tmp_path / "mix/mix.json").unlink()
    del server.files["/datasets/owner/set/resolve/main/mix.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "mix.json of owner/set cannot be fetched from the hub (" in done.stderr

    server.files["/datasets/owner/set/resolve/main/mix.json"] = content
    server.break_after = [1000] * 50
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "mix.json of owner/set cannot be fetched from the hub (" in done.stderr
    server.break_after.clear()
    assert subprocess.run(command, capture_output=True, timeout=120, env=environment).returncode == 0
    assert (tmp_path / "mix/mix.json").read_bytes() == content


@pytest.mark.parametrize("name, images", [("llava-665k", 5), ("llava-558k", 1)])
def test_the_published_recipes(name, images):
    recipe = read_recipe(ROOT / f"data/{name}.yaml")
    assert recipe.name == name and len(recipe.sources) == images
    folders = [folder for source in recipe.sources.values() for folder in source.folders()]
    assert len(set(folders)) == len(folders) >= images
    for source in recipe.sources.values():
        assert source.licence and (source.archives or source.by_hand)
        for archive in source.archives:
            assert archive.name.endswith(".zip") and bool(archive.url) != bool(archive.hub)
