"""Generation with models that route by task."""

import dataclasses
import functools

import pytest

from moe_jax import generation
from moe_jax.compression import extract
from moe_jax.layers.experts import Dropless
from moe_jax.layers.routers import Task
from moe_jax.routing import All
from tests.models import tiny

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
ROUTER = Task(gates='renormalized')
MOE = dict(router=ROUTER, capacity=All(), dispatch=Dropless())
KINDS = {'decoder': {}, 'encoder_decoder': {'start_id': 0}}


@functools.cache
def built(kind):
  options = dataclasses.replace(tiny.options(MOE, kind), num_tasks=3)
  model = options.build()
  return options, model, tiny.params_of(model)


def rows(kind, model, params, prompts=PROMPTS, **options):
  output = generation.generate(
    model, {'params': params}, prompts, num_tokens=6, **KINDS[kind], **options
  )
  return [row.tolist() for row in output.rows]


@pytest.mark.slow
def test_each_row_has_its_own_task():
  kind = 'encoder_decoder'
  options, model, params = built(kind)
  row_pair = rows(kind, model, params, task_ids=[2, 0])
  assert row_pair != rows(kind, model, params, task_ids=[1, 1])
  extracted = extract.extract(options, params, 2)
  extracted_model = extracted.options.build()
  assert row_pair[0] == rows(kind, extracted_model, extracted.params)[0]
  beams = dict(num_beams=2)
  assert (
    rows(kind, model, params, task_ids=[2, 2], **beams)
    == rows(kind, extracted_model, extracted.params, **beams)
  )  # fmt: skip


def test_tasks_that_do_not_fit_are_refused():
  options, model, params = built('decoder')
  refused = functools.partial(rows, 'decoder', model, params)
  with pytest.raises(ValueError, match='routes by 3 tasks; give task_ids'):
    refused()
  with pytest.raises(ValueError, match='1 task_ids for 2 rows'):
    refused(task_ids=[0])
  small = extract.extract(options, params, 0)
  with pytest.raises(ValueError, match='without a router by task'):
    rows('decoder', small.options.build(), small.params, task_ids=[0, 0])
