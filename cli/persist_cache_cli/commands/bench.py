"""`persist-cache bench`: what the cache saves an agent on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import msgspec

from persist_cache_cli.output import Column, print_json, table, terminal_width
from persist_cache_cli.store_access import common_options


@click.command("bench")
@click.argument("what", type=click.Choice(["agents"]))
@click.option("--model", metavar="PATH_OR_HUB_ID", required=True, help="The model to serve.")
@click.option("--stock", is_flag=True, help="Measure mlx_lm.server beside it.")
@click.option("--runs", type=click.IntRange(1, 20), default=3, show_default=True, help="Sessions.")
@click.option(
    "--tokens",
    type=click.IntRange(300),
    default=6_000,
    show_default=True,
    help="Of the first prompt; half of the model's context at most.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Of each answer.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here."
)
@common_options()
def command(
    *,
    what: str,
    model: str,
    stock: bool,
    runs: int,
    tokens: int,
    max_tokens: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time made-up sessions of an agent: cold, from memory, after SIGKILL, in another folder.

    Each run has words of its own, and a store and servers of its own. Times are to the first
    token, so decoding is not in them; all answers have the same length. How long it takes is
    mostly what the model takes for prompts of --tokens, some of them computed whole in each run:
    `--runs 1 --tokens 1000` gives a first impression.

    \b
    Example:
      persist-cache bench agents --model mlx-community/Qwen3-0.6B-4bit --stock
    """
    from persist_cache_cli.bench import agents
    from persist_cache_cli.bench.timing import OURS, STOCK

    def tell(text: str) -> None:
        if not (quiet or as_json):
            click.echo(f"{text} ...", err=True)

    servers = [OURS, STOCK] if stock else [OURS]
    with tempfile.TemporaryDirectory(prefix="persist-cache-bench-") as folder:
        samples = agents.measure(
            model,
            Path(folder),
            servers=servers,
            runs=runs,
            tokens=tokens,
            output_tokens=max_tokens,
            tell=tell,
        )
    rows = agents.summary(samples)
    options = {"model": model, "runs": runs, "tokens": tokens, "max_tokens": max_tokens}
    said = agents.as_json(samples, rows, {"what": what, **options, "servers": servers})
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(said), indent=2) + b"\n")
    if as_json:
        print_json(said)
        return
    if quiet:
        return
    columns = [
        Column("way", least=12),
        Column("prompt tokens", right=True, drop=2),
        Column("reused", right=True, drop=1),
        Column("first token, median (range)", right=True),
        Column("faster than cold", right=True),
    ]
    lines: list[list[str] | str] = []
    for server in servers:
        lines.append(server)
        lines += [agents.cells(row) for row in rows if row.server == server]
    for line in table(columns, lines, width=terminal_width()):
        click.echo(line)
    if any(row.is_range for row in rows):
        click.echo("Cold runs differ by more than half, so only ranges are given; try it idle.")
