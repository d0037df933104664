"""What tests of several parts share."""

import shutil

import pytest


@pytest.fixture(scope="session")
def browser():
    """One for all: Playwright's synchronous form runs once in a process."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no Chromium here: apt-get install chromium, then the tests of the page run too")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # a busy machine is slow, and not wrong
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--use-fake-device-for-media-stream",  # a camera that shows a test pattern
                "--use-fake-ui-for-media-stream",
            ],
        )
        yield browser
        browser.close()
