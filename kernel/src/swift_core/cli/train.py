"""`swift-core train`."""

from __future__ import annotations

from typing import Any

import click

from swift_core.cli.common import ARGUMENTS, DATASET, JSON, MODEL, OVERWRITE, TRUST, config_of, options, print_json
from swift_core.config import RunConfig, describe_options


@click.command(add_help_option=False)
@options(
    ARGUMENTS, MODEL, DATASET,
    click.option("--tuner", metavar="T", help="What is trained [lora]."),
    click.option("--trainer", metavar="R", help="The training loop [sft]."),
    click.option("--backend", metavar="B", help="Where it runs [torch]."),
    click.option("--quantizer", metavar="Q", help="Quantize the base weights."),
    click.option("--template", metavar="T", help="How rows become text [the checkpoint's own]."),
    click.option("--output", metavar="DIR", help="The run's folder [runs/TRAINER-TIME]."),
    click.option("--nproc", type=int, metavar="N", help="Processes on this machine [1]."),
    click.option("--from", "warm_start", metavar="RUN", help="A run or checkpoint whose weights to begin with."),
    click.option("--freeze", multiple=True, metavar="PART", help="Leave alone: vision, projector, a name or re:PATTERN."),
    click.option("--strict", is_flag=True, default=None, help="A failing callback ends the run."),
    TRUST, OVERWRITE,
    click.option("--allow-pickle", is_flag=True, default=None, help="Read .bin weights, with weights_only=True."),
    click.option("--dry-run", is_flag=True, help="Check everything and prepare the data; train nothing."),
    JSON,
    click.option("-h", "--help", "show_help", is_flag=True, help="This text, and the options of the components chosen."),
)  # fmt: skip
@click.pass_context
def train(
    ctx: click.Context, /, arguments: tuple[str, ...], nproc: int | None, overwrite: bool, dry_run: bool, as_json: bool,
    show_help: bool, **flags: Any,
) -> None:  # fmt: skip
    """Train a model on a data set.

    Options of components are given as KEY=VALUE, such as tuner.rank=16 trainer.epochs=3, or in a YAML file.
    """
    if nproc is not None:
        arguments = (*arguments, f"backend.processes={nproc}")
    config = config_of(arguments, **flags)
    if show_help:
        click.echo(ctx.get_help())
        _component_help(config)
        return
    from swift_core.training import train as run_training

    summary = run_training(config, overwrite, dry_run)
    if as_json:
        print_json(summary)
    elif dry_run:
        click.echo("dry run: the request is sound; nothing was trained")
    else:
        loss = summary["train_loss"]
        headed = config.model.options.get("task", "auto") not in ("auto", "causal_lm")
        use = "infer --dataset ROWS --output FILE" if headed else "chat"
        held = f", eval loss {summary['eval_loss']:.4f}" if summary["eval_loss"] is not None else ""
        click.echo(
            f"done: {summary['steps']} steps in {summary['seconds']:.0f} s, train loss {loss:.4f}{held}, "
            f"{summary['tokens_per_second']:.0f} tokens/s, peak memory {summary['peak_bytes'] / 2**30:.2f} GiB\n"
            f"last checkpoint: {summary['last']}\n"
            f"{'use' if headed else 'talk to'} it: swift-core {use} --model {summary['output']}"
        )


def _component_help(config: RunConfig) -> None:
    """Options of the chosen tuner, trainer and so on, with types, defaults and help."""
    from swift_core.activate import load_object
    from swift_core.errors import SwiftError
    from swift_core.index import build_index
    from swift_core.registry import Registry

    registry = Registry(build_index())
    config.template.name = config.template.name or "checkpoint"
    for kind in ("template", "tuner", "trainer", "backend", "quantizer"):
        component = getattr(config, kind)
        if component.name is None:
            continue
        try:
            contribution = registry.find(kind + "s", component.name, component.provider)
        except SwiftError as err:
            click.echo(f"\n{kind}: {err}")
            continue
        cls = load_object(contribution.entry.config, contribution) if contribution.entry.config else None
        click.echo(f"\n{kind} {contribution.id} ({contribution.plugin.name} {contribution.plugin.version}):")
        for name, kind_of_value, default, text in describe_options(cls):
            click.echo(f"  {kind}.{name}  ({kind_of_value}, default {'none' if default is None else default})\n      {text}")
