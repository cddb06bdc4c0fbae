"""Check of the two libraries whose versions decide whether anything here can be imported at all.

torchtune 0.6.1 is that project's last release, and it imports with torchao 0.14 and 0.15 only: torchao 0.16 removed
``int4_weight_only`` and later releases removed more of what torchtune reads at import time. Left alone, a wrong pair
fails somewhere inside torchtune with an ImportError that says nothing about the cause.

Only package metadata is read, so the check costs milliseconds and imports neither torch nor torchtune.
"""

from collections.abc import Mapping
from importlib import metadata

from packaging.specifiers import SpecifierSet

# The same ranges stand in pyproject.toml; tests/unit/test_package.py holds the two together.
REQUIRED: Mapping[str, str] = {"torchtune": "==0.6.1", "torchao": ">=0.14,<0.16"}


def check_versions(required: Mapping[str, str] = REQUIRED) -> None:
    """Compare the installed versions with ``required`` (distribution name -> version specifier).

    Raises:
        ImportError: one line that names every package that is missing or has another version, and the pip command
            that puts it right.
    """
    found, fixes = [], []
    for name, specifier in required.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
        else:
            if SpecifierSet(specifier).contains(version, prereleases=True):
                continue
            found.append(f"{name} {version} is installed")
        fixes.append(f'"{name}{specifier}"')
    if fixes:
        needs = " and ".join(f"{name}{specifier}" for name, specifier in required.items())
        raise ImportError(f"lrdint_tune needs {needs}, but {', '.join(found)}. Run: pip install {' '.join(fixes)}")
