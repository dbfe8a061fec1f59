"""The harness's view of a model: requests in, log-likelihoods and continuations out, all computed by the engine."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._version import __version__
from ..engine.generate import generate_batch
from ..engine.joins import split_texts
from ..engine.models import adapter_for
from ..engine.models.resolve import LoadedModel, load
from ..engine.pack import Pair
from ..engine.score_pairs import score_pairs
from ..engine.text import prompt_text
from ..engine.vector_store import VectorStore
from ..engine.vectors import SteeringVector
from ..errors import ValidationError
from .sampling import generation_options

__all__ = ["LM"]

_log = logging.getLogger(__name__)

# Requests that are laid out at once: enough for full batches, and few enough to hold.
SLAB = 2048
DEFAULT_ROWS = 16

_OWN = (
    "vector",
    "strength",
    "tokenizer",
    "backend",
    "dtype",
    "device",
    "batch_size",
    "batch_tokens",
    "max_length",
)
_ALIKE = 0.8  # difflib's ratio from which on a name is another misspelt; device_map and device have 0.75


@register_model("mechanex")
class LM(TemplateLM):  # type: ignore[misc]
    """A model for the lm-evaluation-harness, steered or not.

    Texts are encoded as the harness's own ``hf`` model encodes them, so that scores compare; but where a token spans
    the join of two, the continuation keeps its own text. Prompts that requests share are run once.

    Args:
        pretrained: what ``mechanex.load`` takes, or a loaded model.
        vector: steers every request: the id of stored vectors, ``{layer: tensor}``, a ``SteeringVector``, or the
            path of a vector file.
        strength: multiplies the vector.
        tokenizer: instead of the model's own.
        backend, dtype, device: as for ``mechanex.load``; here "transformers" is the default backend.
        batch_size: sequences that are generated together; scoring goes by ``batch_tokens``.
        max_batch_size: not used; the harness passes it.
        batch_tokens: most tokens in one scoring pass; None for what suits the device.
        max_length: context in tokens; None for the model's. Longer requests lose their beginning.
        add_bos_token: whether the tokenizer adds special tokens; None for its own default.
        prefix_token_id: what stands before a text without context; None for BOS, or EOS where there is none.
        **kwargs: for ``mechanex.load``: ``revision``, ``trust_remote_code``, ….

    Raises:
        ValidationError: no tokenizer, or a vector that doesn't fit the model.
        NotFoundError: no such model or vector.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | nn.Module | LoadedModel,
        vector: str | os.PathLike[str] | Mapping[int, Tensor] | SteeringVector | None = None,
        strength: float = 1.0,
        *,
        tokenizer: Any = None,
        backend: str = "transformers",
        dtype: Any = None,
        device: Any = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name in kwargs:
            if meant := difflib.get_close_matches(name, _OWN, 1, _ALIKE):
                raise ValidationError(
                    f"{name!r} is no argument of this model type: did you mean {meant[0]!r}? Others are passed on to "
                    "what loads the model."
                )
        if isinstance(pretrained, str | os.PathLike):
            pretrained = load(
                pretrained,
                backend=backend,
                dtype=dtype,
                device=_present(device),
                tokenizer=tokenizer,
                **kwargs,
            )
        elif kwargs:
            raise ValidationError(f"{', '.join(kwargs)} can't be given for a model that is loaded already.")
        model = pretrained.model if isinstance(pretrained, LoadedModel) else pretrained
        self.adapter = adapter_for(model)
        self.tokenizer = tokenizer if tokenizer is not None else self.adapter.tokenizer
        if self.tokenizer is None:
            raise ValidationError("The model carries no tokenizer: pass tokenizer=….")
        self.vector = None if vector is None else VectorStore().resolve(vector, model)
        self.strength = float(strength)
        self._plan = None if self.vector is None else self.vector.plan(self.adapter, self.strength)
        self._device = self.adapter.device
        self._rows = int(size) if (size := str(batch_size)).isdecimal() else DEFAULT_ROWS
        self._batch_tokens = batch_tokens
        self._max_length = max_length
        self._add_bos = add_bos_token
        self._prefix = prefix_token_id

    # What the harness asks about the model

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Most tokens that the model sees at once."""
        if self._max_length is not None:
            return int(self._max_length)
        return int(resolve_max_length(self.adapter.config, self.tokenizer))

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of a continuation where the task doesn't say."""
        return 256

    @property
    def batch_size(self) -> int:
        """Sequences that are generated together."""
        return self._rows

    @property
    def tokenizer_name(self) -> str:
        """For the keys of the harness's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Chat messages as text, by the tokenizer's template; without ``add_generation_prompt`` the last goes on."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the harness's record of the run."""
        norms = None if self.vector is None else {str(n): x for n, x in self.vector.norms().items()}
        return {
            "model_id": self.adapter.model_id,
            "model_num_parameters": sum(p.numel() for p in self.adapter.hf_model.parameters()),
            "model_dtype": str(self.adapter.dtype),
            "mechanex_version": __version__,
            "steering_strength": None if self.vector is None else self.strength,
            "steering_norm_by_layer": norms,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with special tokens unless told otherwise or the text begins with the prefix token itself."""
        if add_special_tokens is None:
            written = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if written else self._add_bos
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return split_texts(self.tokenizer, context, continuation, self.tok_encode)

    # The three kinds of request

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            for slab in _slabs(requests, SLAB):
                scored = score_pairs(
                    self.adapter,
                    [self._fitted(context, continuation) for _, context, continuation in slab],
                    edits=self._plan,
                    greedy=True,
                    batch_tokens=self._batch_tokens,
                )
                greedy = [bool(first.all()) for first in scored.greedy or ()]
                answers = list(zip(scored.sums.tolist(), greedy, strict=True))
                for (texts, _, _), answer in zip(slab, answers, strict=True):
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                found += answers
                bar.update(len(slab))
        return found

    def _fitted(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair without the beginning of a context that the model can't see; a continuation is never cut."""
        if not continuation:
            raise ValidationError("A request's continuation has no tokens; check the task's targets.")
        room = self.max_length + 1 - len(continuation)  # the last token is only predicted
        if room < 1:
            raise ValidationError(
                f"A request's continuation has {len(continuation)} tokens, more than the context of "
                f"{self.adapter.model_id} ({self.max_length})."
            )
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the model's context, as the harness cuts them."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in cut]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(score for score, _ in islice(scores, count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, each up to the first of its stop texts."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for members in groups.values():
                options = generation_options(requests[members[0]].args[1], self.max_gen_toks, self._eot_text)
                room = self.max_length - options["max_tokens"]
                if room < 1:
                    raise ValidationError(
                        f"The task asks for {options['max_tokens']} new tokens, and the context of "
                        f"{self.adapter.model_id} has {self.max_length}; lower max_gen_toks."
                    )
                ids = {i: self.tok_encode(requests[i].args[0])[-room:] for i in members}
                seed = options.pop("seed", None)
                for n, batch in enumerate(_slabs(sorted(members, key=lambda i: -len(ids[i])), self._rows)):
                    texts = generate_batch(
                        self.adapter,
                        self.tokenizer,
                        [ids[i] for i in batch],
                        vector=self.vector,
                        strength=self.strength,
                        # Row i of a batch draws with seed + i: no two requests draw alike.
                        seed=None if seed is None else seed + n * self._rows,
                        **options,
                    )
                    for i, text in zip(batch, texts, strict=True):
                        found[i] = text[len(prompt_text(self.tokenizer, ids[i])) :]
                        self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                    bar.update(len(batch))
        return found

    @property
    def _eot_text(self) -> str:
        return str(self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))


def _present(device: Any) -> Any:
    """The device, or None where it is a GPU that isn't there: the harness's command line asks for one by default."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        _log.warning(
            "There is no CUDA device here; the model runs on the default device instead of %s.", device
        )
        return None
    return device


def _slabs(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
