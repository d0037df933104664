"""Settings of the ``data`` commands. Light on purpose: the command line reads them before anything is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class VerifyConfig:
    """Decode every image of a mixture and say which are missing, broken or not used.

    Args:
        data_path: the mixture: a JSON, JSONL or Parquet file, a folder of the datasets library, or a hub name.
        image_folder: where its image paths start; by default the folder of ``data_path``.
        report_dir: the folder for the lists; by default ``data_path`` with ``.images`` added.
        workers: processes that decode; by default one for each core.
    """

    data_path: str
    image_folder: str | None = None
    report_dir: str | None = None
    workers: int | None = None


@dataclass
class DownloadConfig:
    """Download a published mixture and its images, resuming what is there.

    Args:
        recipe: what there is and where it comes from: a YAML file, or the name of one that the package has.
        output_dir: the folder to fill; by default that of the recipe's name in data/.
        sources: the names of some sources only; by default all of them.
        workers: files that are downloaded at the same time.
        keep_archives: keep a source's archives after they have been unpacked.
    """

    recipe: str = "llava-665k"
    output_dir: str | None = None
    sources: list[str] | None = None
    workers: int = 4
    keep_archives: bool = False
