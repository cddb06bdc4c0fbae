"""Where a run's records go, TensorBoard's files and the numbers as JSON lines too, on a disk that may be full for a
while."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram, image, scalar, text

from lrdint_tune.errors import ConfigError
from lrdint_tune.export.atomic import atomic_text

log = logging.getLogger(__name__)

JSON_FILE = "metrics.jsonl"
EVENT_FILES = "events.out.tfevents.*"
HISTOGRAM_BINS = 30  # what TensorBoard shows


class TensorBoardLogger:
    """Writes scalars to TensorBoard and to ``metrics.jsonl``; images, histograms and texts to TensorBoard alone.

    A resumed run writes on into the same folders: everything recorded after the step it resumes from is dropped from
    both, so there is one curve. A new run puts the event files that it finds out of TensorBoard's sight, as
    ``replaced.*``.

    What cannot be written (the disk is full) is kept and written with what comes next, after one warning. Neither file
    ever holds half a record. This is why torch's ``SummaryWriter`` does not serve: its thread dies of the first error,
    with what it held.

    Args:
        log_dir: the folder of ``metrics.jsonl`` and of profiles.
        events_dir: the folder of the event files, ``log_dir`` if it is not given. TensorBoard calls a run by the path
            of this folder below ``--logdir``.

    Attributes:
        json_file: the file of JSON lines.
        continues: after :meth:`open`, whether the event files of the run's earlier part are there.
    """

    def __init__(self, log_dir: str, events_dir: str | None = None) -> None:
        self.log_dir, self.events_dir = Path(log_dir), Path(events_dir or log_dir)
        self.continues = False
        self.json_file = self.log_dir / JSON_FILE
        self._lines, self._events = b"", b""  # not written yet
        self._resumed_step: int | None = None  # until the files are ready
        self._failed = False

    def check(self) -> None:
        """That there can be such folders; nothing is made.

        Raises:
            ConfigError: one is a file, or lies where this user may not write.
        """
        for key, folder in (("log_dir", self.log_dir), ("events_dir", self.events_dir)):
            place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                reason = "is not writable" if place.is_dir() else "is no folder"
                raise ConfigError(
                    f"metric_logger.{key}={str(folder)!r}: {place} {reason}; choose another {key} or output_dir"
                )

    def open(self, *, resumed_step: int) -> None:
        """Start recording after ``resumed_step`` (0 for a new run)."""
        self._resumed_step = resumed_step
        self.continues = resumed_step > 0 and any(self.events_dir.glob(EVENT_FILES))
        self._event(Event(file_version="brain.Event:2"))
        # What an open TensorBoard has read already: a new run hides all of it, the validation before step 1 included.
        hidden_from = resumed_step + 1 if resumed_step else 0
        self._event(Event(step=hidden_from, session_log=SessionLog(status=SessionLog.START)))
        self._write()

    def log(self, values: dict[str, float], step: int) -> None:
        """Record ``values`` (tag -> number) at optimizer step ``step``; NaN and infinity are left out, as JSON has
        neither: a gap in the curve."""
        values = {tag: value for tag, value in values.items() if math.isfinite(value)}
        self._lines += (json.dumps({"step": step, **values}) + "\n").encode()
        for tag, value in values.items():
            self._event(Event(step=step, summary=scalar(tag, value)))
        self._write()

    def history(self, tag: str) -> list[tuple[int, float]]:
        """``(step, value)`` of everything recorded under ``tag``, earlier parts of a resumed run included."""
        return [(line["step"], line[tag]) for line in self._recorded() if tag in line]

    def histories(self) -> dict[str, list[tuple[int, float]]]:
        """:meth:`history` of every tag."""
        found: dict[str, list[tuple[int, float]]] = {}
        for line in self._recorded():
            for tag, value in line.items():
                if tag != "step":
                    found.setdefault(tag, []).append((int(line["step"]), value))
        return found

    def _recorded(self) -> list[dict[str, Any]]:
        written = self.json_file.read_bytes() if self.json_file.is_file() else b""
        return [json.loads(line) for line in (written + self._lines).splitlines()]

    def log_text(self, tag: str, content: str) -> None:
        """Show ``content``, Markdown."""
        self.log_summary(text(tag, content))

    def log_images(self, images: dict[str, NDArray[np.uint8]], step: int) -> None:
        """Record ``images`` (tag -> uint8 ``[H, W, 3]``) at optimizer step ``step``."""
        for tag, pixels in images.items():
            self._event(Event(step=step, summary=image(tag, pixels, dataformats="HWC")))
        self._write()

    def log_histograms(self, values: dict[str, Tensor], step: int) -> None:
        """Record how the finite ones of ``values`` (tag -> tensor of any shape, at least one entry finite) are
        distributed at optimizer step ``step``."""
        for tag, tensor in values.items():
            entries = tensor.detach().float().cpu().numpy()
            self._event(Event(step=step, summary=histogram(tag, entries[np.isfinite(entries)], bins=HISTOGRAM_BINS)))
        self._write()

    def log_summary(self, summary: Summary) -> None:
        """Record what belongs to the run and to no step: a text, hyperparameters, a layout."""
        self._event(Event(summary=summary))
        self._write()

    def close(self) -> None:
        """Try for the last time to write what is left."""
        self._write()
        if self._lines or self._events:
            log.warning("%s: the last values were not written", self.log_dir)

    def _event(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._events += record.getvalue()

    def _write(self) -> None:
        try:
            if self._resumed_step is not None:
                self._prepare(self._resumed_step)
                self._resumed_step = None
            append(self.json_file, self._lines)
            self._lines = b""
            append(self._events_file, self._events)
            self._events = b""
        except OSError as error:
            if not self._failed:
                reason = error.strerror or error
                log.warning("%s: cannot be written (%s); the values are kept and written later", self.log_dir, reason)
            self._failed = True
        else:
            if self._failed:
                log.warning("%s: is written again, nothing is missing", self.log_dir)
            self._failed = False

    def _prepare(self, resumed_step: int) -> None:
        """Drop what was recorded after the step, and find a name for the events."""
        for folder in (self.log_dir, self.events_dir):
            folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads event files in the order of their names, which begin with a second: this one must be later.
        earlier = list(self.events_dir.glob(EVENT_FILES))
        seconds = [int(old.name.split(".")[3]) for old in earlier]
        while int(time.time()) <= max(seconds, default=0):
            time.sleep(0.05)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._events_file = self.events_dir / name
        if resumed_step == 0:  # TensorBoard takes hyperparameters from a run's first file, and never forgets a tag
            for old in earlier:
                old.rename(old.with_name(f"replaced.{old.name.split('tfevents.')[1]}"))
        lines = self.json_file.read_text().splitlines() if self.json_file.is_file() else []
        kept = [line for line in lines if line.endswith("}") and 0 < resumed_step >= json.loads(line)["step"]]
        atomic_text(self.json_file, "".join(f"{line}\n" for line in kept))


def append(file: Path, data: bytes) -> None:
    """Add all of ``data`` to the end of a file, or none.

    Raises:
        OSError: it could not be written; the file is as before.
    """
    with open(file, "ab", buffering=0) as target:
        size = target.tell()
        try:
            left = memoryview(data)
            while left:
                left = left[target.write(left) :]
        except OSError:
            target.truncate(size)
            raise
