"""The configurations of a study's runs are parsed once."""

from collections.abc import Iterator

import pytest

from fastnabla.config.train import TrainConfig
from fastnabla.study import plan
from fastnabla.study.protocol import Contender, Protocol


@pytest.fixture(autouse=True, scope="package")
def parse_once() -> Iterator[None]:
    """A study asks for each of its runs' configurations, a function of the protocol, many times; parsing takes 0.05 s."""
    run_config, known = plan.run_config, {}

    def parsed(protocol: Protocol, contender: Contender, learning_rate: float) -> TrainConfig:
        key = repr((protocol, contender, learning_rate))
        if key not in known:
            known[key] = run_config(protocol, contender, learning_rate)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "run_config", parsed)
        yield
