"""What is printed and drawn: nothing of a library's own accord, and on a terminal what a pipe does not get."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from dopsd import completions
from dopsd.console import console, draws_bars
from dopsd.generate import load
from dopsd.progress import ProgressBar
from dopsd.trainer import Trainer
from tests.test_imports import python

LOG = logging.getLogger("dopsd.somewhere")


def test_the_innermost_decides(capsys: pytest.CaptureFixture[str]) -> None:
    """Of what is printed, once each, of the bars and of other libraries; all is afterwards as it was."""
    verbosity = transformers.utils.logging.get_verbosity
    before = verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    with console(sentences=True, bars=True):
        LOG.info("one")
        with console(sentences=False, bars=False):
            LOG.warning("two")
            assert not draws_bars() and verbosity() == logging.ERROR
        LOG.info("three")
        assert draws_bars()
    assert not draws_bars()
    assert (verbosity(), transformers.utils.logging.is_progress_bar_enabled()) == before
    assert capsys.readouterr() == ("one\nthree\n", "")


def test_a_librarys_warnings_are_its_users_to_print() -> None:
    """Without a handler nothing is printed, with one all is handed on."""
    program = """
import logging, sys, dopsd
sys.stderr = sys.stdout
log = logging.getLogger("dopsd.somewhere")
log.warning("unheard")
logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
log.warning("heard")
"""
    assert python(program) == "dopsd.somewhere heard\n"


@pytest.mark.parametrize("bars", [True, False])
def test_an_update_is_a_line_where_no_bars_are_drawn(bars: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing where there are no figures, or on a process that is not the first."""
    state: Any = SimpleNamespace(max_steps=3, global_step=0, is_world_process_zero=True)
    with console(sentences=True, bars=bars):
        progress = ProgressBar(shown=True)
        assert progress.inner()["disable"] is not bars
        progress.on_train_begin(None, state, None)
        state.global_step = 2
        progress.on_step_end(None, state, None)
        progress.on_log(None, state, None, logs={"loss": 0.25, "pass_rate": 1.0, "epoch": 0.1})
        progress.on_log(None, state, None, logs={"train_runtime": 3.0})
        state.is_world_process_zero = bars
        progress.on_log(None, state, None, logs={"eval_accuracy": 0.5})
        progress.on_train_end(None, state, None)
    out, err = capsys.readouterr()
    assert out == ("" if bars else "update 2 of 3: loss 0.25, pass 1\n")
    assert ("validation=0.5" in err) is bars


def test_a_notebook_draws_no_table_of_its_own(
    make_trainer: Callable[..., Trainer], random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one transformers has another callback for progress, which shows tables of losses there are not."""

    class Table(transformers.TrainerCallback):
        pass

    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", Table)
    trainer = make_trainer("--model", str(random_model))
    assert not any(isinstance(one, Table) for one in trainer.callback_handler.callbacks)


def test_a_decoding_is_drawn_in_one_place_on_a_terminal(
    random_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With rich; without it there is a line a step, as in a pipe."""
    pytest.importorskip("rich")
    model = load(str(random_model))
    (one,) = model.generate(["1:"], gen_length=8, block_length=8, steps=4)
    pauses: list[float] = []
    monkeypatch.setattr(completions.time, "sleep", pauses.append)
    shown: Callable[[], str] = lambda: capsys.readouterr().out  # noqa: E731
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with console(sentences=True, bars=False):
        completions.draw(one, model.decoder)
        assert len(pauses) == one.trajectory.num_steps and completions.MASKED in shown()
        monkeypatch.setattr(completions, "find_spec", lambda name: None)
        completions.draw(one, model.decoder)
        assert shown().count("\n") == one.trajectory.num_steps
