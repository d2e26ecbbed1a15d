"""Learning rate and weight decay over the course of a run.

Progress is counted in samples: the trainer advances it by the global batch size after every successful step.
Formulas: with n samples seen, warm-up W, decay D and r = (n - W) / (D - W), the rate is
``init + (max - init) n / W`` up to W, then ``min + c (max - min)`` with the coefficient c(r) of the style,
and ``min`` after D.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

# Share of (max - min) left after fraction r in [0, 1] of the decay.
_DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1.0),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
}
LR_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_TAIL_STYLES = ("linear", "cosine", "exponential")
# Share of (end - start) reached after fraction u in [0, 1] of the increase.
_WEIGHT_DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "cosine": lambda u: 0.5 * (math.cos(math.pi * (1.0 - u)) + 1.0),
}
WEIGHT_DECAY_STYLES = ("constant", *_WEIGHT_DECAY_SHAPES)

# Attribute -> names it had in older checkpoints.
_SAVED: dict[str, tuple[str, ...]] = {
    "max_lr": ("start_lr",),
    "lr_warmup_steps": ("warmup_iter", "warmup_steps"),
    "lr_decay_style": ("decay_style",),
    "lr_decay_steps": ("end_iter", "decay_steps"),
    "min_lr": (),
    "start_wd": (),
    "end_wd": (),
    "wd_incr_style": (),
    "wd_incr_steps": (),
}
_WEIGHT_DECAY_KEYS = ("start_wd", "end_wd", "wd_incr_style", "wd_incr_steps")
_STEP_NAMES = ("num_steps", "num_iters")


class OptimizerParamScheduler:
    """Writes ``lr`` and ``weight_decay`` into the param groups of an optimizer.

    A group's rate is scheduled between its own ``max_lr`` and ``min_lr`` where it has them, times its
    ``lr_mult``; its decay is multiplied by its ``wd_mult``.

    Args:
        optimizer: anything with ``param_groups``.
        init_lr: rate at the start of warm-up.
        max_lr: peak rate.
        min_lr: final rate.
        lr_warmup_steps: samples of linear warm-up.
        lr_decay_steps: samples at which the final rate is reached.
        lr_decay_style: one of ``LR_STYLES``.
        start_wd: weight decay at the start, ``end_wd`` after ``wd_incr_steps`` samples.
        wd_incr_style: one of ``WEIGHT_DECAY_STYLES``.
        use_checkpoint_opt_param_scheduler: values of a loaded checkpoint win over these.
        override_opt_param_scheduler: these win over values of a loaded checkpoint.
        wsd_decay_steps: samples of the decay at the end of ``WSD``, whose shape is ``lr_wsd_decay_style``.

    Raises:
        ConfigError: values that do not make a schedule, all of them in one message.
    """

    def __init__(
        self,
        optimizer: Any,
        init_lr: float,
        max_lr: float,
        min_lr: float,
        lr_warmup_steps: int,
        lr_decay_steps: int,
        lr_decay_style: str,
        start_wd: float,
        end_wd: float,
        wd_incr_steps: int,
        wd_incr_style: str,
        use_checkpoint_opt_param_scheduler: bool | None = True,
        override_opt_param_scheduler: bool | None = False,
        wsd_decay_steps: int | None = None,
        lr_wsd_decay_style: str | None = None,
    ):
        rates = {"init_lr": init_lr, "max_lr": max_lr, "min_lr": min_lr}
        missing = [name for name, rate in rates.items() if rate is None]
        if missing:
            raise ConfigError(
                f"learning-rate schedule: {' and '.join(missing)} None is no rate: give numbers, for example "
                "init_lr=0.0, max_lr=1e-4 and min_lr=0.0"
            )
        self.optimizer = optimizer
        self.init_lr = init_lr
        self.max_lr = float(max_lr)
        self.min_lr = min_lr
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay_steps = lr_decay_steps
        self.lr_decay_style = lr_decay_style
        self.wsd_decay_steps = wsd_decay_steps
        self.lr_wsd_decay_style = lr_wsd_decay_style
        self.start_wd = start_wd
        self.end_wd = end_wd
        self.wd_incr_steps = wd_incr_steps
        self.wd_incr_style = wd_incr_style
        self.override_opt_param_scheduler = override_opt_param_scheduler
        self.use_checkpoint_opt_param_scheduler = use_checkpoint_opt_param_scheduler
        self.num_steps = 0
        problems = _find_problems(self)
        if problems:
            raise ConfigError("learning-rate schedule: " + "; ".join(problems))
        # The command line's limits of each group: loading an optimizer replaces those in the groups.
        self._own_limits = [(group.get("max_lr"), group.get("min_lr")) for group in optimizer.param_groups]
        self.step(0)
        log_single_rank(logger, logging.INFO, "> learning rate decay style: %s", lr_decay_style)

    # --- the schedule ---------------------------------------------------------------------------------------

    def get_wd(self) -> float:
        """Weight decay after ``num_steps`` samples."""
        if self.num_steps > self.wd_incr_steps or self.wd_incr_style == "constant":
            return self.end_wd
        reached = self.num_steps / self.wd_incr_steps
        return self.start_wd + _WEIGHT_DECAY_SHAPES[self.wd_incr_style](reached) * (
            self.end_wd - self.start_wd
        )

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate of a group after ``num_steps`` samples, before its ``lr_mult``."""
        max_lr = _or_default(param_group.get("max_lr"), self.max_lr)
        min_lr = _or_default(param_group.get("min_lr"), self.min_lr)
        steps, warmup, decay = self.num_steps, self.lr_warmup_steps, self.lr_decay_steps
        if warmup > 0 and steps <= warmup:
            return self.init_lr + (max_lr - self.init_lr) * steps / warmup
        if self.lr_decay_style == "constant":
            return max_lr
        if steps > decay:
            return min_lr
        if self.lr_decay_style == "inverse-square-root":
            return max(min_lr, max_lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(steps, 1)))
        return min_lr + self._decay_coefficient() * (max_lr - min_lr)

    def _decay_coefficient(self) -> float:
        """c of the module's formula."""
        if self.lr_decay_style == "WSD":
            style, tail = self.lr_wsd_decay_style, self.wsd_decay_steps
            assert style is not None and tail is not None, "checked with the decay style"
            into_tail = self.num_steps - (self.lr_decay_steps - tail)
            if into_tail <= 0:
                return 1.0
            return _DECAY_SHAPES[style](into_tail / tail)
        reached = (self.num_steps - self.lr_warmup_steps) / (self.lr_decay_steps - self.lr_warmup_steps)
        return _DECAY_SHAPES[self.lr_decay_style](reached)

    def step(self, increment: int) -> None:
        """Advances by ``increment`` samples and writes the new values into the param groups."""
        self.num_steps += increment
        weight_decay = self.get_wd()
        for group in self.optimizer.param_groups:
            group["lr"] = self.get_lr(group) * group.get("lr_mult", 1.0)
            group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings and progress; the keys of ``_SAVED`` and ``num_steps``."""
        return {"num_steps": self.num_steps, **{name: getattr(self, name) for name in _SAVED}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores progress, and settings as far as the two switches of the constructor say.

        To be called after the optimizer's state has been loaded, whose groups it corrects.

        Raises:
            CheckpointError: settings differ and neither switch decides between them.
        """
        saved = {name: _look_up(state_dict, (name, *aliases)) for name, aliases in _SAVED.items()}
        if saved["start_wd"] is None:  # checkpoints from before weight decay had a schedule
            saved.update({name: getattr(self, name) for name in _WEIGHT_DECAY_KEYS})
        num_steps = _look_up(state_dict, _STEP_NAMES)
        missing = [name for name, value in saved.items() if value is None] + ["num_steps"] * (
            num_steps is None
        )
        if missing:
            raise CheckpointError(
                f"the checkpoint's learning-rate scheduler lacks {', '.join(missing)}: "
                "leave it unread (no_load_optim)"
            )
        own_limits = (self.max_lr, self.min_lr)
        if not self.override_opt_param_scheduler:
            if not self.use_checkpoint_opt_param_scheduler:
                self._require_equal(saved)
            for name, value in saved.items():
                setattr(self, name, value)
        self._set_group_limits(own_limits)
        self.num_steps = 0
        self.step(num_steps)

    def _require_equal(self, saved: dict[str, Any]) -> None:
        """Raises for settings of the checkpoint that differ from these."""
        differing = [
            f"{name} is {getattr(self, name)}, the checkpoint has {saved[name]}"
            for name in _SAVED
            if getattr(self, name) != saved[name]
        ]
        for group, (max_lr, min_lr) in zip(self.optimizer.param_groups, self._own_limits, strict=False):
            found = (group.get("max_lr"), group.get("min_lr"))
            if group.get("is_decoupled_lr") and found != (max_lr, min_lr):
                differing.append(
                    f"decoupled_lr and decoupled_min_lr are {max_lr} and {min_lr}, the checkpoint has "
                    f"{found[0]} and {found[1]}"
                )
        if differing:
            raise CheckpointError(
                f"the learning-rate schedule differs from the checkpoint's: {'; '.join(differing)}. "
                "Give the saved values, or set override_opt_param_scheduler (these win) or "
                "use_checkpoint_opt_param_scheduler (the checkpoint wins)"
            )

    def _set_group_limits(self, ordinary: tuple[float, float]) -> None:
        """Ordinary groups get the limits in force, others their own back if the command line wins."""
        for group, own in zip(self.optimizer.param_groups, self._own_limits, strict=False):
            if own == ordinary:
                group["max_lr"], group["min_lr"] = self.max_lr, self.min_lr
            elif own != (None, None) and self.override_opt_param_scheduler:
                group["max_lr"], group["min_lr"] = own


def _find_problems(schedule: OptimizerParamScheduler) -> list[str]:
    """Every rule that the settings break."""
    s = schedule
    is_wsd = s.lr_decay_style == "WSD"
    broken = [
        (
            s.lr_decay_style not in LR_STYLES,
            f"lr_decay_style {s.lr_decay_style!r} is not one of {', '.join(LR_STYLES)}",
        ),
        (
            s.wd_incr_style not in WEIGHT_DECAY_STYLES,
            f"wd_incr_style {s.wd_incr_style!r} is not one of {', '.join(WEIGHT_DECAY_STYLES)}",
        ),
        (s.min_lr < 0, f"min_lr {s.min_lr} is negative: use 0 or more"),
        (s.max_lr < s.min_lr, f"max_lr {s.max_lr} is below min_lr {s.min_lr}: lower min_lr"),
        (s.init_lr > s.max_lr, f"init_lr {s.init_lr} is above max_lr {s.max_lr}: start warm-up lower"),
        (s.lr_decay_steps <= 0, f"lr_decay_steps {s.lr_decay_steps} must be positive"),
        (
            s.lr_warmup_steps >= s.lr_decay_steps,
            f"lr_warmup_steps {s.lr_warmup_steps} must be below lr_decay_steps {s.lr_decay_steps}: "
            "shorten warm-up or lengthen decay",
        ),
        (s.start_wd < 0, f"start_wd {s.start_wd} is negative: use 0 or more"),
        (s.end_wd < s.start_wd, f"end_wd {s.end_wd} is below start_wd {s.start_wd}: weight decay only grows"),
        (
            s.wd_incr_style == "constant" and s.start_wd != s.end_wd,
            f"constant weight decay has start_wd {s.start_wd} and end_wd {s.end_wd}: make them equal, or "
            "use linear",
        ),
        (is_wsd and not s.wsd_decay_steps, "WSD needs wsd_decay_steps: the samples of its final decay"),
        (
            is_wsd and s.lr_wsd_decay_style not in WSD_TAIL_STYLES,
            f"lr_wsd_decay_style {s.lr_wsd_decay_style!r} is not one of {', '.join(WSD_TAIL_STYLES)}",
        ),
        (
            bool(s.override_opt_param_scheduler and s.use_checkpoint_opt_param_scheduler),
            "override_opt_param_scheduler and use_checkpoint_opt_param_scheduler exclude each other: drop "
            "one",
        ),
    ]
    return [message for is_broken, message in broken if is_broken]


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value


def _look_up(state_dict: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Value of the first of ``names`` that is there, else None."""
    return next((state_dict[name] for name in names if name in state_dict), None)
