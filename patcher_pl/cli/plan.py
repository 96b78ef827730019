"""`plan`: what a `fit` of the same configuration will need, without weights, data or a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from patcher_pl.attackers import ConcurrentAttacker
from patcher_pl.cli.errors import readable_config_errors
from patcher_pl.cli.lightning_cli import PatcherCLI
from patcher_pl.cli.placing import (
    can_shard,
    num_bytes,
    placement_of,
    settings_to_shard,
    sharding_for,
)
from patcher_pl.cli.rehearsal import NUM_SFT_STEPS, Shapes, rehearse
from patcher_pl.defenses import Defense, Patcher
from patcher_pl.errors import ConfigError
from patcher_pl.files import write_json
from patcher_pl.hypergradients import Unrolled
from patcher_pl.models import LanguageModel, Sharding
from patcher_pl.planning import (
    HYPERGRADIENT,
    Footprint,
    Need,
    Overhead,
    Placement,
    Plan,
    Rounds,
    Workload,
    find_gpu,
)
from patcher_pl.planning.architecture import find_architecture
from patcher_pl.planning.placements import candidates
from patcher_pl.planning.report import print_plan
from patcher_pl.planning.trajectories import EstimateCost, estimate_cost

# Attack steps of a rehearsal: the second one begins with the attacker's optimizer state.
_ATTACK_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan assumes.

    Args:
        gpu: GPU to fit, by its name in `patcher_pl.planning.hardware`.
        device_counts: Numbers of devices to look at.
        mfu: Share of the GPU's peak that training reaches (in (0, 1]).
        host_gib_per_device: Host memory that may be used for every device (GiB, >= 0).
        length: Tokens of every conversation; null for `chat.max_length`, the most there can be.
        overhead: What the framework and the allocator take.
        model_config: The model's config.json; null looks in the model's directory, beside the
            configuration and on the hub.
        json: File to write the plan to.

    Raises:
        ValueError: If a value is out of its range.
    """

    gpu: str = "H100-80GB"
    device_counts: list[int] = field(default_factory=lambda: [1, 2, 8, 16, 64])
    mfu: float = 0.4
    host_gib_per_device: float = 200.0
    length: int | None = None
    overhead: Overhead = field(default_factory=Overhead)
    model_config: Path | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ValueError(
                f"PlanSettings.mfu must be in (0, 1], got {self.mfu}. Good kernels reach 0.3 to 0.5."
            )
        if not self.host_gib_per_device >= 0:
            raise ValueError(
                f"PlanSettings.host_gib_per_device must be >= 0, got {self.host_gib_per_device}. "
                "Use 0 where nothing may wait in host memory."
            )
        if self.length is not None and self.length < 2:
            raise ValueError(
                f"PlanSettings.length must be >= 2 or null, got {self.length}. "
                "Use null for chat.max_length."
            )
        if not self.device_counts or min(self.device_counts) < 1:
            raise ValueError(
                f"PlanSettings.device_counts must hold counts >= 1, got {self.device_counts}. "
                "Use [1] for one device."
            )


class PlanCLI(PatcherCLI):
    """Parses a configuration of `fit`, with the options of a plan, and builds defenses from it.

    Args:
        arguments: Command line after the command.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__("fit", arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of a plan to those of a run."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanSettings, nested_key=None, sub_configs=True)

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Lets the help text speak of this command."""
        super().setup_parser(*args, **kwargs)
        self._parser(self.command).prog = "python -m patcher_pl plan"

    def _set_seed(self) -> None:
        pass  # Nothing is drawn.

    def instantiate_classes(self) -> None:
        """Builds nothing yet."""

    @property
    def parsed(self) -> Any:
        """The configuration as it was given."""
        return self.config[self.command]

    @property
    def trainer_options(self) -> Any:
        """The Trainer's options, its strategy built where it is given as a class."""
        return self.parser.instantiate(self.config)[self.command].trainer

    def defense(
        self,
        *,
        attack_steps: int | None = None,
        checkpointing: bool | None = None,
        dtype: str | None = None,
    ) -> Defense:
        """Builds the defense.

        Args:
            attack_steps: Steps of an attack in a rehearsal; None leaves everything as configured.
            checkpointing: Whether activations are recomputed; None leaves it as configured.
            dtype: Number format of weights and computation; None leaves it as configured.
        """
        config = self.config.clone()
        run = config[self.command]
        run.redteam = None
        settings = run.model.init_args
        if checkpointing is not None:
            settings.language_model.gradient_checkpointing = checkpointing
        if dtype is not None:
            settings.language_model.dtype = dtype
        if attack_steps is not None:
            settings.accumulate_grad_batches = 1
            if "attacker" in settings:
                attack = settings.attacker.init_args
                # As many vectors as configured, from as many steps at least.
                num_vectors = len(attack.get("vector_steps") or [attack_steps])
                attack.num_steps = max(attack_steps, num_vectors)
                attack.num_warmup_steps = 0
                if num_vectors > 1:
                    last = attack.num_steps
                    attack.vector_steps = list(range(last - num_vectors + 1, last + 1))
                elif attack.get("vector_steps"):
                    attack.vector_steps = None
                settings.num_sft_steps = NUM_SFT_STEPS
                settings.refresh_every = 1
                if settings.trust_every is not None:
                    settings.trust_every = 1
        return self.parser.instantiate(config)[self.command].model

    @property
    def settings(self) -> PlanSettings:
        """The options of the plan."""
        given = self.parsed
        values = {name: given[name] for name in PlanSettings.__dataclass_fields__}
        values["overhead"] = Overhead(**vars(given.overhead))
        return PlanSettings(**values)


def run_plan(arguments: Sequence[str]) -> None:
    """Plans a run, prints the plan, and refuses what cannot fit.

    Raises:
        ConfigError: If the configuration cannot be run, or does not fit the GPU.
    """
    from rich.console import Console

    with readable_config_errors():
        cli = PlanCLI(arguments)
        settings = cli.settings
        plan = make_plan(cli, settings)
    print_plan(plan, Console())
    if settings.json is not None:
        write_json(settings.json, plan.as_dict())
    if plan.refusal is not None:
        raise ConfigError(plan.refusal)


def make_plan(cli: PlanCLI, settings: PlanSettings) -> Plan:
    """Rehearses the run, with activation checkpointing and as configured, and adds it up.

    Raises:
        ConfigError: If `fit` would refuse the configuration, or its attackers run beside it.
    """
    gpu, run, defense = find_gpu(settings.gpu), cli.parsed, cli.defense()
    if isinstance(defense, Patcher) and isinstance(defense.attacker, ConcurrentAttacker):
        raise ConfigError(
            "Patcher.attacker: `plan` knows attacks in the defender's process only, got a "
            "ConcurrentAttacker. Plan with a member of its population as `attacker` to see what "
            "attacks and the defender's steps need."
        )
    language_model = defense.language_model
    shapes = Shapes(
        batch_size=run.data.batch_size,
        attack_batch_size=run.data.attack_batch_size or run.data.batch_size,
        length=settings.length or language_model.chat.max_length,
    )
    configured = placement_of(cli.trainer_options, defense)
    rounds = _rounds(defense, run.trainer.max_steps)
    sharding = sharding_for(run.trainer, language_model)
    neighbors = [Path(path.absolute).parent for path in run.config or []]
    architecture = find_architecture(language_model, settings.model_config, neighbors)

    @cache
    def footprint(checkpointing: bool, split: Sharding | None) -> Footprint:
        return _footprint(cli, architecture, shapes, defense, checkpointing, split)

    def footprint_of(placement: Placement) -> Footprint:
        splits = placement.sharded and (sharding.param_dtype or sharding.reduce_dtype)
        return footprint(placement.checkpointing, sharding if splits else None)

    def need(placement: Placement) -> Need:
        return placement.need(footprint_of(placement), settings.overhead)

    others = dict.fromkeys(
        replace(placement, on_host=placement.on_host | configured.on_host)
        for placement in candidates(
            settings.device_counts,
            can_shard=can_shard(cli.defense(), sharding),
            shards_one=configured.sharded,
        )
        if placement.checkpointing or not configured.checkpointing
    )
    rehearsed = footprint_of(configured)
    return Plan(
        model=language_model.path,
        defense=type(defense).__name__,
        num_parameters=rehearsed.layers.num_parameters,
        shapes=(
            f"{shapes.batch_size} x {shapes.length} tokens a batch"
            + (f", {shapes.attack_batch_size} in attacks" if isinstance(defense, Patcher) else "")
        ),
        gpu=gpu,
        configured=need(configured),
        alternatives=[need(placement) for placement in others],
        work=Workload.of(
            rehearsed,
            rounds,
            tokens_per_batch=shapes.tokens_per_batch,
            tokens_per_attack_batch=shapes.tokens_per_attack_batch,
        ),
        dtype=_compute_dtype(run.trainer.precision, language_model, configured.sharded),
        mfu=settings.mfu,
        host_gib_per_device=settings.host_gib_per_device,
        notes=_notes(run),
        sharding_settings=settings_to_shard(run.trainer, language_model),
    )


def _footprint(
    cli: PlanCLI,
    architecture: Any,
    shapes: Shapes,
    configured: Defense,
    checkpointing: bool,
    sharding: Sharding | None,
) -> Footprint:
    """Rehearses in the number formats that `sharding` computes in; None for those of the Trainer."""
    if sharding is None:
        return _rehearsed(cli, architecture, shapes, configured, checkpointing, None)
    stored = configured.language_model.dtype
    computed = sharding.param_dtype or stored
    found = _rehearsed(cli, architecture, shapes, configured, checkpointing, computed)
    return found.with_stored_weights(
        stored=num_bytes(stored),
        computed=num_bytes(computed),
        sent=num_bytes(sharding.reduce_dtype or computed),
    )


def _rehearsed(
    cli: PlanCLI,
    architecture: Any,
    shapes: Shapes,
    configured: Defense,
    checkpointing: bool,
    dtype: str | None,
) -> Footprint:
    """Rehearses with short attacks, and adds what longer ones need where they are differentiated."""
    run = cli.parsed

    def at(attack_steps: int) -> Footprint:
        defense = cli.defense(attack_steps=attack_steps, checkpointing=checkpointing, dtype=dtype)
        if isinstance(defense, Patcher):
            defense.hypergradient = _beside_model(defense.hypergradient)
        return rehearse(
            defense,
            architecture,
            shapes,
            precision=run.trainer.precision if dtype is None else "32-true",
            multi_tensor=run.trainer.accelerator != "cpu",
        )

    if not isinstance(configured, Patcher):
        return at(_ATTACK_STEPS)
    wanted = configured.attacker.num_steps
    short = at(min(_ATTACK_STEPS, wanted))
    if configured.is_first_order or wanted <= _ATTACK_STEPS:
        return short
    if isinstance(configured.hypergradient, Unrolled):
        return _extrapolated(at(1), short, wanted)
    estimator = _beside_model(configured.hypergradient)
    costs: list[EstimateCost] = [
        estimate_cost(estimator, configured.attacker, steps) for steps in (_ATTACK_STEPS, wanted)
    ]
    more_evaluations = costs[1].gradient_evaluations - costs[0].gradient_evaluations
    attack_flops = short.plain_flops * shapes.attack_batch_size // shapes.batch_size
    return short.with_longer_estimates(
        more_bytes=round((costs[1].peak_weights - costs[0].peak_weights) * short.layers.total),
        more_evaluations=more_evaluations,
        more_flops=round(more_evaluations * attack_flops),
    )


def _extrapolated(one: Footprint, two: Footprint, num_steps: int) -> Footprint:
    """A graph through the whole attack grows by the same amount with every step."""
    steps = num_steps - 2
    bytes_of = [
        max(sum(parts.values()) for parts in footprint.peaks[HYPERGRADIENT])
        for footprint in (one, two)
    ]
    return two.with_longer_estimates(
        more_bytes=steps * (bytes_of[1] - bytes_of[0]),
        more_evaluations=steps * (two.estimate_evaluations - one.estimate_evaluations),
        more_flops=steps * (two.estimate_flops - one.estimate_flops),
    )


def _rounds(defense: Defense, max_steps: int) -> Rounds:
    patcher = defense if isinstance(defense, Patcher) else None
    return Rounds.of(
        max_steps=max_steps,
        accumulate_grad_batches=defense.accumulate_grad_batches,
        num_sft_steps=patcher.num_sft_steps if patcher else 0,
        refresh_every=patcher.refresh_every if patcher else 1,
        attack_length=patcher.attacker.num_steps if patcher else 0,
        is_first_order=patcher is None or patcher.is_first_order,
    )


def _beside_model(hypergradient: Any) -> Any:
    """The estimator with its trajectory where it can be measured."""
    store = getattr(hypergradient, "store", None)
    if store is None:
        return hypergradient
    return replace(hypergradient, store=replace(store, device="model"))


def _compute_dtype(precision: Any, language_model: LanguageModel, sharded: bool) -> str:
    if sharded and language_model.sharding.param_dtype is not None:
        return language_model.sharding.param_dtype
    return "bfloat16" if str(precision).startswith("bf16") else language_model.dtype


def _notes(run: Any) -> list[str]:
    notes = ["every conversation is taken to have the full length: an upper bound."]
    if run.control:
        notes.append("the SFT control of `control: true` takes as many gradient evaluations again.")
    if run.redteam is not None:
        notes.append("the red team's attacks are not included; they need memory for two models.")
    return notes
