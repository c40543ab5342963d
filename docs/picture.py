"""Draw docs/img/report.png: the top of the report page that `regard see` made.

    .venv/bin/regard see @northanger-abbey --html attention.html
    .venv/bin/python docs/picture.py attention.html docs/img/report.png

Needs playwright and a Chromium: name its path in CHROMIUM where playwright has none of its own.
"""

import os
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

page, picture = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
with sync_playwright() as play:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    browser = play.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=arguments)
    tab = browser.new_page(viewport={"width": 1180, "height": 1500}, device_scale_factor=1)
    tab.goto(page.as_uri())
    tab.wait_for_timeout(3000)
    picture.parent.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=str(picture))
    browser.close()
