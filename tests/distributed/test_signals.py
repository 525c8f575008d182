"""Signals that ask for a stop."""

import os
import signal

import pytest

from fastnabla.distributed.signals import SIGNALS, Stopped, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_the_next_check(number: signal.Signals) -> None:
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.received == number
    assert stopped.value.status == {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}[number.name]
    assert str(stopped.value) == number.name


def test_the_second_interrupt_stops_at_once() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is signal.SIGTERM


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_one_that_is_not_entered_lets_everything_go_on() -> None:
    StopSignals().check()
