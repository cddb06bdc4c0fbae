"""Pictures of TensorBoard's tabs as a browser shows them, for the documentation.

    python -m benchmarks.tensorboard_screenshots --logdir output --out docs

Starts TensorBoard over a folder of runs and Chromium without a window, and writes `<out>/tensorboard_<tab>.png` for
each tab. Chromium is spoken to in its DevTools protocol through two pipes, so there is nothing else to install.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

# Tab -> what follows TensorBoard's address, and the page's width and height in pixels.
TABS = {
    "scalars": ("?smoothing=0&tagFilter={tags}#timeseries", 1500, 1000),
    "custom_scalars": ("#custom_scalars&_smoothingWeight=0", 1500, 1580),
    "hparams": ("#hparams", 1900, 600),
    "images": ("#images", 1500, 1000),
    "histograms": ("#histograms", 1500, 850),
    "text": ("#text", 1500, 800),
}
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
# Only the first category is open at first. The tabs' elements hide in shadow roots.
OPEN_CATEGORIES = """
(() => {
  const all = (root) => [...root.querySelectorAll('*')].flatMap((e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
  all(document).filter((e) => e.localName === 'tf-category-paginated-view').forEach((e) => { e.opened = true; });
})()
"""


class Browser:
    """One page in Chromium, whose files ``program`` and ``profile`` are."""

    def __init__(self, program: str, profile: str) -> None:
        commands, self._commands = os.pipe()
        answers, theirs = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # It reads from file descriptor 3 and writes to 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{theirs}', "bash", program, *flags],
            pass_fds=(commands, theirs),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(theirs)
        self._answers = open(answers, "rb")
        self._last = 0
        self._session: str | None = None
        [page] = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a DevTools command."""
        self._last += 1
        command: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _message(self) -> bytes:
        parts = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser ended")
            parts += byte
        return bytes(parts)

    def show(self, url: str, width: int, height: int) -> None:
        """Open a page of that size in pixels."""
        size: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url="about:blank")  # another fragment alone would not load it anew
        self.call("Page.navigate", url=url)

    def picture(self, *, seconds: float) -> bytes:
        """The page as PNG, once it has been the same for that long; at most a minute."""
        deadline, last = time.monotonic() + 60, b""
        while time.monotonic() < deadline:
            time.sleep(seconds)
            now = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
            if now == last:
                break
            last = now
        return last

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        # Its helpers outlive it for a moment and still write to the profile.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        os.close(self._commands)
        self._answers.close()


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Serve the folder; gives the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}/"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{address}data/runs") as answer:
                    if json.load(answer):
                        break
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"TensorBoard found no run in {logdir} within a minute")
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--tabs", nargs="+", choices=TABS, default=list(TABS))
    parser.add_argument("--tags", default="global_avg_loss|/loss$|/leak$|tokens_per", help="which scalars are shown")
    args = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        parser.error("there is no chromium on this machine")
    # A helper in a session of its own may write while the profile is removed; what it leaves is of no use to anyone.
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with tensorboard(args.logdir) as address, scratch as profile:
        browser = Browser(program, profile)
        try:
            for tab in args.tabs:
                place, width, height = TABS[tab]
                browser.show(address + place.format(tags=quote(args.tags)), width, height)
                browser.picture(seconds=3)
                browser.call("Runtime.evaluate", expression=OPEN_CATEGORIES)
                file = args.out / f"tensorboard_{tab}.png"
                with Image.open(io.BytesIO(browser.picture(seconds=3))) as picture:
                    picture.convert("RGB").quantize(128).save(file, optimize=True)
                print(file, file.stat().st_size, "bytes")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
