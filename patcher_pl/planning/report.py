"""A plan on the terminal."""

from rich.console import Console
from rich.table import Table

from patcher_pl.planning.parts import Part
from patcher_pl.planning.placements import Need
from patcher_pl.planning.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Prints memory by part and phase, the placements that were looked at, work and time."""
    console.print(
        f"{plan.defense} on {plan.model}: {plan.num_parameters / 1e9:.3g} billion parameters, "
        f"{plan.shapes}."
    )
    console.print(_parts_table(plan.configured))
    console.print(_placements_table(plan))
    work, placement = plan.work, plan.configured.placement
    everyone = placement.num_devices
    console.print(
        f"Work: {work.gradient_evaluations:,} gradient evaluations, {work.tokens / 1e6:,.4g} million "
        f"tokens, {work.flops:.3g} FLOPs per device"
        + (f", times {everyone} devices." if everyone > 1 else ".")
    )
    console.print(
        f"Time: {plan.hours:,.3g} hours at {plan.mfu:.0%} of the {plan.dtype} peak of "
        f"{plan.gpu.name} ({plan.gpu.peak_flops(plan.dtype) / 1e12:g} TFLOP/s)."
    )
    for note in plan.notes:
        console.print(f"Note: {note}")


def _parts_table(need: Need) -> Table:
    phases = list(need.device)
    table = Table(title=f"GiB per device, as configured ({need.placement})")
    table.add_column("part")
    for phase in phases:
        table.add_column(phase, justify="right")
    for part in Part:
        if any(need.device[phase].get(part) for phase in phases):
            cells = [_gib(need.device[phase].get(part, 0)) for phase in phases]
            table.add_row(part.value, *cells)
    table.add_section()
    table.add_row("peak", *[_gib(sum(need.device[phase].values())) for phase in phases])
    return table


def _placements_table(plan: Plan) -> Table:
    table = Table(title=f"What fits {plan.gpu.name} ({plan.gpu.memory_gib:g} GiB)")
    table.add_column("placement")
    for heading in ("GiB per device", "GiB on hosts", "fits"):
        table.add_column(heading, justify="right")
    for need in plan.alternatives:
        fits = "yes" if plan.fits(need) else "no"
        table.add_row(str(need.placement), _gib(need.device_bytes), _gib(need.host_bytes), fits)
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}" if num_bytes else ""
