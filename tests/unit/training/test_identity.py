"""A checkpoint of another run is refused by naming what differs."""

from pathlib import Path

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.identity import check_same_run


def test_another_run_is_refused() -> None:
    saved = {"method": "dint", "rank": 8, "seed": 0}
    check_same_run(saved, dict(saved), Path("x"))
    with pytest.raises(ConfigError) as error:
        check_same_run(saved, {"method": "dint", "rank": 4, "integral": "causal", "seed": 0}, Path("out/step-3"))
    message = str(error.value)
    assert "out/step-3" in message
    assert "integral is None there and 'causal' here; rank is 8 there and 4 here" in message
    assert "seed" not in message
