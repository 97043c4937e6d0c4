"""bsa-convert."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click

from bsa_export.cli import command

COUNTS = {
    "--num-local-blocks": "windowed, fixed: blocks of an aligned window.",
    "--num-sliding-window-blocks": "windowed, bigbird, bslongformer, local: width of the sliding window.",
    "--num-global-blocks": "fixed, bigbird: global blocks (of each window in fixed).",
    "--num-random-blocks": "bigbird, variable: random blocks of a row.",
    "--num-different-global-patterns": "fixed: heads take turns at so many choices of global blocks.",
}
LISTS = {
    "--local-window-blocks": "variable: blocks of the first, second, ... window; the last repeats. 4,8",
    "--global-block-indices": "variable, bslongformer: global blocks, or where they start. 0,5",
    "--global-block-end-indices": "variable, bslongformer: where they end, exclusive. 1,8",
}
FLAGS = {
    "--horizontal-global-attention": "fixed, variable: global blocks also attend to all.",
    "--different-layout-per-head": "A layout of its own for each head.",
}
MODES = ("windowed", "dense", "fixed", "variable", "bigbird", "bslongformer", "local", "custom")


def _integers(_, parameter: click.Parameter, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected integers such as 0,5, found {text!r}", param=parameter) from None


def _size(_, parameter: click.Parameter, text: str | None) -> int | None:
    from bsa_export.checkpoint.writer import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=parameter) from None


def _list_families(context: click.Context, _, wanted: bool) -> None:
    if wanted:
        from bsa_export.families import FAMILIES

        click.echo("\n".join(FAMILIES))
        context.exit()


def _mode_options(function):
    """Adds the parameters of DeepSpeed's classes as options."""
    options = [
        *(click.option(name, type=click.IntRange(min=0), metavar="N", help=text) for name, text in COUNTS.items()),
        *(click.option(name, callback=_integers, metavar="N,N", help=text) for name, text in LISTS.items()),
        *(click.option(name, is_flag=True, default=None, help=text) for name, text in FLAGS.items()),
        click.option(
            "--attention",
            type=click.Choice(["bidirectional", "unidirectional"]),
            help="Whether a token sees later ones.  [default: bidirectional]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@command("bsa-convert")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path), required=False)
@click.option("--max-length", type=click.IntRange(min=1), metavar="N", help="Tokens to read.  [default: the source's]")
@click.option("--mode", type=click.Choice(MODES), help="Which blocks are kept.  [default: windowed]")
@click.option("--block", type=click.IntRange(min=1), metavar="N", help="Side of a block in tokens.  [default: 64]")
@click.option(
    "--sparsity",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSON with the mode and its parameters: a DeepSpeed config, or its "sparse_attention" section.',
)
@click.option(
    "--layout",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="custom: .npy or .safetensors with a layout for all layers or one a layer.",
)
@_mode_options
@click.option("--different-layout-per-layer", is_flag=True, help="Random blocks of its own for each layer.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of random blocks.")
@click.option(
    "--positions",
    type=click.Choice(["tile", "interpolate"]),
    default="tile",
    show_default=True,
    help="How position embeddings are extended.",
)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "fp32", "fp16", "bf16"]),
    default="keep",
    show_default=True,
    help="Of floating tensors.",
)
@click.option(
    "--max-shard-size", callback=_size, metavar="SIZE", help="Of a file of weights, such as 5GB.  [default: one file]"
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="config.json, if not beside the weights.",
)
@click.option(
    "--to-dense", is_flag=True, help="The way back: SOURCE is a converted folder, TARGET gets the dense checkpoint."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the layouts into a .png, .svg or .pdf."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--list-families",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_families,
    help="List the families.",
)
@click.pass_context
def main(context: click.Context, source: str, target: Path | None, to_dense: bool, as_json: bool, **choices) -> None:
    """Convert a dense BERT checkpoint to block-sparse attention.

    SOURCE is a file of weights, an index of shards, a folder, or a repository of the Hugging Face Hub (org/name or
    org/name@revision). TARGET is the folder to make.

    By default the new model gives the source's outputs for every text that the source could read; --max-length lets it
    read longer ones.
    """
    if target is None and not choices["dry_run"]:
        raise click.UsageError("Missing argument 'TARGET'.")
    if to_dense:
        _to_dense(context, source, target, as_json, choices)
    else:
        _convert(source, target, as_json, choices)


def _convert(source: str, target: Path | None, as_json: bool, choices: dict) -> None:
    options = _options(choices)
    from bsa_export import convert, report
    from bsa_export.checkpoint.folder import AtomicFolder

    if choices["plot"]:
        report.check_picture(choices["plot"])
    found = convert.find_source(source, progress=_is_watched())
    if choices["dry_run"]:
        if target is not None:
            AtomicFolder(target, overwrite=choices["overwrite"]).refuse_target()
        _, planned = convert.plan_source(found, options, choices["config_path"])
        content, lines = report.plan_content(planned), report.plan_lines(planned)
    else:
        with _progress() as progress:
            done = convert.convert(
                found,
                target,
                options,
                config_path=choices["config_path"],
                max_shard_size=choices["max_shard_size"],
                overwrite=choices["overwrite"],
                progress=progress,
            )
        planned = done.plan
        content = report.plan_content(planned) | done.record | {"seconds": done.seconds}
        lines = report.conversion_lines(done, target)
    click.echo(json.dumps(content, indent=2) if as_json else report.aligned(lines))
    if choices["plot"]:
        title = f"{planned.sparsity.mode}, block {planned.sparsity.block}, {planned.max_length:,} tokens"
        report.plot_layouts(choices["plot"], planned.layouts, planned.sparsity.block, title, planned.source_length)


def _to_dense(context: click.Context, source: str, target: Path, as_json: bool, choices: dict) -> None:
    allowed = {"to_dense", "source", "target", "max_length", "max_shard_size", "overwrite", "as_json"}
    for name in context.params:
        if name not in allowed and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--to-dense takes no --{name.replace('_', '-')}.")
    from bsa_export import report
    from bsa_export.convert import find_source
    from bsa_export.to_dense import to_dense

    with _progress() as progress:
        dense, seconds = to_dense(
            find_source(source).path,
            target,
            max_length=choices["max_length"],
            max_shard_size=choices["max_shard_size"],
            overwrite=choices["overwrite"],
            progress=progress,
        )
    nbytes = sum(row.nbytes for row in dense.tensors.values())
    content = {
        "tensors": len(dense.tensors),
        "bytes": nbytes,
        "max_length": dense.max_length,
        "notes": dense.notes,
        "seconds": seconds,
    }
    lines = [
        ("tensors", f"{len(dense.tensors)}, {report.size(nbytes)}"),
        ("longest input", f"{dense.max_length:,} tokens"),
        *(("note", note) for note in dense.notes),
        ("written", f"{target} in {seconds:.2f} s"),
    ]
    click.echo(json.dumps(content, indent=2) if as_json else report.aligned(lines))


def _options(choices: dict):
    """The options of a conversion. Raises click.UsageError for those that do not go together."""
    names = [option.removeprefix("--").replace("-", "_") for option in (*COUNTS, *LISTS, *FLAGS, "--attention")]
    given = {name: choices[name] for name in names if choices[name] is not None}
    section = None
    mode = choices["mode"] or ("custom" if choices["layout"] else "windowed")
    if choices["sparsity"]:
        clash = next((name for name in ("mode", "block", *given) if choices[name] is not None), None)
        if clash:
            raise click.UsageError(f"--sparsity holds what --{clash.replace('_', '-')} says: give one of them.")
        section = _section(choices["sparsity"])
    from bsa_export.plan import Options
    from bsa_export.sparsity import MODES as CONFIGS

    allowed = CONFIGS[mode].parameter_names()
    wrong = next((name for name in given if name not in allowed), None)
    if wrong:
        raise click.UsageError(f"--mode {mode} has no --{wrong.replace('_', '-')}.")
    return Options(
        max_length=choices["max_length"],
        mode=choices["mode"],
        block=choices["block"],
        parameters=given,
        section=section,
        layout=choices["layout"],
        seed=choices["seed"],
        different_layout_per_layer=choices["different_layout_per_layer"],
        positions=choices["positions"],
        dtype=choices["dtype"],
    )


def _section(path: Path) -> dict:
    """The `sparse_attention` section of a DeepSpeed config, or the file itself where it is that section."""
    from bsa_export.errors import SparsityError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SparsityError(f"expected JSON ({error})", where=path) from None
    section = (
        content.get("sparse_attention", content if "mode" in content else None) if isinstance(content, dict) else None
    )
    if not isinstance(section, dict):
        raise SparsityError('expected a "sparse_attention" section with a mode', found="none", where=path)
    # A config.json in GENA-LM's form names the class in the place of the mode.
    return {key: content[key] for key in ("sparse_config_cls",) if key in content} | section


def _is_watched() -> bool:
    return sys.stderr.isatty()


class _progress:
    """A bar on stderr for what takes longer than a second, if a person looks; gives what `convert` calls, or None."""

    def __enter__(self):
        self.bar = None
        if not _is_watched():
            return None
        from tqdm import tqdm

        columns, rows = shutil.get_terminal_size()  # 80 x 24 where a terminal has no size; tqdm would draw nothing
        self.bar = tqdm(unit="B", unit_scale=True, delay=1, leave=False, ncols=columns - 1, nrows=rows)

        def update(done: int, total: int) -> None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

        return update

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()
