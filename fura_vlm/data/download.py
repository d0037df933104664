"""Published mixtures: annotations and images, downloaded and unpacked as a recipe says.

A recipe is a YAML file::

    name: llava-665k
    mixture: {path: FILE.json, hub: OWNER/DATASET, records: N}
    image_folder: "."                   where the mixture's image paths start, within the output folder
    sources:
      coco:
        licence: words for people
        archives:                       each becomes one folder
          - url: http://...             or  hub: OWNER/DATASET  and  file: NAME
            size: bytes                 these three where they are published
            md5: hexadecimal
            images: number
            inside: train2017           the folder in the archive, "" for all of it
            folder: coco/train2017      what it becomes
      ocr_vqa:
        licence: ...
        folder: ocr_vqa/images
        by_hand: what to do, where nothing can be downloaded

Everything is written under a temporary name first (``.part``, ``.tmp``): what has its final name is whole. The same
command goes on where an interruption has stopped it, and leaves alone what is there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import requests
import yaml
from requests.adapters import HTTPAdapter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util import Retry

from fura_vlm.data.config import DownloadConfig
from fura_vlm.errors import FuraVLMError, first_line
from fura_vlm.files import finish, unfinished
from fura_vlm.shipped import find

_PIECE = 1 << 20  # bytes
_TIMEOUT = (15, 60)  # seconds to connect, and between two pieces
_AGAIN = Retry(total=6, backoff_factor=1)  # after a lost connection; it gives up after a minute
_AGAIN_LATER = Retry(
    total=None, connect=0, read=0, status=6, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504)
)


class DownloadError(FuraVLMError):
    """A recipe, server, archive or disk that cannot be used. The message is one sentence with the way out."""


@dataclass(frozen=True)
class Archive:
    """A ZIP file and the folder it becomes; see the module's description of a recipe."""

    folder: str
    inside: str
    url: str | None = None
    hub: str | None = None
    file: str | None = None
    size: int | None = None
    md5: str | None = None
    images: int | None = None

    def __post_init__(self):
        if not (self.url or self.hub and self.file):
            raise TypeError(f"the archive of {self.folder} needs either url, or hub and file")

    @property
    def name(self) -> str:
        return self.file or self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """One set of images."""

    licence: str
    archives: list[Archive] = field(default_factory=list)
    folder: str | None = None
    by_hand: str | None = None
    images: int | None = None

    def folders(self) -> dict[str, int | None]:
        """The folders of the source, with the published number of images."""
        own = {self.folder: self.images} if self.folder else {}
        return own | {archive.folder: archive.images for archive in self.archives}


@dataclass(frozen=True)
class Mixture:
    """The annotations: a file of a data set on the hub."""

    path: str
    hub: str
    records: int


@dataclass(frozen=True)
class Recipe:
    """What ``data/*.yaml`` says."""

    name: str
    mixture: Mixture
    image_folder: str
    sources: dict[str, Source]


def read_recipe(path: str | os.PathLike) -> Recipe:
    """Reads a recipe.

    Raises:
        DownloadError: if it is not in the format.
    """
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
        sources = {
            name: Source(**source | {"archives": [Archive(**archive) for archive in source.get("archives", [])]})
            for name, source in content.pop("sources").items()
        }
        return Recipe(mixture=Mixture(**content.pop("mixture")), sources=sources, **content)
    except (UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise DownloadError(f"{path} is no data recipe ({' '.join(str(error).split())})") from error


# ---------------------------------------------------------------------------------------------------- all of it


def download(config: DownloadConfig) -> None:
    """Downloads and unpacks what a recipe names, and says what is there and what is left to do by hand.

    Raises:
        ShippedError: there is no such recipe.
        DownloadError: in one sentence.
        SystemExit: 130 after Ctrl-C; the same command goes on.
    """
    recipe = read_recipe(find("data recipe", config.recipe))
    output = Path(config.output_dir or Path("data", recipe.name))
    chosen = list(recipe.sources) if config.sources is None else config.sources
    for name in chosen:
        if name not in recipe.sources:
            raise DownloadError(f"{config.recipe} has no source {name!r}: choose from {', '.join(recipe.sources)}")
    if config.workers < 1:
        raise DownloadError(f"workers is {config.workers}: give at least 1")
    wanted = [archive for name in chosen for archive in recipe.sources[name].archives if not _is_there(output, archive)]
    session = _session(config.workers)
    _check_space(output, wanted, config.keep_archives, session)
    output.mkdir(parents=True, exist_ok=True)
    try:
        _fetch_from_hub(recipe.mixture.hub, recipe.mixture.path, output)
        _fetch_archives(wanted, output, config, session)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.")
        raise SystemExit(130) from None
    _say(recipe, chosen, output)


def _is_there(output: Path, archive: Archive) -> bool:
    folder = output / archive.folder
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():  # say it now, not after 20 GB have been downloaded
        raise DownloadError(f"{folder} is a file or a broken link: correct or remove it")
    found = count_files(folder)
    if archive.images and found < archive.images:
        raise DownloadError(
            f"{folder} holds {found:,} files, but {archive.images:,} are published: complete it, or remove it and "
            "start the same command again"
        )
    return True


def count_files(folder: Path) -> int:
    """The files in a folder and all below."""
    return sum(len(files) for _, _, files in os.walk(folder, followlinks=True))


def _check_space(output: Path, archives: list[Archive], keep: bool, session: requests.Session) -> None:
    sizes = {archive: archive.size or _size_of(archive, session) for archive in archives}
    # Pictures hardly shrink in a ZIP file, so that an archive unpacked takes its size once more. Archives are unpacked
    # one after the other and then removed, unless they are kept.
    needed = sum(sizes.values()) * 2 if keep else sum(sizes.values()) + max(sizes.values(), default=0)
    for archive in archives:
        part = output / (archive.folder + ".zip.part")
        whole = output / (archive.folder + ".zip")
        needed -= next((file.stat().st_size for file in (whole, part) if file.is_file()), 0)
        needed -= sum(file.stat().st_size for file in unfinished(output / archive.folder).rglob("*") if file.is_file())
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DownloadError(
            f"{output} needs about {needed / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free: make room, or "
            "download some sources at a time with --sources"
        )


def _size_of(archive: Archive, session: requests.Session) -> int:
    if archive.url is None:
        return 0  # the hub's own client looks
    try:
        answer = session.head(archive.url, timeout=_TIMEOUT, allow_redirects=True)
        return int(answer.headers.get("Content-Length", 0)) if answer.ok else 0
    except requests.RequestException:
        return 0  # the download will say what is the matter


def _fetch_archives(archives: list[Archive], output: Path, config: DownloadConfig, session: requests.Session) -> None:
    for archive in archives:
        if archive.hub and not (output / (archive.folder + ".zip")).is_file():
            _fetch_from_hub(archive.hub, archive.file, output)
            finish(output / archive.file, output / (archive.folder + ".zip"))
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    stop, one_at_a_time = threading.Event(), threading.Lock()
    with Progress(*columns) as progress, ThreadPoolExecutor(config.workers) as pool:

        def fetch(archive: Archive) -> None:
            file = output / (archive.folder + ".zip")
            task = progress.add_task(archive.folder, total=archive.size)

            def advance(done: int, total: int | None) -> None:
                if stop.is_set():
                    raise _Stopped
                progress.update(task, completed=done, total=total)

            if not file.is_file():
                fetch_file(archive.url, file, archive.size, archive.md5, session, advance)
            with one_at_a_time:
                progress.update(task, description=f"unpacking {archive.folder}")
                unpack(file, output / archive.folder, archive.inside, advance)
            if not config.keep_archives:
                file.unlink()
            progress.update(task, description=archive.folder)

        jobs = [pool.submit(fetch, archive) for archive in archives]
        try:
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        except BaseException:  # one fails or the user stops: so do the others, with what they have
            stop.set()
            for job in jobs:
                job.cancel()
            raise


class _Stopped(Exception):
    """Ends a thread."""


def _fetch_from_hub(dataset: str, file: str, output: Path) -> None:
    """By the hub's own client, which resumes, retries and checks."""
    if (output / file).is_file():
        return
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(dataset, file, repo_type="dataset", local_dir=output)
    except Exception as error:  # its own, those of whatever HTTP library it uses, ...
        if getattr(error, "errno", None):  # of this machine: the disk is full, ...
            raise
        raise DownloadError(
            f"{file} of {dataset} cannot be fetched from the hub ({first_line(error)}): start the same command again"
        ) from error


def _say(recipe: Recipe, chosen: list[str], output: Path) -> None:
    console = Console()
    table = Table("source", "folder", "files", "published", "licence")
    left = []
    for name in chosen:
        source = recipe.sources[name]
        for folder, published in source.folders().items():
            there = (output / folder).is_dir()
            found = count_files(output / folder) if there else 0
            table.add_row(name, folder, f"{found:,}", f"{published:,}" if published else "", source.licence)
            if not there and source.by_hand:
                left.append(
                    f"{name} has to be fetched by hand:\n{source.by_hand.strip()}".replace("OUTPUT", str(output))
                )
    console.print(table)
    for words in left:
        console.print(words, style="yellow", soft_wrap=True, highlight=False)
    mixture, images = output / recipe.mixture.path, output / recipe.image_folder
    console.print(f"The mixture, {recipe.mixture.records:,} records, is {mixture}. What next:", soft_wrap=True)
    console.print(f"  fura-vlm data verify {mixture} --image_folder {images}", soft_wrap=True, highlight=False)
    console.print(f"  ... --data_path {mixture} --image_folder {images}", soft_wrap=True, highlight=False)


# ------------------------------------------------------------------------------------------------------ one file


def _session(connections: int) -> requests.Session:
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # ranges count the bytes of the file itself
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=_AGAIN_LATER, pool_maxsize=connections))
    return session


def fetch_file(
    url: str,
    target: Path,
    size: int | None,
    md5: str | None,
    session: requests.Session,
    advance: Callable[[int, int | None], None],
) -> None:
    """Downloads a file, going on with ``target.part`` if the server's file is still the same (RFC 9110, section 14).

    Args:
        url: where it is.
        target: what to write; its folder is made.
        size, md5: as published, or ``None``.
        session: makes the requests.
        advance: called with the bytes that are there and the size.

    Raises:
        DownloadError: if the server refuses or its file is not the published one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, tag = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.tag")
    retry, done = _AGAIN, -1
    while True:
        have = part.stat().st_size if part.is_file() else 0
        if have > done:  # the last attempt has got us further
            retry, done = _AGAIN, have
        try:
            if _receive(url, part, tag, size, session, advance):
                break
            error: Exception = requests.ConnectionError("the server stopped early")
        except (requests.ConnectionError, requests.Timeout, HTTPError) as caught:
            error = caught
        except requests.RequestException as caught:  # a server that stays busy, an invalid address
            raise DownloadError(f"{url} cannot be downloaded ({_words(caught)}): try again later") from caught
        try:
            retry = retry.increment("GET", url, error=error)
        except MaxRetryError:
            raise DownloadError(
                f"{url} cannot be downloaded ({_words(error)}): start the same command again to go on"
            ) from error
        retry.sleep()
    tag.unlink(missing_ok=True)
    if md5 and _md5_of(part) != md5:
        part.unlink()
        raise DownloadError(f"{url} has another MD5 sum than the published {md5}: start the same command again")
    finish(part, target)


def _words(error: Exception) -> str:
    """The innermost reason, as one line."""
    while (inner := getattr(error, "reason", None) or next(iter(error.args), None)) and isinstance(inner, Exception):
        error = inner
    return " ".join(str(error).split())


def _receive(url, part: Path, tag: Path, size: int | None, session: requests.Session, advance) -> bool:
    """One request for what is missing. Returns whether the file is whole."""
    have = part.stat().st_size if part.is_file() else 0
    if size is not None and have == size:
        return True
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.is_file():
            headers["If-Range"] = tag.read_text()
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code == 416:  # there is nothing after what we have: it is the whole file, or another one
            if _size_in(answer.headers) == have and size is None:
                return True
            part.unlink()
            return False
        if not answer.ok:
            raise DownloadError(f"{url} answers {answer.status_code} {answer.reason}: check whether it has moved")
        if answer.status_code == 206:
            total = _size_in(answer.headers)
        else:  # from the beginning: no ranges here, or the file has changed
            have, total = 0, int(answer.headers.get("Content-Length", -1))
        if size is not None and total not in (-1, size):
            raise DownloadError(
                f"{url} has {total:,} bytes, but {size:,} are published: it is another file; if it is the right one, "
                "correct its size in the recipe"
            )
        # A weak ETag may not be used here.
        etag = answer.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
        tag.write_text(validator) if validator else tag.unlink(missing_ok=True)
        with part.open("ab" if have else "wb") as file:
            # What has arrived before a connection is lost is kept, to the byte.
            while piece := answer.raw.read1(_PIECE, decode_content=False):
                file.write(piece)
                have += len(piece)
                advance(have, total if total >= 0 else None)
    return have == total or total == -1


def _size_in(headers: Mapping[str, str]) -> int:
    """The size of the whole file where a part of it is sent, or -1 where the server does not say."""
    size = headers.get("Content-Range", "").rpartition("/")[2]
    return int(size) if size.isdecimal() else -1


def _md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path, inside: str, advance: Callable[[int, int | None], None]) -> None:
    """Unpacks one folder of a ZIP file. What an interrupted unpacking has left in ``folder.tmp`` is used.

    Args:
        archive: the file; its checksums are checked.
        folder: what to make of it; appears when it is whole.
        inside: the folder in the archive, "" for all of it.
        advance: called with the bytes written so far and their sum.

    Raises:
        DownloadError: if the archive is damaged (it is removed, to be downloaded again), or has no such folder.
    """
    building = unfinished(folder)
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [(info, _within(info.filename, inside, archive)) for info in packed.infolist()]
            members = [(info, path) for info, path in members if path is not None and not info.is_dir()]
            if not members:
                first = ", ".join(sorted({name.partition("/")[0] for name in packed.namelist()})[:4])
                raise DownloadError(f"{archive} has no folder {inside}; it has {first}: correct `inside` in the recipe")
            done, total = 0, sum(info.file_size for info, _ in members)
            for info, path in members:
                target = building / path
                if not target.is_file() or target.stat().st_size != info.file_size:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with packed.open(info) as source, target.open("wb") as file:
                        shutil.copyfileobj(source, file, _PIECE)
                done += info.file_size
                advance(done, total)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        archive.unlink()
        raise DownloadError(
            f"{archive} is damaged ({error}); it has been removed: start the same command again"
        ) from error
    finish(building, folder)


def _within(name: str, inside: str, archive: Path) -> PurePosixPath | None:
    """The path of a member from the folder ``inside`` on, or ``None`` if it is elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DownloadError(f"{archive} holds the path {name!r}, outside its own folder: do not use it")
    return path.relative_to(inside) if path.is_relative_to(inside) else None
