"""The first gated experts, of 1991: model, data and table of the paper.

`vowels.py` has the data, `mixture.py` the model and its three errors,
`descent.py` the training and the measures, and `descent_runner.py` the options
and the runs of the study `jacobs_table1.py`. `claims.py`, `rows.py` and
`figures.py` are what its table shows.
"""
