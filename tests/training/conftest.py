"""Fixtures of the tests of training."""

import dataclasses
import functools

import pytest

from moe_jax.training import setup

# Options of a run on which none of its programs depends.
NOT_IN_PROGRAMS = (
  'data', 'evals', 'checkpoint', 'early_stopping', 'init_from', 'sample'
)  # fmt: skip


@pytest.fixture(autouse=True, scope='module')
def _equal_runs_share_programs():
  """Traces the programs of equal runs once for a test file.

  Tracing takes most of the time of a tiny run. Runs of processes of their own,
  in `test_processes.py` and elsewhere, trace theirs anew.
  """
  programs, make = {}, setup.make_programs

  @functools.wraps(make)
  def shared(options, model, mesh):
    key = (
      mesh,
      *(
        repr(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in NOT_IN_PROGRAMS
      ),
    )
    if key not in programs:
      programs[key] = make(options, model, mesh)
    return programs[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setup, 'make_programs', shared)
    yield
