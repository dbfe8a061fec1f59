"""Vector optimization: steering vectors by gradient descent on the log-probabilities of completions.

Read :mod:`.loop` first: it is the method. :mod:`.passes` is where the time goes.
"""
