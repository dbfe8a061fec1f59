"""Vector optimization as the definitions read: one completion at a time, a whole pass, a plain hook, torch's Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechanex.engine.text import encode_pair
from mechanex.utils.steering_opt import TrainingDatapoint


@dataclass
class Naive:
    """The losses of all completions under a vector, in the order src before dst of each datapoint."""

    model: Any
    tokenizer: Any
    blocks: Sequence[torch.nn.Module]
    datapoints: Sequence[TrainingDatapoint]
    layers: Sequence[int]
    clamp: float | None = None
    coldness: float = 0.7
    eps: float = 1e-6
    do_one_minus: bool = True
    normalize: bool = False
    only_hook_prompt: bool = False

    def edited(
        self,
        x: Tensor,
        v: Tensor,
        matrix: Tensor | None,
        negative: bool,
        chosen: Tensor,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x [1, T, d] with the definition's edit at the chosen positions; noise [d] is added to the vector's effect."""
        wide = x.to(v.dtype)
        if self.clamp is not None:
            w = -v if negative else v
            unit = w / w.norm()
            y = wide - (wide @ unit)[..., None] * unit + self.clamp * w
        else:
            change = v if matrix is None else v + wide @ matrix.T
            y = wide - change if negative else wide + change
        if noise is not None:
            y = y - noise if negative else y + noise
        return torch.where(chosen[None, :, None], y, wide).to(x.dtype)

    def chosen(self, datapoint: TrainingDatapoint, n_prompt: int, n: int) -> Tensor:
        chosen = torch.ones(n, dtype=torch.bool)
        token = datapoint.token
        if token is not None:
            chosen[:] = False
            if isinstance(token, int):
                chosen[token if token >= 0 else n_prompt + token] = True
            else:
                bounds = [
                    None if b is None else (b if b >= 0 else n_prompt + b) for b in (token.start, token.stop)
                ]
                chosen[slice(*bounds, token.step)] = True
        if self.only_hook_prompt:
            chosen[n_prompt:] = False
        return chosen

    def loss(
        self,
        datapoint: TrainingDatapoint,
        side: str,
        text: str,
        v: Tensor,
        matrix: Tensor | None,
        noise: Tensor | None = None,
    ) -> Tensor:
        prompt, ids = encode_pair(self.tokenizer, datapoint.prompt, text)
        chosen = self.chosen(datapoint, len(prompt), len(prompt) + len(ids))

        def hook(_module: Any, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            y = self.edited(x, v, matrix, datapoint.is_negative, chosen, noise)
            return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": y})

        def leaving(_module: Any, _args: Any, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            y = self.edited(x, v, matrix, datapoint.is_negative, chosen)
            return (y, *out[1:]) if isinstance(out, tuple) else y

        handles = [
            self.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)
            if layer < len(self.blocks)
            else self.blocks[-1].register_forward_hook(leaving)
            for layer in self.layers
        ]
        try:
            out = self.model(torch.tensor([prompt + ids]))
        finally:
            for handle in handles:
                handle.remove()
        logits = (out if isinstance(out, Tensor) else out.logits)[0, len(prompt) - 1 : -1]
        logits = logits.to(v.dtype) * self.coldness
        p = logits.softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        if side == "dst":
            loss = -(p + self.eps).log().sum()
        elif self.do_one_minus:
            loss = -(1 - p + self.eps).log().sum()
        else:
            loss = (p + self.eps).log().sum()
        return loss / len(ids) if self.normalize else loss

    def completions(self) -> list[tuple[TrainingDatapoint, str, str]]:
        """Datapoint, side and text of every completion, in the order of the losses."""
        return [
            (datapoint, side, text)
            for datapoint in self.datapoints
            for side, texts in (("src", datapoint.src_completions), ("dst", datapoint.dst_completions))
            for text in texts
        ]

    def losses(self, v: Tensor, matrix: Tensor | None = None) -> list[Tensor]:
        return [self.loss(*place, v, matrix) for place in self.completions()]

    def optimize(
        self,
        start: Tensor,
        steps: int,
        lr: float,
        *,
        factors: tuple[Tensor, Tensor] | None = None,
        objective: Callable[[list[Tensor]], Tensor] = lambda losses: torch.stack(losses).sum(),
        max_norm: float | None = None,
    ) -> tuple[list[Tensor], list[float], Tensor | None]:
        """The vector after each step, the loss before each step and after the last, and the last matrix."""
        v = start.clone().requires_grad_()
        rows = [] if factors is None else [f.clone().requires_grad_() for f in factors]
        adam = torch.optim.Adam([v, *rows], lr=lr)
        vectors, losses = [], []
        for step in range(steps + 1):
            matrix = rows[0].T @ rows[1] if rows else None
            found = self.losses(v, matrix)
            losses.append(sum(float(loss.detach()) for loss in found))
            if step == steps:
                break
            adam.zero_grad()
            objective(found).backward()
            adam.step()
            with torch.no_grad():
                if max_norm is not None and v.norm() > max_norm:
                    v.mul_(max_norm / v.norm())
                for row in rows:
                    row.mul_((2 / row.norm(dim=1, keepdim=True)).clamp(max=1))
            vectors.append(v.detach().clone())
        return vectors, losses, None if not rows else (rows[0].T @ rows[1]).detach()
