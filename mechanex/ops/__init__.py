"""Operations of the engine: argument checks, gradients and dispatch; :mod:`mechanex.backends` computes."""
