"""XLA's settings in tests: only accepted flags, and speed only on request."""

import os
import subprocess
import sys

import jax
import pytest

from tests import xla_flags


def test_a_flag_that_xla_does_not_know_is_not_set(tmp_path):
  flag = '--xla_no_such_flag=true'
  assert not xla_flags.accepts(flag, tmp_path)
  assert xla_flags.accepts('--xla_cpu_enable_fast_math=false', tmp_path)
  # Both answers are cached, so that later starts cost nothing.
  for file in tmp_path.iterdir():
    file.write_text('0')
  assert xla_flags.accepts(flag, tmp_path)


def test_every_flag_that_is_set_is_known(tmp_path):
  for flag in os.environ.get('XLA_FLAGS', '').split():
    assert xla_flags.accepts(flag, tmp_path), flag


@pytest.mark.as_users_compile
def test_optimizations_are_on_where_the_tests_ask_for_them():
  is_optimized = bool(os.environ.get('MOE_JAX_TEST_OPTIMIZED'))
  option = 'jax_disable_most_optimizations'
  child = subprocess.check_output(
    [sys.executable, '-c', f'import jax; print(jax.config.read({option!r}))'],
    text=True,
  )
  assert child.strip() == str(not is_optimized)
  assert jax.config.read(option) is not is_optimized
  assert not (is_optimized and os.environ.get('XLA_FLAGS'))
