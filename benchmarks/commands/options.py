"""The options that all commands which train have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer

from ..data import FROM_FONTS, IN_FILES, IN_MEMORY
from ..training.networks import NETWORKS
from ..training.precision import fast_precision
from ..training.train import SCHEDULES, Plan

Command: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train, on what, and where results go; a field is an option of the command line."""

    iterations: Annotated[int, typer.Option(help="Of each training.", min=1)] = Plan.iterations
    epoch_iterations: Annotated[int, typer.Option(help="Validate, and refresh the tree, after so many.", min=1)] = (
        Plan.epoch_iterations
    )
    schedule: Annotated[
        str, typer.Option(help=f"Of the learning rate: {' or '.join(SCHEDULES)}; a cosine falls to zero at the end.")
    ] = Plan.schedule
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.", min=1)] = 128
    embedding_size: Annotated[int, typer.Option(help="Length of an embedding.", min=1)] = 128
    data: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(IN_MEMORY)}; {', '.join(FROM_FONTS)}, also as NAME:FOLDER with fonts of your own; "
            f"or NAME:PATH of {', '.join(IN_FILES)} (default data/NAME)."
        ),
    ] = "glyphs"
    classes: Annotated[int | None, typer.Option(help="Train on so many of the classes; default all.", min=2)] = None
    samples_per_class: Annotated[
        int | None, typer.Option(help="Train on at most so many images of each class; default all.", min=2)
    ] = None
    split_classes: Annotated[
        float, typer.Option(help="Label noise: this share of the training classes is made two each.", min=0, max=1)
    ] = 0.0
    wrong_labels: Annotated[
        float,
        typer.Option(help="Label noise: this share of the training images gets the label of another class.", min=0, max=1),
    ] = 0.0
    image_size: Annotated[int, typer.Option(help="Crops of data sets in files.", min=8)] = 224
    network: Annotated[str, typer.Option(help=f"One of: {', '.join(NETWORKS)}.")] = Plan.network
    weights: Annotated[
        str, typer.Option(help="random, pretrained (on ImageNet, by timm's hub), or a file of a state dict.")
    ] = "random"
    freeze_batch_norm: Annotated[
        bool, typer.Option("--freeze-batch-norm", help="Leave the network's batch norm as it is.")
    ] = False
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu"
    workers: Annotated[int, typer.Option(help="Loader processes; the built-in data need none.", min=0)] = 0
    precision: Annotated[
        str, typer.Option(help="Of the network: fp32, bf16 (autocast), or auto: bf16 where the hardware computes in it.")
    ] = "auto"
    jobs: Annotated[int, typer.Option(help="Trainings at a time, each with its share of the cores.", min=1)] = 1
    output: Annotated[Path, typer.Option(help="Folder for results; one that is there is continued.")] = Path("runs")

    def plan(self) -> Plan:
        """How each training goes."""
        given = {field.name: getattr(self, field.name) for field in fields(Plan)}
        given["image_size"] = self.image_size if self.data.partition(":")[0] in IN_FILES else None
        given["precision"] = fast_precision(self.device) if self.precision == "auto" else self.precision
        return Plan(**given)


def with_training_options(*, without: tuple[str, ...] = (), **defaults: Any) -> Callable[[Command], Command]:
    """A decorator: the command's first parameter becomes the options of `TrainingOptions`, behind those of its own.

    Args:
        without: fields that are no options of this command; they keep their defaults.
        **defaults: fields that have another default in this command.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(TrainingOptions, include_extras=True)
        options = {
            field.name: inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(field.name, field.default),
                annotation=hints[field.name],
            )
            for field in fields(TrainingOptions)
            if field.name not in without
        }
        own_hints = get_type_hints(command, include_extras=True)
        _, *own = inspect.signature(command).parameters.values()
        own = [parameter.replace(annotation=own_hints[parameter.name]) for parameter in own]

        @wraps(command)
        def with_options(**given: Any) -> Any:
            chosen = {name: given.pop(name, option.default) for name, option in options.items()}
            return command(TrainingOptions(**chosen), **given)

        # The command-line library reads both.
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + [*options.values()]
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate
