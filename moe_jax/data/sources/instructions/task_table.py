"""Prints every task with instructions, with an example.

python -m moe_jax.data.sources.instructions.task_table
"""

from collections.abc import Iterator

from moe_jax.data.sources import instructions


def lines(num_shots: int = 0) -> Iterator[str]:
  """Lines on every task: its cluster, name and score, and one example."""
  cluster, can_use = '', instructions.usable()
  for name, task in instructions.TASKS.items():
    if task.cluster != cluster:
      cluster = task.cluster
      yield f'== {cluster}'
    if name not in can_use:
      yield f'{name}: needs {task.needs}, which is not installed'
      continue
    question = task('validation', 0, num_shots)
    score = f'choice of {len(question.choices)}'
    yield f'{name} ({score if question.choices else task.metric})'
    yield from (f'    {line}' for line in question.inputs.split('\n'))
    yield from (f'  > {line}' for line in question.target.split('\n'))


if __name__ == '__main__':
  print('\n'.join(lines()))
