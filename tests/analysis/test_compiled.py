"""A compiled program is read: names, scopes, and each loop counted once."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.analysis import sharded

# A program with a loop whose body runs a fusion and a copy without a name, a
# small loop inside a called computation, and a product at the top level.
TEXT = """HloModule jit_step, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%p, %p), metadata={op_name="jit(step)/experts/add"}
}

%body (arg: (f32[4])) -> (f32[4]) {
  %arg = (f32[4]{0}) parameter(0)
  %item = f32[4]{0} get-tuple-element(%arg), index=0
  %copy.1 = f32[4]{0} copy(%item)
  %fusion.1 = f32[4]{0} fusion(%copy.1), kind=kLoop, calls=%fused
  ROOT %tuple.1 = (f32[4]{0}) tuple(%fusion.1)
}

%cond (arg.2: (f32[4])) -> pred[] {
  %arg.2 = (f32[4]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%small (arg.3: (f32[4])) -> (f32[4]) {
  %arg.3 = (f32[4]{0}) parameter(0)
  ROOT %while.2 = (f32[4]{0}) while(%arg.3), condition=%cond, body=%body
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %tuple.2 = (f32[4]{0}) tuple(%x)
  %while.1 = (f32[4]{0}) while(%tuple.2), condition=%cond, body=%body, metadata={op_name="jit(step)/moe/while"}
  %call.1 = (f32[4]{0}) call(%tuple.2), to_apply=%small, metadata={op_name="jit(step)/router/while"}
  ROOT %dot.1 = f32[4]{0} dot(%x, %x), metadata={op_name="jit(step)/dot_general"}
}
"""  # noqa: E501
PROGRAM = sharded.parse(TEXT)


def test_instructions_have_names_operands_and_computations():
  assert len(PROGRAM) == 16
  fusion = PROGRAM['fusion.1']
  assert fusion.computation == 'body'
  assert fusion.operands == ('copy.1',)
  assert fusion.calls == ('fused',)
  assert PROGRAM['while.1'].calls == ('cond', 'body')
  assert PROGRAM['add.1'].op_name == 'jit(step)/experts/add'


def test_branches_are_calls():
  line = (
    '  %c = f32[] conditional(%i, %a, %b), branch_computations={%one, %two}, '
    'metadata={op_name="cond"}'
  )
  program = sharded.parse(f'ENTRY %main (i: s32[]) -> f32[] {{\n{line}\n}}')
  assert program['c'].calls == ('one', 'two')
  assert program['c'].operands == ('i', 'a', 'b')


def test_scopes_come_from_what_is_called_then_read():
  names = sharded.op_name_of(PROGRAM)
  # A fusion has the name of what it calls.
  assert names['fusion.1'] == 'jit(step)/experts/add'
  # A copy has the name of the instruction that reads it.
  assert names['copy.1'] == 'jit(step)/experts/add'
  assert names['arg'] == 'jit(step)/experts/add'
  assert names['tuple.2'] in ('jit(step)/moe/while', 'jit(step)/router/while')


def test_a_loop_that_ran_its_body_is_no_leaf():
  assert sharded.leaves(PROGRAM, {'while.1', 'fusion.1', 'copy.1'}) == {
    'fusion.1',
    'copy.1',
  }


def test_a_call_without_a_profile_of_its_inside_is_a_leaf():
  assert sharded.leaves(PROGRAM, {'call.1', 'dot.1'}) == {'call.1', 'dot.1'}


def test_a_call_that_runs_a_loop_that_ran_is_no_leaf():
  executed = {'call.1', 'while.2', 'fusion.1'}
  assert sharded.leaves(PROGRAM, executed) == {'fusion.1'}


def test_what_the_program_does_not_have_is_a_leaf():
  executed = {'unknown', 'dot.1'}
  assert sharded.leaves(PROGRAM, executed) == executed


@pytest.fixture(scope='module')
def looped():
  @jax.jit
  def function(x, w):
    with jax.named_scope('router'):
      x = jnp.sin(x @ w)
    with jax.named_scope('experts'):
      return jax.lax.fori_loop(0, x.shape[0], lambda i, y: y @ w + i, x)

  x, w = jnp.ones((6, 5)), jnp.ones((5, 5))
  return function.lower(x, w).compile()


def test_a_real_program_is_read_whole(looped):
  text = looped.as_text()
  program = sharded.parse(text)
  assert len(program) == sum(' = ' in line for line in text.splitlines())
  names = sharded.op_name_of(program)
  loops = [i for i in program.values() if 'body' in i.op_name or i.calls]
  assert loops
  assert any('router' in name for name in names.values())
  assert any('experts' in name for name in names.values())
