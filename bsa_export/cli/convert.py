"""bsa-convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bsa_export.cli import command
from bsa_export.cli.progress import Progress, is_watched
from bsa_export.text import Lines, aligned, size

if TYPE_CHECKING:
    from bsa_export.conversion.options import Options

COUNTS = {
    "--num-local-blocks": "windowed, fixed: blocks of an aligned window.",
    "--num-sliding-window-blocks": "windowed, bigbird, bslongformer, local: width of the sliding window in blocks.",
    "--num-global-blocks": "fixed, bigbird: number of global blocks (in fixed: for each window).",
    "--num-random-blocks": "bigbird, variable: number of random blocks in each row.",
    "--num-different-global-patterns": "fixed: number of choices of global blocks; the heads alternate between them.",
}
LISTS = {
    "--local-window-blocks": "variable: blocks of the first, second, ... window; the last one repeats. Example: 4,8",
    "--global-block-indices": "variable, bslongformer: global blocks, or the first of each range. Example: 0,5",
    "--global-block-end-indices": "variable, bslongformer: the end of each range, exclusive. Example: 1,8",
}
FLAGS = {
    "--horizontal-global-attention": "fixed, variable: global blocks also attend to all blocks.",
    "--different-layout-per-head": "Use a different layout for each head.",
}
MODES = ("windowed", "dense", "fixed", "variable", "bigbird", "bslongformer", "local", "custom")


def _integers(_: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected integers such as 0,5, found {str(text)[:80]!r}", param=parameter) from None


def _size(_: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    from bsa_export.checkpoint.writer import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=parameter) from None


def _length(_: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    from bsa_export.conversion.options import parse_length

    try:
        return None if text is None else parse_length(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=parameter) from None


def _dtype(_: click.Context, parameter: click.Parameter, text: str) -> str:
    from bsa_export.conversion.options import parse_dtype

    try:
        return parse_dtype(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=parameter) from None


def _list_families(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from bsa_export.bert.families import FAMILIES

        click.echo("\n".join(FAMILIES))
        context.exit()


def _mode_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the parameters of DeepSpeed's classes as options."""
    options = [
        *(click.option(name, type=click.IntRange(min=0), metavar="N", help=text) for name, text in COUNTS.items()),
        *(click.option(name, callback=_integers, metavar="N,N", help=text) for name, text in LISTS.items()),
        *(click.option(name, is_flag=True, default=None, help=text) for name, text in FLAGS.items()),
        click.option(
            "--attention",
            type=click.Choice(["bidirectional", "unidirectional"]),
            help="Whether a token attends to later ones.  [default: bidirectional]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@command("bsa-convert")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path), required=False)
@click.option(
    "--max-length",
    callback=_length,
    metavar="N",
    help="Tokens that the new model reads, such as 4096 or 4k.  [default: 8 times the source's length, or that length "
    "itself from 4,096 on]",
)
@click.option("--mode", type=click.Choice(MODES), help="Which blocks are kept.  [default: windowed]")
@click.option(
    "--window",
    callback=_length,
    metavar="TOKENS",
    help="windowed, local: tokens of a window, such as 512 or 1k. In windowed, inputs up to that length keep the "
    "source's outputs.  [default: windowed: the source's length]",
)
@click.option(
    "--block",
    type=click.IntRange(min=1),
    metavar="N",
    help="Side of a block in tokens.  [default: 64, or 32 or 16 where 64 does not divide the lengths]",
)
@click.option(
    "--sparsity",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSON with the mode and its parameters: a DeepSpeed config, or its "sparse_attention" section.',
)
@click.option(
    "--layout",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="custom: .npy or .safetensors with one layout for all layers, or one for each.",
)
@_mode_options
@click.option("--different-layout-per-layer", is_flag=True, help="Draw other random blocks for each layer.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed for random blocks.")
@click.option(
    "--positions",
    type=click.Choice(["tile", "interpolate"]),
    default="tile",
    show_default=True,
    help="How position embeddings are extended.",
)
@click.option(
    "--dtype",
    callback=_dtype,
    default="keep",
    show_default=True,
    metavar="[keep|fp32|fp16|bf16]",
    help="Dtype for floating tensors; float32, float16, half and bfloat16 are accepted too.",
)
@click.option(
    "--prefix", metavar="NAME", help="Prefix of the encoder to convert, such as query.bert, if SOURCE holds several."
)
@click.option(
    "--ignore-tensors",
    multiple=True,
    metavar="PATTERN",
    help="Leave out tensors that the model's class would not use, such as 'bert.embeddings.rank*'. Repeatable.",
)
@click.option(
    "--max-shard-size",
    callback=_size,
    metavar="SIZE",
    help="Largest file of weights, such as 5GB.  [default: one file]",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="config.json, if it is not next to the weights.",
)
@click.option(
    "--trained-from",
    metavar="CONVERSION",
    help="The converted folder or repository that SOURCE was trained from, whose source and license are kept. "
    "[default: looked for in SOURCE and in the folders around it]",
)
@click.option(
    "--to-dense",
    is_flag=True,
    help="Convert back: SOURCE is a converted folder, and TARGET becomes the dense checkpoint.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the layouts into a .png, .svg or .pdf."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the last line only.")
@click.option("-v", "--verbose", is_flag=True, help="Print names of tensors too, as --dry-run does.")
@click.option(
    "--list-families",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_families,
    help="List the families.",
)
@click.pass_context
def main(
    context: click.Context, source: str, target: Path | None, to_dense: bool, as_json: bool, **choices: Any
) -> None:
    """Convert a dense BERT checkpoint to block-sparse attention.

    SOURCE is a file of weights, an index of shards, a folder, or a repository of the Hugging Face Hub: org/name,
    org/name@revision, org/name/folder, or the address of its page. TARGET is the folder to make.

    By default the new model reads 8 times as many tokens as the source, 4,096 for 512. Inputs that the source could
    read keep its outputs.
    """
    if choices["quiet"] and choices["verbose"]:
        raise click.UsageError("--quiet and --verbose cannot be combined.")
    if target is None and not choices["dry_run"]:
        raise click.UsageError("Missing argument 'TARGET'.")
    if to_dense:
        if target is None:
            raise click.UsageError("Missing argument 'TARGET'.")
        _to_dense(context, source, target, as_json, choices)
    else:
        _convert(source, target, as_json, choices)


def _convert(source: str, target: Path | None, as_json: bool, choices: dict[str, Any]) -> None:
    from bsa_export.checkpoint.atomic_folder import AtomicFolder
    from bsa_export.conversion import convert, summary
    from bsa_export.converted.records import to_json
    from bsa_export.hub.source import find_source
    from bsa_export.sparsity import pictures

    options = _options(choices)
    if choices["plot"]:
        pictures.check_picture(choices["plot"])
    found = find_source(source, progress=is_watched())
    named = choices["trained_from"]
    ancestor = None if named is None else find_source(named, progress=is_watched())
    if target is None or choices["dry_run"]:
        if target is not None:
            AtomicFolder(target, overwrite=choices["overwrite"]).refuse_target()
        _, planned, _ = convert.plan_source(found, options, choices["config_path"], ancestor)
        content, lines = summary.plan_content(planned), summary.plan_lines(planned)
    else:
        with Progress() as progress:
            done = convert.convert_source(
                found,
                target,
                options,
                config_path=choices["config_path"],
                trained_from=ancestor,
                max_shard_size=choices["max_shard_size"],
                overwrite=choices["overwrite"],
                progress=progress.begin(unit="B"),
            )
        planned = done.plan
        content = summary.plan_content(planned) | to_json(done.record) | {"seconds": done.seconds}
        lines = summary.conversion_lines(done, names=choices["verbose"])
    _print(lines, content, as_json, choices["quiet"])
    if choices["plot"]:
        title = f"{planned.sparsity.mode}, block {planned.sparsity.block}, {planned.max_length:,} tokens"
        pictures.plot_layouts(choices["plot"], planned.layouts, planned.sparsity.block, title, planned.source_length)


def _to_dense(context: click.Context, source: str, target: Path, as_json: bool, choices: dict[str, Any]) -> None:
    allowed = {
        "to_dense",
        "source",
        "target",
        "max_length",
        "max_shard_size",
        "overwrite",
        "as_json",
        "quiet",
        "verbose",
    }
    for name in context.params:
        if name not in allowed and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--to-dense does not accept --{name.replace('_', '-')}.")
    from bsa_export.conversion.to_dense import to_dense

    with Progress() as progress:
        done = to_dense(
            source,
            target,
            max_length=choices["max_length"],
            max_shard_size=choices["max_shard_size"],
            overwrite=choices["overwrite"],
            progress=progress.begin(unit="B"),
        )
    dense = done.plan
    nbytes = sum(row.nbytes for row in dense.tensors.values())
    content = {
        "tensors": len(dense.tensors),
        "bytes": nbytes,
        "max_length": dense.max_length,
        "notes": dense.notes,
        "seconds": done.seconds,
    }
    lines = [
        ("tensors", f"{len(dense.tensors)}, {size(nbytes)}"),
        ("longest input", f"{dense.max_length:,} tokens"),
        *(("note", note) for note in dense.notes),
        ("written", f"{target} in {done.seconds:.2f} s"),
    ]
    _print(lines, content, as_json, choices["quiet"])


def _print(lines: Lines, content: dict[str, Any], as_json: bool, quiet: bool) -> None:
    click.echo(json.dumps(content, indent=2) if as_json else aligned(lines[-1:] if quiet else lines))


def _options(choices: dict[str, Any]) -> Options:
    """The options of a conversion. Raises click.UsageError for those that do not go together."""
    from bsa_export.conversion.convert import sparsity_section
    from bsa_export.conversion.layouts import WINDOW_MODES, WINDOW_PARAMETERS
    from bsa_export.conversion.options import Options
    from bsa_export.sparsity.configs import MODES as CONFIGS

    names = [option.removeprefix("--").replace("-", "_") for option in (*COUNTS, *LISTS, *FLAGS, "--attention")]
    given = {name: choices[name] for name in names if choices[name] is not None}
    section = None
    mode = choices["mode"] or ("custom" if choices["layout"] else "windowed")
    if choices["sparsity"]:
        clash = next((name for name in ("mode", "window", "block", *given) if choices[name] is not None), None)
        if clash:
            raise click.UsageError(f"--sparsity and --{clash.replace('_', '-')} cannot be combined.")
        section = sparsity_section(choices["sparsity"])
    if choices["window"] is not None:
        if mode not in WINDOW_MODES:
            raise click.UsageError(f"--mode {mode} has no --window.")
        if both := next((name for name in WINDOW_PARAMETERS if name in given), None):
            raise click.UsageError(f"--window and --{both.replace('_', '-')} cannot be combined.")
    allowed = CONFIGS[mode].parameter_names()
    wrong = next((name for name in given if name not in allowed), None)
    if wrong:
        raise click.UsageError(f"--mode {mode} has no --{wrong.replace('_', '-')}.")
    return Options(
        max_length=choices["max_length"],
        mode=choices["mode"],
        window=choices["window"],
        block=choices["block"],
        parameters=given,
        section=section,
        layout=choices["layout"],
        seed=choices["seed"],
        different_layout_per_layer=choices["different_layout_per_layer"],
        positions=choices["positions"],
        dtype=choices["dtype"],
        prefix=choices["prefix"],
        ignore_tensors=choices["ignore_tensors"],
    )
