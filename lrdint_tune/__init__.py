"""Fine-tune pretrained Llama models whose attention carries a differential method, on torchtune.

Importing this package reads package metadata only; torch and torchtune are imported by the modules that use them.
"""

from lrdint_tune._versions import check_versions

__version__ = "0.1.0"

check_versions()
