"""What stays as it is while the code is made smaller; goes when that is done.

    python -m tests.held record    # writes held.json from this checkout
    python -m tests.held check     # compares this checkout with held.json
    python -m tests.held mutate    # runs mutations.json, and counts the caught

`held.json` has the first twenty losses of six configs, the paths and shapes of
the parameters of every config, and for every study the verdicts of its stored
result and the settings of its arms. Losses are those that the command logs, so
they depend on the processor and on jax; the file names both.
"""
