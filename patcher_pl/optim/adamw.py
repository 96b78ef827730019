"""AdamW, and a torch optimizer for the variant of it that torch does not have."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

import torch
from torch import Tensor

from patcher_pl.optim import low_memory
from patcher_pl.optim.base import DifferentiableOptimizer, OptimizerState
from patcher_pl.optim.low_memory import StateDtype
from patcher_pl.validation import require

# See `AdamW.eps_root`.
DIFFERENTIABLE_EPS_ROOT = 1e-10


@dataclass(frozen=True, kw_only=True)
class AdamW(DifferentiableOptimizer):
    """Adam with decoupled weight decay; defaults are torch's, which Patcher's scripts use too.

        m' = beta1 m + (1 - beta1) g        v' = beta2 v + (1 - beta2) g^2
        theta' = (1 - lr decay) theta - lr m_hat / (sqrt(v_hat + eps_root) + eps)

    with m_hat and v_hat corrected for their start at zero.

    The update of a weight whose gradients have all been tiny (an embedding row that no batch has
    shown yet) is steep: its derivative is about 1 / eps = 1e8, and in float32 the derivative of a
    whole attack drowns in that. `eps_root` bounds it by 1 / sqrt(eps_root). Torch's AdamW has no such
    term. It is therefore 0 where an attack is only carried out, and 1e-10 where one is to be
    differentiated (`differentiable`, which the inner problem of every hypergradient calls); it slows
    weights down whose gradients are below 1e-5. Give a number to have the same in both places.

    Args:
        lr: Step size (> 0).
        betas: Decay rates of the first and second moment (each in [0, 1)).
        eps: Added to the root of the second moment (> 0).
        weight_decay: Decoupled decay per unit of lr (>= 0).
        eps_root: Added to the second moment within the root (>= 0); None as explained above.
        fused: Let `build` take torch's fused kernel: the same update in one pass over the memory,
            with other rounding. Not together with an `eps_root` above 0, or a `state_dtype`.
        state_dtype: How both moments are kept: `bfloat16`, rounded stochastically (4 bytes per
            weight), or `8bit` in blocks of 256 by torchao, rounded to the nearest (2.03 bytes per weight;
            tensors of less than 4096 numbers, or no whole blocks, in float32). None keeps them as the
            weights are kept, or their copies in float32 (8 bytes). The random bits are a function of
            step and parameter alone, so that an attack that is repeated or resumed ends at the same
            bits; spread over processes, it differs by what each rounds. Attacks with one cannot be
            differentiated.

    Raises:
        ValueError: If a value is out of its range, or `8bit` is given without torchao.

    References:
        Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101, algorithm 2.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    eps_root: float | None = None
    fused: bool = False
    state_dtype: StateDtype | None = None

    def __post_init__(self) -> None:
        require(self, self.lr > 0, "lr", "> 0", "Attacks commonly use 1e-5 to 1e-3.")
        betas_hold = all(0 <= beta < 1 for beta in self.betas)
        require(self, betas_hold, "betas", "in [0, 1)", "Use 0 for no memory.")
        require(self, self.eps > 0, "eps", "> 0", "torch's default is 1e-8.")
        require(self, self.weight_decay >= 0, "weight_decay", ">= 0", "Use 0 for no decay.")
        root_holds = self.eps_root is None or self.eps_root >= 0
        require(self, root_holds, "eps_root", ">= 0 or null", "Use 0 for torch's AdamW.")
        fusible = not (self.fused and self.eps_root)
        require(self, fusible, "fused", "false with an `eps_root`", "Torch has no such kernel.")
        known = self.state_dtype is None or self.state_dtype in get_args(StateDtype)
        remedy = "Use null for moments in float32."
        require(self, known, "state_dtype", "bfloat16, 8bit or null", remedy)
        fusible = not (self.fused and self.state_dtype)
        require(self, fusible, "fused", "false with a `state_dtype`", "Torch has no such kernel.")
        low_memory.require_installed(self.state_dtype)

    @property
    def num_slots(self) -> int:
        return 2

    @property
    def is_differentiable(self) -> bool:
        return self.state_dtype is None

    def init(self, parameters: Sequence[Tensor]) -> OptimizerState:
        """See `DifferentiableOptimizer.init`."""
        if (dtype := self.state_dtype) is None:
            return super().init(parameters)
        m, v = (
            [low_memory.zeros(parameter, dtype, signed=signed) for parameter in parameters]
            for signed in (True, False)
        )
        return OptimizerState([0] * len(parameters), (m, v))

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        if self.eps_root or self.state_dtype:
            return TorchAdapter(parameters, self)
        return torch.optim.AdamW(
            parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=self.fused or None,
        )

    def differentiable(self) -> Self:
        """See `DifferentiableOptimizer.differentiable`."""
        self._require_whole_moments()
        if self.eps_root is not None:
            return self
        return replace(self, eps_root=DIFFERENTIABLE_EPS_ROOT, fused=False)

    def _require_whole_moments(self) -> None:
        # Rounding has no derivative, and that of the unrounded update would be of another attack.
        rule = "null for an attack that is differentiated"
        remedy = "Leave it away, or use FirstOrder hypergradients."
        require(self, self.state_dtype is None, "state_dtype", rule, remedy)

    def _step_at_(
        self,
        index: int,
        theta: Tensor,
        gradient: Tensor,
        slots: Sequence[Tensor],
        step: int,
        lr: float,
    ) -> None:
        if self.state_dtype is None:
            self._step_one_(theta, gradient, slots, step, lr)
            return
        low_memory.step_in_pieces_(
            lambda weights, slopes, moments: self._step_one_(weights, slopes, moments, step, lr),
            *(theta, gradient, list(slots), low_memory.seed_of(index, step)),
        )

    def _step_one_(
        self, theta: Tensor, gradient: Tensor, slots: Sequence[Tensor], step: int, lr: float
    ) -> None:
        # In the order of torch's single-tensor AdamW, so that both agree to the last bit.
        (beta1, beta2), (m, v) = self.betas, slots
        theta.mul_(1 - lr * self.weight_decay)
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = 1 - beta2**step
        if self.eps_root:
            root = v.div(correction).add_(self.eps_root).sqrt_()
        else:
            root = v.sqrt().div_(correction**0.5)
        theta.addcdiv_(m, root.add_(self.eps), value=-lr / (1 - beta1**step))

    def _applied_one(
        self, theta: Tensor, gradient: Tensor, slots: Sequence[Tensor], step: int, lr: float
    ) -> tuple[Tensor, Sequence[Tensor]]:
        self._require_whole_moments()
        (beta1, beta2), (m, v) = self.betas, slots
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient * gradient
        squared = v / (1 - beta2**step) + (self.eps_root or 0.0)
        # At v = 0, m is 0 too and the root takes no part in the derivative; autograd says 0 / 0.
        at_zero = squared == 0
        root = torch.where(at_zero, 0.0, torch.where(at_zero, 1.0, squared).sqrt())
        move = m / (1 - beta1**step) / (root + self.eps)
        return (1 - lr * self.weight_decay) * theta - lr * move, (m, v)

    def _vjp_one_(
        self,
        above: Tensor,
        moments: Sequence[Tensor],
        gradient: Tensor,
        slots: Sequence[Tensor],
        step: int,
        lr: float,
    ) -> Tensor:
        self._require_whole_moments()
        (beta1, beta2), (m, v) = self.betas, slots
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        m = m.lerp(gradient, 1 - beta1)
        squared = (v * beta2).addcmul_(gradient, gradient, value=1 - beta2).div_(correction2)
        root = squared.add_(self.eps_root or 0.0).sqrt_()
        by_m, by_v = moments
        # lr above / denominator is the derivative by -m_hat.
        denominator = root + self.eps
        scaled = (above * lr).div_(denominator)
        # d theta' / d root = lr m_hat / denominator^2, and `scaled` holds one of the two already.
        by_root = m.mul_(scaled).div_(denominator).div_(correction1)
        # d root / d v = 1 / (2 root correction2). At v = 0 the update has no slope by v: see
        # `_applied_one`.
        by_root.div_(root.mul_(2 * correction2)).masked_fill_(root == 0, 0.0)
        by_v.add_(by_root)
        by_m.sub_(scaled.div_(correction1))
        # Before the decay below: by_m and by_v are still derivatives by the moments that the step
        # left.
        pulled = (by_m * (1 - beta1)).addcmul_(by_v, gradient, value=2 * (1 - beta2))
        by_m.mul_(beta1)
        by_v.mul_(beta2)
        above.mul_(1 - lr * self.weight_decay)
        return pulled


class TorchAdapter(torch.optim.Optimizer):
    """Steps as `settings` say, for updates that torch does not have; schedules work as usual.

    Args:
        parameters: What is trained, in one group.
        settings: The update and its step size.
    """

    def __init__(self, parameters: Iterable[Tensor], settings: AdamW) -> None:
        super().__init__(parameters, {"lr": settings.lr})
        self._settings = settings
        self.state_dtype = settings.state_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step with the gradients that the parameters hold."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        parameters = group["params"]
        state = self._known(parameters)
        gradients = [parameter.grad for parameter in parameters]
        self._settings.step_(parameters, gradients, state, group["lr"])
        for index, parameter in enumerate(parameters):
            self.state[parameter]["step"] = state.steps[index]
        return loss

    def _known(self, parameters: list[Tensor]) -> OptimizerState:
        """The state by torch's names and in torch's place, where others look for it."""
        if not self.state:
            fresh = self._settings.init(parameters)
            for parameter, m, v in zip(parameters, *fresh.slots, strict=True):
                self.state[parameter] = {"step": 0, "exp_avg": m, "exp_avg_sq": v}
        known = [self.state[parameter] for parameter in parameters]
        slots = tuple([one[name] for one in known] for name in ("exp_avg", "exp_avg_sq"))
        return OptimizerState([one["step"] for one in known], slots)
