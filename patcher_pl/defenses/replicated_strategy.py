"""A whole model on every device, as a strategy of Lightning."""

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from patcher_pl.models.replicas import agree


class ReplicatedStrategy(DDPStrategy):
    """Gives every process a whole model, and an equal share of every batch.

    What `DDPStrategy` is for, but that one averages gradients within a module that it wraps around
    the model, once per forward pass; a defender step has several passes, at other weights, and may
    differentiate them twice. Here a defense averages its gradients, and an attack those of its steps,
    differentiably where the attack is differentiated. So every hypergradient works, as on one
    device. Checkpoints are those of one device, too, and go on with any number of processes.

    Arguments are those of `DDPStrategy`; what is for its wrapper has no effect.

    References:
        Li et al., 2020, https://arxiv.org/abs/2006.15704.
    """

    strategy_name = "replicated"

    def configure_ddp(self) -> None:
        """Wraps nothing; first weights of adapters, which are random, become the same everywhere."""
        assert self.model is not None
        agree(self.model)


# So that `trainer.strategy: replicated` names it, as `ddp` does Lightning's.
StrategyRegistry.register(ReplicatedStrategy.strategy_name, ReplicatedStrategy)
