"""Makes the pictures of the chat in the README: docs/chat-light.png, chat-dark.png and chat-phone.png.

bash scripts/demo.sh RUN                        serves the chat
python demo/screenshots.py PICTURE QUESTION...  asks them of the base and of the adapter, one after the other
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
VIEWS = {
    "light": {"viewport": {"width": 1180, "height": 960}},
    "dark": {"viewport": {"width": 1180, "height": 960}},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True},
}

parser = argparse.ArgumentParser(description="Make the pictures of the chat in the README.")
parser.add_argument("picture")
parser.add_argument("questions", nargs="+")
parser.add_argument("--address", default="http://127.0.0.1:7860")
options = parser.parse_args()

DOCS.mkdir(exist_ok=True)
with sync_playwright() as playwright:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
    for name, settings in VIEWS.items():
        page = browser.new_context(**settings).new_page()
        page.goto(f"{options.address}/?__theme={'dark' if name == 'dark' else 'light'}")
        page.locator("#question textarea").wait_for()
        if name != "phone":  # side by side needs the width
            page.get_by_role("button", name="Settings").click()
            if page.get_by_label("Model", exact=True).input_value() != "base":  # a plain model is alone
                page.get_by_label("Side by side with", exact=True).click()
                page.get_by_role("option", name="base", exact=True).click()
                page.locator("#right").wait_for()
            number = page.get_by_label("number input for Longest answer")
            while number.input_value() != "48":  # what is typed while Gradio builds the slider is lost
                number.fill("48")
                number.press("Tab")
            page.get_by_role("button", name="Settings").click()
        page.set_input_files("#question input[type=file]", options.picture)
        page.locator("#question img").wait_for()
        for turn, question in enumerate(options.questions):
            page.locator("#question textarea").fill(question)
            page.get_by_label("Submit").click()
            page.locator("#left .bot.message").nth(turn).wait_for()
            page.get_by_label("Submit").wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        page.screenshot(path=DOCS / f"chat-{name}.png")
        print(DOCS / f"chat-{name}.png")
    browser.close()
