"""Every sampler is a table.

A stochastic sampler goes ``x_0 → x_1 → … → x_T`` from noise to the clean sample in Gaussian steps. Their means and the
one-step predictions of the clean sample are affine in the state x and the (guided) network output o:

    P(x_{i+1} | x_i) = N(a_i x_i + b_i o_i, σ_i² I),        x̂0(x_i) = c_i x_i + d_i o_i

So a sampler is a table of coefficients with one row per step. It is computed once, in float64, from a diffusers scheduler of
a variance-preserving diffusion (`fastnabla.scheduler_coefficients`) or of flow matching
(`fastnabla.flow_matching_coefficients`). The rest of the code sees only the table.

States are noised data, ``x = √ᾱ x0 + n ε``. In a variance-preserving diffusion n² = 1 − ᾱ; in flow matching √ᾱ = 1 − t and n = t.
"""

import dataclasses
import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from fastnabla.flow_matching_coefficients import FLOW_SCHEDULERS, FlowRows, flow_matching_coefficients
from fastnabla.scheduler_coefficients import scheduler_coefficients

PACKED = ("a", "b", "sigma", "precision", "c", "d", "alpha_bar", "alpha_bar_next")
"""Columns of `TransitionTable.packed`; precision is 1/σ²."""
TIMESTEPS = ("timestep", "timestep_next")
"""Columns that are the network's arguments, not coefficients."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TransitionTable:
    """Coefficients of the T steps of a sampler; row i is the step from x_i to x_{i+1}.

    All columns are `[T]`: the two timesteps are float32, as diffusers has them for networks, and the others float64.
    """

    timestep: Tensor
    """Timestep of x_i, in the scheduler's units: a whole number, or 1000 t in flow matching."""
    timestep_next: Tensor
    """Timestep of x_{i+1}. In the last row, whose next state is the finished sample, it is 0 unless the sampler ends before."""
    a: Tensor
    b: Tensor
    """μ_i = a x_i + b o_i."""
    sigma: Tensor
    """Standard deviation σ_i of the step, > 0; or 0 in all steps, if the sampler is an ODE's."""
    c: Tensor
    d: Tensor
    """x̂0(x_i) = c x_i + d o_i."""
    c_next: Tensor
    d_next: Tensor
    """x̂0(x_{i+1}) = c_next x_{i+1} + d_next o_{i+1}; 1 and 0 in the last row, where x_{i+1} is clean."""
    alpha_bar: Tensor
    """ᾱ at x_i: the square of the clean sample's coefficient."""
    alpha_bar_next: Tensor
    """ᾱ at x_{i+1}."""
    noise_std: Tensor
    """n at x_i: the standard deviation of the noise in the state."""
    noise_std_next: Tensor
    """n at x_{i+1}."""

    def __len__(self) -> int:
        return len(self.timestep)

    def __post_init__(self) -> None:
        if self.timestep.device.type != "cpu":
            return  # a copy of a table checked on the CPU; checking it again would synchronise
        for field in dataclasses.fields(self):
            column = getattr(self, field.name)
            bad = ~torch.isfinite(column)
            if field.name == "sigma" and not self.is_deterministic:
                bad |= ~(column > 0)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"TransitionTable.{field.name}[{row}] = {column[row].item()} at timestep {self.timestep[row].item()}: "
                    "this step has no density or no prediction of the clean sample. Usual causes: a schedule that ends "
                    "at timestep 0 (set steps_offset=1 or timestep_spacing='trailing'; in a run: sampler.spacing), zero "
                    "terminal SNR with epsilon-prediction (set rescale_betas_zero_snr=False), or eta > 1 (a step's noise "
                    "may exceed that of the state it leads to)."
                )

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int | None = None,
        eta: float = 1.0,
        *,
        rows: FlowRows = "ddim",
        mu: float | None = None,
        end: float = 0.0,
    ) -> "TransitionTable":
        """The table of a diffusers scheduler.

        Args:
            scheduler: a DDIM, DDPM, first-order SDE-DPM-Solver++ or `FlowMatchEulerDiscreteScheduler` of diffusers; not
                modified.
            num_inference_steps: T; None if `scheduler.set_timesteps` has been called. A flow's noise levels are then the
                scheduler's; otherwise they are T, T − 1, … 1 over T, shifted once.
            eta: noise scale of DDIM steps, > 0 (η of arXiv 2010.02502, equation 16), or of a flow's `rows`; 1 is DDPM.
            rows: steps of a flow: "ddim", "flow-sde" (Flow-GRPO), "dance" (DanceGRPO), "cps" (coefficients preserved) or
                "euler" (the ODE); see `fastnabla.flow_matching_coefficients`.
            mu: μ of a flow with `use_dynamic_shifting`, as from `dynamic_shift`; for `num_inference_steps` only.
            end: noise level t at which a flow's sampler ends. With 0 the last row of "ddim" and "cps" is x̂0 and a little noise.
                With 0 < `end` < t it is an ordinary row, which plain ∇-DB and DAG need. See `ends_at_prediction`.

        Raises:
            ValueError: the scheduler or one of its settings does not give a Gaussian step affine in the network's
                output, eta is out of range, a flow's noise levels do not fall from at most 1 to 0, or `mu` is missing or, like
                the other arguments for flows, given where it has no effect.
        """
        if type(scheduler).__name__ in FLOW_SCHEDULERS:
            return cls(**flow_matching_coefficients(scheduler, num_inference_steps, eta, rows, mu, end))
        for name, value, default in (("rows", rows, "ddim"), ("mu", mu, None), ("end", end, 0.0)):
            if value != default:
                raise ValueError(f"{name} = {value!r}: only flow schedulers have it, not {type(scheduler).__name__}.")
        return cls(**scheduler_coefficients(scheduler, num_inference_steps, eta))

    def with_min_sigma(self, min_sigma: float) -> "TransitionTable":
        """The table with every σ_i raised to at least `min_sigma`. The means are unchanged.

        It bounds |b|/σ², the factor between outputs and scores, which is largest in the last steps. These are tilted only
        through their noise: the output can change by at most (σ²/b) ∇log F. The price is that finished samples keep noise of
        this standard deviation, in units of the states, unless the sampler `ends_at_prediction`. If it raises earlier steps too,
        their states have more noise than the network expects. `alpha_bar`, `noise_std` and the noising kernel do not change, so
        the kernel no longer reverses the raised steps.

        Raises:
            ValueError: `min_sigma` is not positive, or not below the largest σ.
        """
        largest = self.sigma.max().item()
        if not 0 < min_sigma < largest:
            raise ValueError(
                f"min_sigma = {min_sigma}: must be positive and below the largest σ of the sampler, {largest:.3g}, which "
                "leaves some steps as they are; lower it."
            )
        return dataclasses.replace(self, sigma=self.sigma.clamp(min=min_sigma))

    @property
    def is_deterministic(self) -> bool:
        """Whether no step has noise, so that steps have no density. Waits for the device."""
        return not bool(self.sigma.any())

    @property
    def is_flow_matching(self) -> bool:
        """Whether states are ``(1 − t) x0 + t ε``, as in flow matching, and not those of a variance-preserving diffusion. Waits
        for the device."""
        return torch.allclose(self.alpha_bar.sqrt() + self.noise_std, torch.ones_like(self.noise_std))

    @functools.cached_property
    def ends_at_prediction(self) -> bool:
        """Whether the mean of the last step is x̂0. Its noise then serves only to give it a density, and is no part of the sample:
        training adds it, evaluation does not. Waits for the device."""
        return torch.equal(self.a[-1], self.c[-1]) and torch.equal(self.b[-1], self.d[-1])

    def is_chain(self) -> bool:
        """Whether every step ends where the next begins, with the same timestep and the same clean prediction."""
        names = ("timestep", "c", "d", "alpha_bar", "noise_std")
        return all(torch.equal(getattr(self, f"{name}_next")[:-1], getattr(self, name)[1:]) for name in names)

    def memory(self) -> float:
        """corr(x_T, x_0): how much finished samples depend on the noise that they start from, between −1 and 1.

        It is that of standard Gaussian data, whose optimal network is linear: ``x̂0 = √ᾱ x / (ᾱ + n²)``. A *memoryless* sampler has
        0. With it, finetuning to the optimum samples p_ref · exp(βr); otherwise the part of the tilt that depends on x_0 is
        missing (section 2 of `objective/README.md`; arXiv 2409.08861).
        """
        slope = self.alpha_bar.sqrt() / (self.alpha_bar + self.noise_std.square())
        factors = self.a + self.b * (slope - self.c) / self.d
        variance = 1.0
        for factor, sigma in zip(factors.tolist(), self.sigma.tolist(), strict=True):
            variance = factor**2 * variance + sigma**2
        return factors.prod().item() / variance**0.5 if variance else 0.0  # Euler's single step gives a constant

    @functools.cached_property
    def noising_scale(self) -> Tensor:
        """α of the noising kernel x = α x' + s ε that takes x_{i+1} back to the noise level of x_i, `[T]` float64."""
        return (self.alpha_bar / self.alpha_bar_next).sqrt()

    @functools.cached_property
    def noising_std(self) -> Tensor:
        """s, the noising kernel's standard deviation, ``s² = n² − α² n'²``, `[T]` float64."""
        kept = self.noising_scale * self.noise_std_next
        return ((self.noise_std - kept) * (self.noise_std + kept)).sqrt()

    def to(self, device: torch.device | str) -> "TransitionTable":
        """The table with its columns on `device`. The copy is made once and cached."""
        device = torch.device(device)
        if device == self.timestep.device:
            return self
        if device not in self._moved:
            columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            for dtype in {column.dtype for column in columns.values()}:  # one transfer per dtype
                names = [name for name, column in columns.items() if column.dtype == dtype]
                columns |= zip(names, torch.stack([columns[name] for name in names]).to(device), strict=True)
            self._moved[device] = TransitionTable(**columns)
        return self._moved[device]

    @functools.cached_property
    def _moved(self) -> dict[torch.device, "TransitionTable"]:
        return {}

    def rows(self, step_index: Tensor, like: Tensor) -> "TransitionRows":
        """The rows `step_index [N]`, shaped to broadcast against states such as `like [N, …]`."""
        return TransitionRows(self, step_index, like)

    def packed(self, device: torch.device) -> Tensor:
        """The `PACKED` columns side by side, `[T, 8]` float32 on `device`."""
        return self.to(device)._packed

    @functools.cached_property
    def _packed(self) -> Tensor:
        columns = [1 / self.sigma**2 if name == "precision" else getattr(self, name) for name in PACKED]
        return torch.stack(columns, 1).float()

    def step_index(self, timestep: Tensor, check: bool = True) -> Tensor:
        """Row numbers (int64, shape of `timestep`) of timesteps at which this sampler calls the network.

        Timesteps are compared in float32, without a tolerance. This is exact for whole numbers below 2²⁴ of any dtype, and for a
        flow's, which diffusers computes in float32 and networks get as such.

        Args:
            timestep: the timesteps, of any shape; int64, float32 or float64.
            check: raise for an unknown timestep, which synchronises with the device; otherwise its row number is -1.

        Raises:
            ValueError: with `check`, a timestep is not one of the sampler's.
        """
        match = timestep.float().unsqueeze(-1) == self.to(timestep.device).timestep
        known = match.any(-1)
        if check and not bool(known.all()):
            stray = timestep[~known].flatten()[0].item()
            own = ", ".join(f"{value:g}" for value in self.timestep.tolist())
            raise ValueError(f"timestep {stray:g} is not one of the sampler's {len(self)}: {own}")
        return torch.where(known, match.int().argmax(-1), -1)


class TransitionRows:
    """Rows of a `TransitionTable`, one for each state of a batch.

    The table's columns, and those of the noising kernel, are attributes on the states' device. Each is gathered on first
    use: coefficients as float32 (float64 if the states are), `[N, 1, …]` to broadcast against the states; timesteps `[N]`
    float32.

    Args:
        table: the sampler.
        step_index: row numbers `[N]`, int64.
        like: states `[N, …]`; only their shape, dtype and device are used.
    """

    def __init__(self, table: TransitionTable, step_index: Tensor, like: Tensor) -> None:
        self.table, self.step_index = table.to(like.device), step_index
        self._shape = (-1,) + (1,) * (like.dim() - 1)
        self._dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        values = getattr(self.table, name)[self.step_index]
        values = values if name in TIMESTEPS else values.to(self._dtype).view(self._shape)
        setattr(self, name, values)
        return values

    @functools.cached_property
    def last(self) -> Tensor:
        """Whether the next state is the finished sample, bool `[N, 1, …]`."""
        return (self.step_index == len(self.table) - 1).view(self._shape)


_TABLES: weakref.WeakKeyDictionary[Any, tuple[list[Any], tuple[Any, ...], TransitionTable]] = (
    weakref.WeakKeyDictionary()
)
"""By scheduler: the objects that its table was built from, compared by identity; the settings; the table."""
_LOCK = threading.Lock()


def table_of(scheduler: Any, eta: float) -> TransitionTable:
    """`TransitionTable.from_scheduler(scheduler, eta=eta)`, cached.

    One table per scheduler is kept, for as long as the scheduler exists. It is rebuilt when η, the scheduler's timesteps or its
    configuration change. A look-up reads no tensor, so it does not synchronise.

    Raises:
        ValueError: as `from_scheduler`.
    """
    parts = [getattr(scheduler, name, None) for name in ("config", "timesteps", "alphas_cumprod", "sigmas")]
    versions = [part._version for part in parts if isinstance(part, Tensor) and not part.is_inference()]
    settings = (eta, getattr(scheduler, "num_inference_steps", None), versions)
    with _LOCK:
        try:
            kept = _TABLES.get(scheduler)
        except TypeError:  # not hashable, so it is not a scheduler and from_scheduler raises
            kept = None
        if kept is None or kept[1] != settings or any(a is not b for a, b in zip(kept[0], parts, strict=True)):
            kept = (parts, settings, TransitionTable.from_scheduler(scheduler, eta=eta))
            _TABLES[scheduler] = kept
        return kept[2]
