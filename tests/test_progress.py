"""What is shown while something takes long: in a terminal only, and not at once."""

import io
import sys
import time

import pytest
import torch
from torch import nn

import peft_fx as fx
from peft_fx import progress


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def screen(monkeypatch):
    """A terminal in stderr's place; made by the test, since pytest puts its own there before it."""

    def put(terminal=True):
        monkeypatch.setattr(sys, "stderr", Screen(terminal))
        return sys.stderr

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return put


def capture():
    return fx.capture(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), (torch.randn(2, 4),))


def test_capture_says_what_it_does(screen, monkeypatch):
    said, shown = [], screen()
    monkeypatch.setattr("peft_fx.verbs.capture.model.step", lambda what: (said.append(what), progress.step(what)))
    with progress.working("opening the model", after=0):
        capture()
        while "putting Sequential together" not in shown.getvalue():  # another thread writes it
            time.sleep(0.01)
    steps = ("capturing {} in eval mode", "capturing {} in train mode", "putting {} together")
    assert said == [step.format("Sequential") for step in steps]
    assert progress.status.get() is None


def test_what_is_done_soon_shows_nothing(screen, monkeypatch):
    shown = screen()
    monkeypatch.setattr("peft_fx.verbs.capture.model.working", lambda what: progress.working(what, after=600))
    capture()
    assert shown.getvalue() == ""


@pytest.mark.parametrize("terminal, setting", [(False, "1"), (True, "0")], ids=["no terminal", "switched off"])
def test_nothing_is_shown_where_nobody_looks(screen, terminal, setting, monkeypatch):
    shown = screen(terminal)
    monkeypatch.setenv(progress.PROGRESS, setting)
    with progress.working("opening the model", after=0):
        capture()
    assert shown.getvalue() == ""


def test_a_failure_takes_it_away(screen):
    screen()
    with pytest.raises(ValueError, match="no more"), progress.working("failing", after=0):
        assert progress.status.get() is not None
        raise ValueError("no more")
    assert progress.status.get() is None
