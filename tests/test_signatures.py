"""Every documented name, argument, default and annotation, in the documented order; more is keyword-only."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import functools
import importlib
import inspect
import operator
import os
import typing
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

import click
import pytest
import torch

REQUIRED = inspect.Parameter.empty
KEYWORDS = "**"

# module: {name: (arguments with their defaults, {argument or "return": documented annotation})}
_LISTS = {"prompts": "list[str]", "positive_answers": "list[str]", "negative_answers": "list[str]"}
_BEHAVIOR = {"description": "str", "steering_vector_id": "str | None", "return": "dict[str, Any]"}
_OPTIMIZE: dict[str, Any] = {
    "model": REQUIRED,
    "datapoints": REQUIRED,
    "layer": REQUIRED,
    "eps": 1e-6,
    "lr": 0.01,
    "max_iters": None,
    "coldness": 0.7,
    "normalize_token_length": False,
    "only_hook_prompt": False,
    "use_transformer_lens": False,
    "tokenizer": None,
    "target_loss": None,
    "return_info": True,
    "do_target_loss_sum": True,
    "return_loss_history": False,
    "return_vec_history": False,
    "target_loss_target_iters": 1,
    "satisfice": False,
    "do_one_minus": True,
    "max_norm": None,
    "starting_norm": 1,
    "starting_vec": None,
    "vector_clamp": None,
    "affine_rank": None,
    "max_affine_norm": 2,
    "starting_affine_norm": 1,
    "noise_scale": None,
    "do_tangent_space_noise": True,
    "do_noise_abl_relu": False,
    "noise_iters": 1,
    "do_antipgd": False,
    "do_output_constr": False,
    "custom_output_constr_loss_func": None,
    "custom_output_constr_pre_loss_func": None,
    "output_constr_norm_initial_scale": 1,
    "output_constr_lr": None,
    "max_output_constr_iters": None,
    "debug": False,
}
_MINIBATCH: dict[str, Any] = {
    "model": REQUIRED,
    "tokenizer": REQUIRED,
    "prompts": REQUIRED,
    "layer": REQUIRED,
    "src_completions": None,
    "dst_completions": None,
    "minibatch_size": 5,
    "eps": 1e-6,
    "lr": 0.01,
    "max_iters": None,
    "coldness": 0.7,
    "target_loss": None,
    "target_loss_target_iters": 1,
    "satisfice": False,
    "starting_norm": 1,
    "max_norm": None,
    "affine_rank": None,
    "max_affine_norm": None,
    "debug": False,
    "return_info": True,
    "vector_clamp": None,
}
_LOGPROB: dict[str, Any] = {
    "model": REQUIRED,
    "prompt": REQUIRED,
    "completion": REQUIRED,
    "tokenizer": None,
    "coldness": 1,
    "return_all_probs": False,
    "do_one_minus": False,
    "do_log": True,
    "eps": 0,
    "use_transformer_lens": True,
    KEYWORDS: REQUIRED,
}
_BEAM: dict[str, Any] = {
    "model": REQUIRED,
    "tokenizer": REQUIRED,
    "dst_prompt": REQUIRED,
    "src_prompt": None,
    "k": 5,
    "iters": 5,
    "coldness": 1,
    "do_one_minus": False,
    "gc_interval": 3,
    "use_total_probs": False,
    "reverse": False,
    "return_log_probs": False,
    "return_token_probs": True,
    KEYWORDS: REQUIRED,
}


def required(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, REQUIRED)


DOCUMENTED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "base._BaseModule.__init__": (required("client"), {}),
    "generation.GenerationModule.generate": (
        {
            "prompt": REQUIRED,
            "max_tokens": 128,
            "sampling_method": "top-k",
            "top_k": 50,
            "top_p": 0.9,
            "steering_strength": 0,
            "steering_vector": None,
        },
        {
            "prompt": "str",
            "max_tokens": "int",
            "sampling_method": "str",
            "top_k": "int",
            "top_p": "float",
            "steering_strength": "float",
            "return": "str",
        },
    ),
    "sae.SAEModule.create_behavior": (
        {
            **required("behavior_name", "prompts", "positive_answers", "negative_answers"),
            "description": "",
            "steering_vector_id": None,
        },
        {"behavior_name": "str", **_LISTS, **_BEHAVIOR},
    ),
    "sae.SAEModule.create_behavior_from_jsonl": (
        {**required("behavior_name", "dataset_path"), "description": "", "steering_vector_id": None},
        {"behavior_name": "str", "dataset_path": "str", **_BEHAVIOR},
    ),
    "sae.SAEModule.list_behaviors": ({}, {"return": "list[dict[str, Any]]"}),
    "sae.SAEModule.generate": (
        {"prompt": REQUIRED, "max_new_tokens": 50, "behavior_names": None, "force_steering": None},
        {
            "prompt": "str",
            "max_new_tokens": "int",
            "behavior_names": "list[str] | None",
            "force_steering": "list[str] | None",
            "return": "str",
        },
    ),
    "client.Mechanex.signup": (required("email", "password"), {}),
    "client.Mechanex.login": (required("email", "password"), {}),
    "client.Mechanex.list_api_keys": ({}, {}),
    "client.Mechanex.create_api_key": ({"name": "Default Key"}, {"name": "str"}),
    "client.Mechanex.whoami": ({}, {}),
    "client.Mechanex.serve": (
        {"model": None, "host": "0.0.0.0", "port": 8000, "use_vllm": False, "corrected_behaviors": None},
        {"corrected_behaviors": "list[str] | None"},
    ),
    "client.Mechanex.set_local_model": (required("model"), {}),
    "client.Mechanex.load": ({**required("model_name"), KEYWORDS: REQUIRED}, {"model_name": "str"}),
    "client.Mechanex.load_model": ({**required("model_name"), KEYWORDS: REQUIRED}, {"model_name": "str"}),
    "client.Mechanex.unload": ({}, {}),
    "client.Mechanex.unload_model": ({}, {}),
    "client.Mechanex.get_huggingface_models": (
        {"host": "127.0.0.1", "port": 8000},
        {"host": "str", "port": "int", "return": "list[str]"},
    ),
    "steering.SteeringModule.generate_vectors": (
        {
            **required("prompts", "positive_answers", "negative_answers"),
            "layer_idxs": None,
            "method": "few-shot",
        },
        {**_LISTS, "layer_idxs": "list[int] | None", "method": "str", "return": "str"},
    ),
    "steering.SteeringModule.get_vectors": (
        required("vector_id"),
        {"vector_id": "str", "return": "dict[int, Tensor]"},
    ),
    "steering.SteeringModule.save_vectors": (
        required("vectors_or_id", "path"),
        {"vectors_or_id": "str | dict[int, Tensor]", "path": "str"},
    ),
    "steering.SteeringModule.load_vectors": (
        required("path"),
        {"path": "str", "return": "dict[int, Tensor]"},
    ),
    "steering.SteeringModule.generate_from_jsonl": (
        {"dataset_path": REQUIRED, "layer_idxs": None, "method": "few-shot"},
        {"dataset_path": "str", "layer_idxs": "list[int] | None", "method": "str", "return": "str"},
    ),
    "utils.steering_opt.hf_hooks_contextmanager": (required("model", "hook_infos"), {}),
    "utils.steering_opt.make_abl_mat": (required("v"), {}),
    "utils.steering_opt.make_steering_hook_hf": ({**required("vector_"), "matrix": None, "token": None}, {}),
    "utils.steering_opt.make_steering_hook_tflens": (
        {**required("vector"), "matrix": None, "token": None},
        {},
    ),
    "utils.steering_opt.make_activs_hook_hf": (required("outlist"), {}),
    "utils.steering_opt.get_completion_logprob": (_LOGPROB, {}),
    "utils.steering_opt.get_completion_logprob_hf": (
        {**required("model", "prompt", "completion", "tokenizer"), KEYWORDS: REQUIRED},
        {},
    ),
    "utils.steering_opt.sample_most_likely_completions_hf": (_BEAM, {}),
    "utils.steering_opt.optimize_vector": (_OPTIMIZE, {}),
    "utils.steering_opt.make_melbo_loss_funcs": (required("target_layer"), {}),
    "utils.steering_opt.optimize_vector_minibatch_hf": (_MINIBATCH, {}),
    "model.ModelModule.get_graph": ({}, {"return": "list[dict[str, Any]]"}),
    "model.ModelModule.get_paths": ({}, {"return": "list[str]"}),
    "raag.truncate_text": (required("text", "max_width", "font_properties"), {}),
    "raag.add_glow_effect": (
        {**required("patch", "ax", "glow_color"), "n_layers": 10, "max_alpha": 0.3, "diff_linewidth": 1.5},
        {},
    ),
    "raag.RAAGModule.generate": (
        {**required("qa_entries"), "docs": None, "pinecone_index_name": None},
        {
            "qa_entries": "list[dict]",
            "docs": "list[dict] | None",
            "pinecone_index_name": "str | None",
            "return": "dict",
        },
    ),
    "attribution.AttributionModule.compute_scores": (
        {**required("clean_prompt", "corrupted_prompt"), "target_module_paths": None},
        {
            "clean_prompt": "str",
            "corrupted_prompt": "str",
            "target_module_paths": "list[str] | None",
            "return": "dict",
        },
    ),
}

# Arguments of ours that stand before **kwargs, where only keyword-only ones could follow the documented names.
OURS = {
    "client.Mechanex.load_model": ["backend"],
    "client.Mechanex.set_local_model": ["tokenizer"],
}


def found(path: str) -> Any:
    """The object with this documented path, found from the package as a user does."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            one = importlib.import_module(".".join(["mechanex", *parts[:cut]]))
            for part in parts[cut:]:
                one = inspect.getattr_static(one, part) if isinstance(one, type) else getattr(one, part)
            return getattr(one, "__func__", one)
    raise AssertionError(path)


@pytest.mark.parametrize("path", DOCUMENTED)
def test_arguments_and_defaults_are_the_documented_ones(path: str) -> None:
    expected = dict(DOCUMENTED[path][0])
    takes_keywords = expected.pop(KEYWORDS, None) is not None
    static = isinstance(_raw(path), staticmethod)
    parameters = list(inspect.signature(found(path)).parameters.values())
    if _in_class(path) and not static:
        parameters = parameters[1:]
    ours = OURS.get(path, [])
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [*expected, *ours]
    for parameter in positional[: len(expected)]:
        default = expected[parameter.name]
        same = parameter.default == default and repr(parameter.default) == repr(default)
        assert same and isinstance(parameter.default, type(default)), parameter.name
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.name in ours:
            assert parameter.default is not REQUIRED, parameter.name
    if takes_keywords:
        assert any(p.kind is p.VAR_KEYWORD for p in parameters)
    assert not any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters)
    assert static is (path == "client.Mechanex.get_huggingface_models")


@pytest.mark.parametrize("path", [path for path in DOCUMENTED if DOCUMENTED[path][1]])
def test_annotations_mean_what_is_documented(path: str) -> None:
    """An argument takes what is documented, or more; a result is what is documented, or narrower."""
    annotations = inspect.get_annotations(found(path))
    for name, text in DOCUMENTED[path][1].items():
        ours, documented = _evaluated(annotations[name]), _evaluated(text)
        if name == "return":
            # A stream of text, a list of texts, and a trace beside one, are asked for by arguments of ours.
            asked = (Iterator, found("engine.sae.generate.WatchedText"))
            several = [list[str]] if documented is str else []
            whole = (
                one
                for one in _alternatives(ours)
                if (get_origin(one) or one) not in asked and one not in several
            )
            ours = functools.reduce(operator.or_, whole)
            assert _within(ours, documented), (name, ours, documented)
        else:
            assert _within(documented, ours), (name, ours, documented)


@pytest.mark.parametrize(
    "path", [*DOCUMENTED, "utils.steering_opt.TrainingDatapoint", "cli.signup", "errors.APIError"]
)
def test_everything_documented_has_a_docstring(path: str) -> None:
    assert path.endswith("__init__") or inspect.getdoc(found(path)) or found(path).help


def test_a_training_datapoint_has_the_documented_fields() -> None:
    fields = dataclasses.fields(found("utils.steering_opt.TrainingDatapoint"))
    documented = [
        "prompt",
        "src_completions",
        "dst_completions",
        "src_completions_target_losses",
        "dst_completions_target_losses",
        "token",
        "is_negative",
    ]
    assert [field.name for field in fields][: len(documented)] == documented
    one = found("utils.steering_opt.TrainingDatapoint")("a prompt", dst_completions=["b"])
    assert one.token is None and one.is_negative is False and not one.src_completions


def test_modules_have_the_documented_base() -> None:
    base = found("base._BaseModule")
    for path in {path.rpartition(".")[0] for path in DOCUMENTED if "Module." in path}:
        assert issubclass(found(path), base)


def test_errors_form_the_documented_tree() -> None:
    names = ("AuthenticationError", "APIError", "NotFoundError", "RateLimitError", "ValidationError")
    root = found("errors.MechanexError")
    assert root.__bases__ == (Exception,)
    for name in names:
        assert root in found(f"errors.{name}").__bases__
        assert not any(issubclass(found(f"errors.{name}"), found(f"errors.{o}")) for o in names if o != name)


COMMANDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "signup": (["obj", "email", "password"], {"email": None, "password": None}),
    "login": (["obj", "email", "password"], {"email": None, "password": None}),
    "list_api_keys": ([], {}),
    "create_api_key": (["name"], {"name": "Default Key"}),
    "whoami": ([], {}),
    "logout": ([], {}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_the_documented_arguments_and_options(name: str) -> None:
    arguments, options = COMMANDS[name]
    main = found("cli.main")
    command = found(f"cli.{name}")
    assert isinstance(main, click.Group) and main.commands[name.replace("_", "-")] is command
    # click's decorators that pass something in keep the function under __wrapped__.
    parameters = inspect.signature(command.callback).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == arguments
    given = {option.name: option for option in command.params}
    for option, default in options.items():
        assert f"--{option}" in given[option].opts
        if default is not None:
            assert given[option].default == default
    if "password" in options:
        assert given["password"].hide_input and given["password"].prompt and given["email"].prompt
    assert all(not option.required for option in command.params if option.name not in options)


def test_the_group_takes_its_context() -> None:
    assert list(inspect.signature(inspect.unwrap(found("cli.main").callback)).parameters) == ["ctx"]


# Annotations


def _raw(path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return inspect.getattr_static(found(owner), name) if _in_class(path) else None


def _in_class(path: str) -> bool:
    return path.split(".")[-2][:1].isupper() or "_BaseModule" in path


def _evaluated(annotation: Any) -> Any:
    if not isinstance(annotation, str):
        return annotation
    from mechanex.engine.sae.generate import WatchedText
    from mechanex.engine.text import Prompt
    from mechanex.engine.vectors import SteeringVector

    names = {**vars(typing), **vars(collections.abc), "os": os, "Tensor": torch.Tensor, "torch": torch}
    source = str | os.PathLike[str] | Mapping[int, torch.Tensor] | SteeringVector
    return eval(
        annotation,
        names
        | {
            "Prompt": Prompt,
            "SteeringVector": SteeringVector,
            "VectorSource": source,
            "WatchedText": WatchedText,
        },
    )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _within(narrow: Any, wide: Any) -> bool:
    """Whether every value of the one is a value of the other, for the annotations that occur."""
    if wide is Any or narrow == wide or (narrow, wide) == (int, float):
        return True
    if len(_alternatives(narrow)) > 1 or len(_alternatives(wide)) > 1:
        return all(any(_within(one, other) for other in _alternatives(wide)) for one in _alternatives(narrow))
    kinds = [get_origin(one) or one for one in (narrow, wide)]
    if not all(isinstance(kind, type) for kind in kinds) or not issubclass(*kinds):
        return False
    inside = [get_args(one) for one in (narrow, wide)]
    # A list without arguments is one of anything; lists and dicts that are only read are covariant.
    return not all(inside) or all(map(_within, *inside))
