"""`plan`: what a `fit` of the same configuration will need, without weights, data or a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.cli import LightningArgumentParser
from rich.table import Column, Table

from patcher_pl.cli.console import wide_console
from patcher_pl.cli.errors import readable_config_errors
from patcher_pl.cli.lightning_cli import PatcherCLI
from patcher_pl.errors import ConfigError
from patcher_pl.files import write_json
from patcher_pl.planning import Plan, PlanSettings, Run, make_plan
from patcher_pl.planning.placements import Overhead
from patcher_pl.planning.tracker import Part

if TYPE_CHECKING:
    from rich.console import Console


class PlanCLI(PatcherCLI):
    """Parses a configuration of `fit`, with the options of a plan."""

    spoken_of = "plan"

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__("fit", arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of a plan to those of a run."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanSettings, nested_key=None, sub_configs=True)

    def _set_seed(self) -> None:
        pass  # Nothing is drawn.

    def instantiate_classes(self) -> None:
        """Builds nothing yet."""

    @property
    def run(self) -> Run:
        """The run as configured, its defense built without weights."""
        config = self.config.clone()
        given = config[self.command]
        has_red_team, given.redteam = given.redteam is not None, None
        built = self.parser.instantiate(config)[self.command]
        return Run(
            defense=built.model,
            trainer=built.trainer,
            batch_size=given.data.batch_size,
            attack_batch_size=given.data.attack_batch_size or given.data.batch_size,
            folders=[Path(path.absolute).parent for path in given.config or []],
            has_control=given.control not in (None, False),
            has_red_team=has_red_team,
            max_gradient_evaluations=given.max_gradient_evaluations,
        )

    @property
    def settings(self) -> PlanSettings:
        """The options of the plan."""
        given = self.config[self.command]
        values = {name: given[name] for name in PlanSettings.__dataclass_fields__}
        return PlanSettings(**{**values, "overhead": Overhead(**vars(given.overhead))})


def run_plan(arguments: Sequence[str]) -> None:
    """Plans a run, prints the plan, and refuses what cannot fit.

    Raises:
        ConfigError: If the configuration cannot be run, or does not fit the GPU.
    """
    with readable_config_errors():
        cli = PlanCLI(arguments)
        settings = cli.settings
        plan = make_plan(cli.run, settings)
    _print(plan, wide_console())
    if settings.json is not None:
        write_json(settings.json, plan.as_dict())
    if plan.refusal is not None:
        raise ConfigError(plan.refusal)


def _print(plan: Plan, console: "Console") -> None:
    """Prints memory by part and phase, the placements that were looked at, work and time."""
    configured, gpu, work = plan.configured, plan.gpu, plan.work
    phases, everyone = configured.device, configured.placement.num_devices
    by_part = _table(f"GiB per device, as configured ({configured.placement})", "part", *phases)
    for part in Part:
        if any(parts.get(part) for parts in phases.values()):
            by_part.add_row(part.value, *(_gib(parts.get(part, 0)) for parts in phases.values()))
    by_part.add_section()
    by_part.add_row("peak", *(_gib(sum(parts.values())) for parts in phases.values()))
    headings = "placement", "GiB per device", "GiB on hosts", "fits"
    by_placement = _table(f"What fits {gpu.name} ({gpu.memory_gib:g} GiB)", *headings)
    for need in plan.alternatives:
        sizes, fits = map(_gib, (need.device_bytes, need.host_bytes)), plan.fits(need)
        by_placement.add_row(str(need.placement), *sizes, "yes" if fits else "no")
    for shown in (
        f"{plan.defense} on {plan.model}: {plan.num_parameters / 1e9:.3g} billion parameters, "
        f"{plan.shapes}.",
        by_part,
        by_placement,
        f"Work: {work.gradient_evaluations:,} gradient evaluations, {work.tokens / 1e6:,.4g} million "
        f"tokens, {work.flops:.3g} FLOPs per device"
        + (f", times {everyone} devices." if everyone > 1 else "."),
        f"Time: {plan.hours:,.3g} hours at {plan.mfu:.0%} of the {plan.dtype} peak of "
        f"{gpu.name} ({gpu.peak_flops(plan.dtype) / 1e12:g} TFLOP/s).",
        *(f"Note: {note}" for note in plan.notes),
    ):
        console.print(shown)


def _table(title: str, first: str, *headings: str) -> Table:
    return Table(first, *(Column(heading, justify="right") for heading in headings), title=title)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}" if num_bytes else ""
