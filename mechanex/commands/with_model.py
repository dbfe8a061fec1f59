"""The commands that load a model: steer, score, cite, optimize and serve. What they do is in modules of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .decoding import decoding_of, decoding_options
from .options import (
    chat_option,
    complete_dataset,
    complete_model,
    device_option,
    dtype_option,
    json_option,
    layer_option,
    model_argument,
    seed_option,
    split_option,
)

__all__ = ["chat", "cite", "optimize", "score", "serve", "steer"]


@click.command()
@model_argument
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may be repeated.")
@chat_option("may be repeated")
@click.option(
    "--data",
    shell_complete=complete_dataset,
    help="Contrastive examples: a JSONL file, or a set such as calm_angry.",
)
@split_option
@click.option(
    "--vector", type=click.Path(), help="A vector file, or a stored vector's id, in place of --data."
)
@layer_option("may be repeated")
@click.option(
    "--method",
    type=click.Choice(["caa", "few-shot", "pca", "probe"]),
    default="caa",
    show_default=True,
    help="How --data makes a vector.",
)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the vector.")
@click.option(
    "--guard",
    type=click.FloatRange(min=0),
    help="Most nats by which the vector may move a token's distribution.",
)
@click.option(
    "--save", type=click.Path(path_type=Path), help="Keep the vector: .safetensors, .json or .gguf."
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=40, show_default=True, help="Most tokens to write."
)
@decoding_options
@seed_option
@device_option
@dtype_option
@json_option
def steer(**options: Any) -> None:
    """Generate with and without a steering vector, side by side.

    MODEL is mx-tiny (bundled), a Hugging Face name or a folder. The vector is computed from --data, or read
    from --vector:

    \b
      mechanex steer mx-tiny --data calm_angry --layer 4 --strength -2 \\
        --prompt "Anna went to the market on Friday."
    """
    if (options["data"] is None) == (options["vector"] is None):
        raise click.UsageError("Give either --data, to compute a vector, or --vector, to read one.")
    if options["vector"] is not None and (options["layers"] or options["split"]):
        raise click.UsageError("--layer and --split go with --data; a vector names its own layers.")
    from .steer import run_steer

    decoding = decoding_of(options)
    run_steer(**options, decoding=decoding)


@click.command()
@model_argument
@click.option("--vector", type=click.Path(), help="Steer by this file or stored vector's id.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the vector.")
@click.option(
    "--guard",
    type=click.FloatRange(min=0),
    help="Most nats by which the vector may move a token's distribution.",
)
@click.option("--system", help="A system prompt, for models with a chat template.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Most tokens of an answer.",
)
@decoding_options
@seed_option
@device_option
@dtype_option
def chat(**options: Any) -> None:
    """Talk with a model, steered, and turn the strength meanwhile.

    \b
      mechanex chat smollm2-135m --vector calm.safetensors --strength 0.5

    /help lists what can be typed there: /strength, /vector, /compare, /budget, /save, /reset, /quit. Ctrl-C stops an
    answer, and not the chat.
    """
    from .chat import run_chat

    decoding = decoding_of(options)
    run_chat(**options, decoding=decoding)


@click.command()
@model_argument
@click.option("--prompt", help="The text before the completions.")
@chat_option("in place of --prompt")
@click.option(
    "--completion", "completions", multiple=True, required=True, help="Text to score; may be repeated."
)
@click.option("--vector", type=click.Path(), help="Steer by this file or stored vector's id.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the vector.")
@click.option("--coldness", type=float, default=1.0, show_default=True, help="Multiplies the logits.")
@device_option
@dtype_option
@json_option
def score(**options: Any) -> None:
    """Log-probabilities of completions after a prompt.

    \b
      mechanex score mx-tiny --prompt "Anna went to the" --completion " market" --completion " moon"
    """
    from .score import run_score

    run_score(**options)


@click.command()
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--question", required=True, help="What is asked about the files.")
@click.option("--answer", help="The answer to trace; by default the model writes one.")
@click.option(
    "--model",
    default="mx-tiny",
    show_default=True,
    shell_complete=complete_model,
    help="Who reads the files.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Most tokens of an answer.",
)
@seed_option
@device_option
@dtype_option
@json_option
def cite(**options: Any) -> None:
    """Say which sentences of text files an answer rests on, best first.

    A sentence counts by what the answer loses, in nats, when question and answer can't attend to it.

    \b
      mechanex cite notes.txt letter.txt --question "Who has the bag?"
    """
    from .cite import run_cite

    run_cite(**options)


@click.command()
@model_argument
@click.option(
    "--data",
    shell_complete=complete_dataset,
    required=True,
    help="Datapoints: a JSONL file, or a set such as rome_delhi.",
)
@split_option
@layer_option("repeated: the same vector at each")
@click.option("--max-iters", type=click.IntRange(min=0), default=500, show_default=True, help="Most steps.")
@click.option("--target-loss", type=float, help="Stop when the loss is this low.")
@click.option("--lr", type=float, default=0.01, show_default=True, help="Adam's learning rate.")
@click.option("--coldness", type=float, default=0.7, show_default=True, help="Multiplies the logits.")
@click.option("--eps", type=float, default=1e-6, show_default=True, help="Is added to probabilities.")
@click.option("--starting-norm", type=float, default=1.0, show_default=True, help="Norm of the random start.")
@click.option("--max-norm", type=float, help="Keep the vector at most this long.")
@click.option("--noise-scale", type=float, help="Standard deviation of noise on the activations.")
@click.option(
    "--normalize", "normalize_completion_length", is_flag=True, help="Divide losses by token counts."
)
@click.option("--only-hook-prompt", is_flag=True, help="Steer the prompts' tokens only.")
@click.option(
    "--minimize-norm", "do_output_constr", is_flag=True, help="Then shorten the vector at that loss."
)
@seed_option
@click.option(
    "--eval",
    "held_out",
    shell_complete=complete_dataset,
    help="Held-out datapoints to measure on: a file, or a bundled set.",
)
@click.option("--eval-split", help="Use only the lines of --eval whose split is this.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/optimized"),
    show_default=True,
    help="Folder for the vector, the report, the loss curve and the checkpoint.",
)
@click.option("--resume", is_flag=True, help="Go on with the optimization in --out, bit for bit.")
@click.option("--force", is_flag=True, help="Start anew where --out holds an optimization.")
@device_option
@dtype_option
@json_option
@click.pass_context
def optimize(ctx: click.Context, /, **options: Any) -> None:
    """Optimize a steering vector by gradient descent.

    Each line of --data is an object with a prompt, dst_completions to make likely and src_completions to make
    unlikely; token ([start, stop] or an index) and is_negative are optional. Ctrl-C keeps the best vector so far.

    \b
      mechanex optimize mx-tiny --data rome_delhi --split promote --layer 2 --lr 0.05 --coldness 1 \\
        --target-loss 0.5 --eval rome_delhi --eval-split promote-heldout
    """
    if options["resume"] and options["force"]:
        raise click.UsageError("--resume goes on and --force starts anew: give one of them.")
    if options["eval_split"] and options["held_out"] is None:
        raise click.UsageError("--eval-split goes with --eval.")
    from .optimize import run_optimize

    ctx.exit(run_optimize(**options))


@click.command()
@model_argument
@click.option("--host", default="0.0.0.0", show_default=True, help="Any but a loopback address needs a key.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option(
    "--vectors",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of vector files for every client; their names are the ids.",
)
@click.option(
    "--behaviors",
    shell_complete=complete_dataset,
    multiple=True,
    help="A JSONL file of contrastive examples, a bundled set, or a file of a behavior; may be repeated.",
)
@click.option(
    "--corrected-behavior",
    "corrected_behaviors",
    multiple=True,
    help="A behavior that is corrected in every answer; may be repeated.",
)
@click.option(
    "--pinecone-index",
    "pinecone_indexes",
    multiple=True,
    help="A Pinecone index that accounts may have documents read from; may be repeated.",
)
@click.option("--database", show_default="SQLite under MECHANEX_HOME", help="SQLAlchemy URL of the accounts.")
@click.option("--model-name", show_default="MODEL", help="What clients call the model.")
@click.option(
    "--max-batch", type=click.IntRange(min=1), show_default="64", help="Most requests decoded together."
)
@click.option(
    "--max-waiting", type=click.IntRange(min=1), show_default="512", help="Most that wait; then 429."
)
@click.option(
    "--account-running",
    type=click.IntRange(min=1),
    show_default="any number",
    help="Most requests of one account decoded together; its others wait.",
)
@click.option(
    "--account-tokens-per-minute",
    type=click.IntRange(min=1),
    show_default="any number",
    help="Tokens of prompts and answers that one account has in a minute; then 429.",
)
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    multiple=True,
    help="An address or network of proxies whose X-Forwarded-For is believed; may be repeated.",
)
@click.option(
    "--cors-origin", "cors_origins", multiple=True, help="A web origin that may call; may be repeated."
)
@click.option("--open-signup", is_flag=True, help="Let anyone who reaches the server make an account.")
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log too.")
@click.option("--tp", is_flag=True, help="Split the model over the processes that torchrun has started.")
@click.option("--use-vllm", is_flag=True, help="Run the model in vLLM.")
@click.option(
    "--vllm-arg",
    "vllm_args",
    multiple=True,
    help="An argument of vLLM's own server, such as --tensor-parallel-size=2; may be repeated.",
)
@device_option
@dtype_option
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Of the log on stderr, one JSON object a line.",
)
def serve(**options: Any) -> None:
    """Serve MODEL: OpenAI's API under /v1, and the Axionic API.

    Clients of an address that other machines reach need a key: MECHANEX_SERVER_KEY, one of an account, or the
    one that is made and printed when there is none. Ctrl-C ends the server, with exit code 0.

    \b
      mechanex serve mx-tiny --host 127.0.0.1 --behaviors calm_angry
    """
    from .serve import run_serve

    run_serve(**options)
