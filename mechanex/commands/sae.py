"""``mechanex sae``: autoencoders that are known, behaviors that are kept, and training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..engine.datasets import read_lines
from ..engine.models.resolve import LoadedModel, load
from ..engine.sae import registry
from ..engine.sae.explain import explain
from ..engine.sae.feature_stats import dashboard
from ..engine.sae.generate import generate_watched
from ..engine.sae.read import read_sae
from ..engine.sae.store import BehaviorStore
from ..engine.sae.traces import WatchedText, save_traces
from ..engine.sae.train import train_sae
from ..engine.sae.train_step import TrainingSettings
from ..engine.sampling import Options
from ..errors import NotFoundError, ValidationError
from .console import console, echo_json, model_text
from .text_files import text_in

__all__ = ["run_explain", "run_feature", "run_list", "run_show", "run_trace", "run_train"]


def run_list(as_json: bool) -> None:
    """Prints the autoencoders that are known by name, and the behaviors that are kept here."""
    known: list[dict[str, Any]] = [
        {"name": e.name, "models": list(e.models), "source": e.source, "note": e.note}
        for e in registry.entries()
    ]
    store = BehaviorStore()
    behaviors = [store.get(name).as_dict() for name in store.names()]
    if as_json:
        echo_json({"autoencoders": known, "behaviors": behaviors})
        return
    table = Table(title="autoencoders", title_justify="left")
    for column in ("name", "models", "note"):
        table.add_column(column, overflow="fold")
    for entry in registry.entries():
        table.add_row(entry.name, ", ".join(entry.models), entry.note)
    console().print(table)
    if not behaviors:
        click.echo(f"There are no behaviors in {store.folder}.")
        return
    table = Table(title="behaviors", title_justify="left")
    for column in ("name", "model", "point", "detector", "AUROC", "correction"):
        table.add_column(column, overflow="fold")
    for one in behaviors:
        area = one[f"{one['detector']}_figures"]["auroc"]
        texts = (one["behavior_name"], one["model"], one["point"], one["detector"])
        table.add_row(*map(model_text, texts), f"{area:.3f}", one["correction"]["way"])
    console().print(table)


def run_show(name: str, as_json: bool) -> None:
    """Prints all that is known of a behavior, or of an autoencoder by name, folder or Hub name.

    Raises:
        MechanexError: there is neither, or its files are damaged.
    """
    store = BehaviorStore()
    if name in store.names():
        one = store.get(name).as_dict()
    else:
        found = next((e for e in registry.entries() if e.name == name), None)
        sae = registry.load(name) if found is not None else read_sae(name)
        one = {
            "source": sae.source,
            "architecture": sae.architecture,
            "features": sae.n_features,
            "width": sae.d_in,
            "k": sae.k,
            "point": None if sae.point is None else str(sae.point),
            "model": sae.model,
            "normalization": sae.normalization,
        }
    if as_json:
        echo_json(one)
        return
    table = Table.grid(padding=(0, 2))
    for key, value in one.items():
        table.add_row(key, model_text(str(value)))
    console().print(table)


def run_feature(
    name: str,
    feature: int,
    model: str | None,
    data: Sequence[Path],
    contexts: int,
    options: dict[str, Any],
    pictures: Sequence[Path],
    as_json: bool,
) -> None:
    """Prints a feature of an autoencoder, or of a behavior's, at a glance.

    Raises:
        MechanexError: there is no such autoencoder or feature.
    """
    store = BehaviorStore()
    source = name
    if name in store.names():
        behavior = store.get(name)
        if behavior.sae is None:
            raise ValidationError(f"the behavior {name!r} has no autoencoder: name one.")
        source, model = behavior.sae, model or behavior.model
    sae = registry.load(source)
    model = model or sae.model
    if model is None:
        raise ValidationError(f"it isn't known which model {source} is for: give --model.")
    loaded = _loaded(model, options)
    found = dashboard(
        loaded.model, sae, feature, texts_in(data), tokenizer=loaded.tokenizer, contexts=contexts
    )
    for path in pictures:
        found.save(path)
    if as_json:
        echo_json(found.as_dict())
        return
    console().print(found.title)
    for one in found.passages:
        line = Text(f"  {one.strongest:7.3f}  ")
        for i, token in enumerate(one.tokens):
            line.append(_plain(token), "bold" if i == one.at else "")
        console().print(line, soft_wrap=True)
    for what, effects in (("raises", found.promoted), ("lowers", found.suppressed)):
        named = ", ".join(f"{_plain(one.token)!r} {one.change:+.2f}" for one in effects)
        console().print(Text(f"  {what}: {named or 'not known'}"), soft_wrap=True)
    for path in pictures:
        click.echo(f"Written to {path}.")


def run_explain(
    model: str,
    behavior: str,
    data: Path,
    features: int,
    contexts: int,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Prints the features that count most in a behavior, with the contexts of their strongest activation."""
    kept, loaded = BehaviorStore().get(behavior), _loaded(model, options)
    found = explain(
        loaded.model,
        kept,
        texts_in([data]),
        tokenizer=loaded.tokenizer,
        features=features,
        contexts=contexts,
    )
    if as_json:
        echo_json([{**vars(one), "contexts": [vars(c) for c in one.contexts]} for one in found])
        return
    for one in found:
        console().print(f"feature {one.feature}, weight {one.weight:.3g}")
        for c in one.contexts:
            line = Text.assemble("  ", f"{c.value:7.3f}  …", _plain(c.before), (_plain(c.token), "bold"))
            console().print(line + Text(_plain(c.after) + "…"), soft_wrap=True)


def run_trace(
    model: str,
    prompts: Sequence[str],
    behaviors: Sequence[str],
    action: str,
    decoding: dict[str, Any],
    options: dict[str, Any],
    pictures: Sequence[Path],
    as_json: bool,
) -> None:
    """Prints answers with the score of every token, detections and corrections marked.

    Args:
        model: its name.
        prompts: what to continue.
        behaviors: names of what is watched; none for all that are kept here.
        action: what is done where one shows.
        decoding: keyword arguments of ``engine.sampling.Options``.
        options: where and how the model is loaded.
        pictures: files to draw to.
        as_json: print JSON.
    """
    Options(**decoding)  # checked before the model is loaded
    store = BehaviorStore()
    names = list(behaviors) or store.names()
    if not names:
        raise NotFoundError(
            f"there are no behaviors in {store.folder}: mechanex.sae.create_behavior makes one."
        )
    chosen, loaded = [store.get(name) for name in names], _loaded(model, options)
    found = generate_watched(
        loaded.model,
        loaded.tokenizer,
        list(prompts),
        chosen,
        action=action,  # type: ignore[arg-type]
        **decoding,
    )
    for path in pictures:
        save_traces(found, path)
    if as_json:
        echo_json([{**vars(one), "trace": [vars(token) for token in one.trace]} for one in found])
        return
    for prompt, one in zip(prompts, found, strict=True):
        console().print(_marked(prompt, one), soft_wrap=True)
        console().print(f"  {one.summary}")
    for path in pictures:
        click.echo(f"Written to {path}.")


def run_train(
    model: str,
    data: Sequence[Path],
    out: Path,
    point: str | None,
    checkpoint: Path | None,
    settings: dict[str, Any],
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Trains an autoencoder, writes it, adds it to the user's list, and prints its report."""
    texts, loaded = texts_in(data), _loaded(model, options)
    trained = train_sae(
        loaded.model,
        texts,
        settings=TrainingSettings(**settings),
        point=point,
        tokenizer=loaded.tokenizer,
        out=out,
        checkpoint=checkpoint,
        progress=not as_json,
    )
    registry.add(registry.Entry(out.name, (loaded.name,), str(out.absolute())))
    if as_json:
        echo_json(trained.report)
        return
    table = Table.grid(padding=(0, 2))
    for key, value in trained.report.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console().print(table)
    click.echo(f"Written to {out}; `mechanex sae list` knows it as {out.name}.")


def texts_in(paths: Sequence[Path]) -> list[str]:
    """Texts of files: paragraphs of plain text, and the ``text`` or ``prompt`` with its answers of JSON lines.

    Raises:
        ValidationError: a file without texts, or a bad line.
    """
    found: list[str] = []
    for path in paths:
        if path.suffix == ".jsonl":
            found += [text for line in read_lines(path, _texts_of, None) for text in line]
            continue
        paragraphs = [part.strip() for part in text_in(path).split("\n\n") if part.strip()]
        if not paragraphs:
            raise ValidationError(f"{path} holds no text.")
        found += paragraphs
    return found


def _texts_of(line: dict[str, Any]) -> list[str]:
    if isinstance(line.get("text"), str):
        return [line["text"]]
    names = ("positive", "negative", "positive_answer", "negative_answer")
    answers = [line[name] for name in names if isinstance(line.get(name), str)]
    if not isinstance(line.get("prompt"), str) or not answers:
        raise ValueError("it has neither 'text' nor 'prompt' with an answer, each a text")
    return [line["prompt"] + answer for answer in answers]


def _loaded(model: str, options: dict[str, Any]) -> LoadedModel:
    return load(model, backend="transformers", **{k: v for k, v in options.items() if v is not None})


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _marked(prompt: str, one: WatchedText) -> Text:
    """The text, every token the redder the higher its highest score, corrected ones underlined."""
    line = Text(_plain(prompt))
    for token in one.trace:
        high = max(token.scores.values(), default=0.0)
        style = "bold red" if token.detected else "yellow" if high > 0.5 else ""
        line.append(_plain(token.text), f"{style} underline".strip() if token.corrected else style)
    return line
