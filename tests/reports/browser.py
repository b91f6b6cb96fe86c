"""A page in a headless Chromium without a network: what it is afterwards, and what it complained of."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


def browse(page: Path, folder: Path, script: str = "") -> tuple[str, list[str]]:
    """The document after `script` was run at its end, without its scripts, and the messages of its console."""
    copy = page
    if script:  # beside the page, so that its links lead where they led
        copy = page.with_name(f"run_{page.name}")
        start, end, rest = page.read_text("utf-8").rpartition("</body>")  # the viewer's own text has one too
        copy.write_text(f"{start}<script>{script}</script>{end}{rest}", "utf-8")
    options = ["--headless", "--no-sandbox", "--no-first-run", "--disable-sync", "--disable-background-networking"]
    options += ["--disable-component-update", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    options += ["--ignore-gpu-blocklist", "--enable-logging=stderr", "--virtual-time-budget=30000", "--dump-dom"]
    options += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", copy.as_uri()]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, encoding="utf-8", timeout=120, check=True)
    told = [line.split("CONSOLE", 1)[1] for line in done.stderr.splitlines() if "CONSOLE" in line]
    return re.sub(r"<script>.*?</script>", "", done.stdout, flags=re.DOTALL), told
