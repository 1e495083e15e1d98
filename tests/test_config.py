import pytest

from hybridvit import config
from hybridvit.config import RunConfig


def test_hash_ignores_where_the_data_lie_and_nothing_else() -> None:
    base = config.validate({"data": {"name": "cifar10", "args": {"root": "/a"}}})
    same = config.validate({"data": {"name": "cifar10", "args": {"root": "/b", "download": True}}})
    assert config.config_hash(base) == config.config_hash(same)
    for other in ({"seed": 1}, {"stem": {"name": "resnet"}}, {"train": {"threads": 1}}):
        changed = config.validate({"data": {"name": "cifar10"}, **other})
        assert config.config_hash(changed) != config.config_hash(base)


@pytest.mark.parametrize("name", ["image_folder", "a_plugins_xrays"])
def test_data_of_ones_own_are_known_by_their_place(name: str) -> None:
    hashes = {
        config.config_hash(config.validate({"data": {"name": name, "args": {"root": root}}}))
        for root in ("/cats", "/xrays")
    }
    assert len(hashes) == 2


def test_hash_follows_the_results_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.config_hash(RunConfig())
    monkeypatch.setattr(config, "RESULTS_VERSION", 999)
    assert config.config_hash(RunConfig()) != before


def test_resolved_round_trips() -> None:
    loaded = config.validate({"optim": {"betas": [0.8, 0.9]}, "plugins": ["a:b"]})
    assert config.validate(config.resolved(loaded)) == loaded
