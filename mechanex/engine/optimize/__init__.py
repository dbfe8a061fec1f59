"""Vector optimization: steering vectors by gradient descent on the log-probabilities of completions.

In reading order:

1. What is asked: :mod:`.settings`, :mod:`.datapoints`, :mod:`.parameters` (θ, its edits and Adam's step), and
   :mod:`.problem`, which holds them together as a job.
2. What is minimised: :mod:`.layout` (the completions as packs), :mod:`.objective`, and :mod:`.passes`, where losses and
   gradients are computed and the time goes: one :mod:`.stack` of jobs at a time, on layers that :mod:`.replay` runs.
3. How: :mod:`.state` (what a run knows between two steps), :mod:`.descend`, :mod:`.constrain` with its :mod:`.costs`,
   and :mod:`.loop`, which takes runs through both phases; :mod:`.checkpoint` is a run's state as a file.
"""
