"""What the scripts that train on symbols of Trading-v0 have in common."""

import pytest
from scripts import SCRIPTS, prices

pytest_plugins = ["scripts"]


@pytest.fixture(params=("ppo_transformer_trading", "ppo_hierarchical_trading"))
def script(request):
    return SCRIPTS[request.param]


def test_every_symbol_has_a_market_to_train_in(script, complaint, tmp_path):
    """With fewer markets than symbols the last ones would never be seen, and be traded all the same."""
    prices().to_csv(tmp_path / "closes.csv")
    line = complaint(*script.short, "--market", str(tmp_path / "closes.csv"), "--num-envs", "5")
    assert "--num-envs 5: expected at least 6, one for each symbol" in line
