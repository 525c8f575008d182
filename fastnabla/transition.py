"""Every sampler is a table.

A stochastic sampler walks ``x_0 → x_1 → … → x_T`` from noise to clean by Gaussian steps whose mean, like the
one-step prediction of the clean sample, is affine in the state x and the (guided) network output o:

    P(x_{i+1} | x_i) = N(a_i x_i + b_i o_i, σ_i² I),        x̂0(x_i) = c_i x_i + d_i o_i

so a sampler is a table of coefficients by step. It is computed once, in float64, from a diffusers scheduler;
nothing downstream knows what a scheduler is.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

PACKED = ("a", "b", "sigma", "precision", "c", "d", "alpha_bar", "alpha_bar_next")
"""Columns of `TransitionTable.packed`; precision is 1/σ²."""

_DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
_DDPM = ("DDPMScheduler", "DDPMParallelScheduler")
_DPM_SOLVER = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
_ALTERNATIVES = (
    "Use DDIMScheduler (any eta > 0), DDPMScheduler (variance_type='fixed_small'), or DPMSolverMultistepScheduler "
    "with algorithm_type='sde-dpmsolver++', solver_order=1, final_sigmas_type='sigma_min'."
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TransitionTable:
    """Coefficients of the T steps of a sampler; row i is the step from x_i to x_{i+1}.

    All columns are `[T]`: the two timesteps int64 (what the network is called with), the rest float64.
    """

    timestep: Tensor
    """Timestep of x_i."""
    timestep_next: Tensor
    """Timestep of x_{i+1}; 0 in the last row, whose next state is the finished sample."""
    a: Tensor
    b: Tensor
    """μ_i = a x_i + b o_i."""
    sigma: Tensor
    """Standard deviation σ_i of the step, > 0."""
    c: Tensor
    d: Tensor
    """x̂0(x_i) = c x_i + d o_i."""
    c_next: Tensor
    d_next: Tensor
    """x̂0(x_{i+1}) = c_next x_{i+1} + d_next o_{i+1}; 1 and 0 in the last row, where x_{i+1} is clean."""
    alpha_bar: Tensor
    """ᾱ at x_i: the share of signal in the state's variance."""
    alpha_bar_next: Tensor
    """ᾱ at x_{i+1}."""

    def __len__(self) -> int:
        return len(self.timestep)

    def __post_init__(self) -> None:
        if self.timestep.device.type != "cpu":  # a copy of one that was checked there, and a look at it would wait
            return
        for field in dataclasses.fields(self):
            column = getattr(self, field.name)
            bad = ~torch.isfinite(column) if field.name != "sigma" else ~(torch.isfinite(column) & (column > 0))
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"TransitionTable.{field.name}[{row}] = {column[row].item()} at timestep {self.timestep[row].item()}: "
                    "this step has no density or no prediction of the clean sample. Usual causes: a schedule that ends "
                    "at timestep 0 (set steps_offset=1 or timestep_spacing='trailing'), zero terminal SNR with "
                    "epsilon-prediction (set rescale_betas_zero_snr=False), or eta > 1 (a step may have more noise than "
                    "the state it leads to)."
                )

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, num_inference_steps: int | None = None, eta: float = 1.0
    ) -> "TransitionTable":
        """The table of a diffusers scheduler.

        Args:
            scheduler: a DDIM, DDPM or first-order SDE-DPM-Solver++ scheduler of diffusers.
            num_inference_steps: T; None if `scheduler.set_timesteps` has been called. The scheduler is not changed.
            eta: scale of the noise of DDIM steps, > 0 (η of arXiv 2010.02502, equation 16); 1 is DDPM.

        Raises:
            ValueError: the scheduler or one of its settings has no Gaussian step that is affine in the network's
                output, or eta is not a positive number.
        """
        if not 0 < eta < float("inf"):
            raise ValueError(
                f"eta = {eta}: must be positive and finite. Without noise a step has no density, and ∇-DB needs one."
            )
        name = type(scheduler).__name__
        if name not in _DDIM + _DDPM + _DPM_SOLVER:
            raise ValueError(f"scheduler {name} is not supported. {_ALTERNATIVES}")
        _reject_settings(scheduler.config, name, eta)
        if num_inference_steps is not None:
            scheduler = type(scheduler).from_config(scheduler.config)
            scheduler.set_timesteps(num_inference_steps)
        elif scheduler.num_inference_steps is None:
            raise ValueError(
                "scheduler has no timesteps: call scheduler.set_timesteps(n) or pass num_inference_steps=n"
            )
        build = _dpm_solver_table if name in _DPM_SOLVER else _ddim_table
        return build(scheduler, eta)

    def is_chain(self) -> bool:
        """Whether every step ends where the next begins: same timestep, same prediction of the clean sample."""
        pairs = [(self.timestep_next, self.timestep), (self.c_next, self.c), (self.d_next, self.d)]
        return all(torch.equal(then[:-1], now[1:]) for then, now in [*pairs, (self.alpha_bar_next, self.alpha_bar)])

    @functools.cached_property
    def noising_scale(self) -> Tensor:
        """α of the noising kernel x = α x' + s ε that takes x_{i+1} back to the signal share of x_i, `[T]` float64."""
        return (self.alpha_bar / self.alpha_bar_next).sqrt()

    @functools.cached_property
    def noising_std(self) -> Tensor:
        """s, its standard deviation, `[T]` float64."""
        return (1 - self.alpha_bar / self.alpha_bar_next).sqrt()

    def to(self, device: torch.device | str) -> "TransitionTable":
        """The table with its columns on `device`; copied there once, however often it is asked for."""
        device = torch.device(device)
        if device == self.timestep.device:
            return self
        if device not in self._moved:
            columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            for dtype in {column.dtype for column in columns.values()}:  # a copy for all columns of a dtype
                names = [name for name, column in columns.items() if column.dtype == dtype]
                columns |= zip(names, torch.stack([columns[name] for name in names]).to(device), strict=True)
            self._moved[device] = TransitionTable(**columns)
        return self._moved[device]

    @functools.cached_property
    def _moved(self) -> dict[torch.device, "TransitionTable"]:
        return {}

    def rows(self, step_index: Tensor, like: Tensor) -> "TransitionRows":
        """The rows `step_index [N]`, to compute with states such as `like [N, …]`."""
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

        Without `check`, which has to wait for the device, a timestep that is not one of them gets -1.

        Raises:
            ValueError: with `check`, a timestep is not one of the sampler's.
        """
        match = timestep.unsqueeze(-1) == self.to(timestep.device).timestep
        known = match.any(-1)
        if check and not bool(known.all()):
            stray = timestep[~known].flatten()[0].item()
            raise ValueError(f"timestep {stray} is not one of the sampler's {len(self)}: {self.timestep.tolist()}")
        return torch.where(known, match.int().argmax(-1), -1)


class TransitionRows:
    """Rows of a `TransitionTable`. Its columns (and those of the noising kernel) are attributes, gathered when first asked for, on the device of the
    states: floats as float32 (float64 if the states are), `[N, 1, …]` to broadcast against them; timesteps `[N]`.

    Args:
        table: the sampler.
        step_index: row numbers `[N]`, int64.
        like: states `[N, …]`; their shape, dtype and device alone matter.
    """

    def __init__(self, table: TransitionTable, step_index: Tensor, like: Tensor) -> None:
        self.table, self.step_index = table.to(like.device), step_index
        self._shape = (-1,) + (1,) * (like.dim() - 1)
        self._dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        values = getattr(self.table, name)[self.step_index]
        values = values.to(self._dtype).view(self._shape) if values.is_floating_point() else values
        setattr(self, name, values)
        return values

    @functools.cached_property
    def last(self) -> Tensor:
        """Where the next state is the finished sample, bool `[N, 1, …]`."""
        return (self.step_index == len(self.table) - 1).view(self._shape)


def _reject_settings(config: Any, name: str, eta: float) -> None:
    def reject(setting: str, why: str, instead: str) -> None:
        raise ValueError(f"scheduler setting {setting}={config[setting]!r} ({name}): {why}. Set {setting}={instead}.")

    if config.get("clip_sample"):
        reject("clip_sample", "clipping x̂0 makes the step's mean nonlinear in the network's output", "False")
    if config.get("thresholding"):
        reject("thresholding", "thresholding x̂0 makes the step's mean nonlinear in the network's output", "False")
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        reject("prediction_type", "unknown parametrisation", "'epsilon', 'v_prediction' or 'sample'")
    if name not in _DDIM and eta != 1.0:
        raise ValueError(f"eta = {eta}: {name} has no eta. Use DDIMScheduler, or eta = 1.")
    if name in _DDPM and config.variance_type != "fixed_small":
        reject(
            "variance_type",
            "only the posterior variance of equation 7 of arXiv 2006.11239 is supported",
            "'fixed_small'",
        )
    if name in _DPM_SOLVER:
        if config.algorithm_type != "sde-dpmsolver++":
            reject(
                "algorithm_type",
                "the step has no noise, or its mean is not that of SDE-DPM-Solver++",
                "'sde-dpmsolver++'",
            )
        if config.solver_order != 1:
            reject("solver_order", "a step of higher order depends on earlier states", "1")
        if config.final_sigmas_type != "sigma_min":
            reject("final_sigmas_type", "the last step would have no density", "'sigma_min'")
        for setting in (
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "use_lu_lambdas",
            "use_flow_sigmas",
        ):
            if config.get(setting):
                reject(setting, "the noise levels would not be those of integer timesteps", "False")


def _prediction(kind: str, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of ``x̂0 = c x + d o`` and ``ε̂ = e x + f o`` at signal share `alpha_bar`."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    if kind == "epsilon":
        return 1 / signal, -noise / signal, zero, one
    if kind == "v_prediction":
        return signal, -noise, noise, signal
    return zero, one, 1 / noise, -signal / noise


def _clean_prediction(kind: str, alpha_bar: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c and d; 1 and 0 at timestep 0, where the state is the finished sample."""
    c, d, _, _ = _prediction(kind, alpha_bar)
    finished = timestep == 0
    return torch.where(finished, 1.0, c), torch.where(finished, 0.0, d)


def _table(
    kind: str, timestep: Tensor, timestep_next: Tensor, a: Tensor, b: Tensor, sigma: Tensor, alphas: Tensor
) -> TransitionTable:
    c, d = _clean_prediction(kind, alphas[timestep], timestep)
    c_next, d_next = _clean_prediction(kind, alphas[timestep_next], timestep_next)
    return TransitionTable(
        timestep=timestep,
        timestep_next=timestep_next,
        a=a,
        b=b,
        sigma=sigma,
        c=c,
        d=d,
        c_next=c_next,
        d_next=d_next,
        alpha_bar=alphas[timestep],
        alpha_bar_next=alphas[timestep_next],
    )


def _ddim_table(scheduler: Any, eta: float) -> TransitionTable:
    """DDIM with noise (arXiv 2010.02502, equations 12 and 16); η = 1 is DDPM with its posterior variance.

    The last step ends at ᾱ_0 < 1, whatever the scheduler's `set_alpha_to_one` says: at ᾱ = 1 it would have σ = 0.
    """
    alphas = scheduler.alphas_cumprod.double().cpu()
    timestep = scheduler.timesteps.long().cpu()
    if timestep.max() >= len(alphas):
        raise ValueError(
            f"scheduler setting steps_offset={scheduler.config.get('steps_offset')} with {len(timestep)} steps: the first "
            f"timestep, {timestep.max()}, is beyond the last trained one, {len(alphas) - 1}. Use fewer steps."
        )
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    timestep_next = (timestep - stride).clamp(min=0)
    if not torch.equal(timestep_next[:-1], timestep[1:]):
        raise ValueError(
            f"scheduler setting timestep_spacing={scheduler.config.timestep_spacing!r} with {len(timestep)} steps: the "
            f"timesteps are not {stride} apart, so a step does not end where the next begins. Set "
            "timestep_spacing='leading' or a number of steps that divides num_train_timesteps."
        )
    now, then = alphas[timestep], alphas[timestep_next]
    variance = eta**2 * ((1 - then) / (1 - now) * (1 - now / then))
    sigma = variance.sqrt()
    c, d, e, f = _prediction(scheduler.config.prediction_type, now)
    direction = (1 - then - variance).sqrt()  # of the variance itself: at ᾱ = 0 the difference is exactly 0
    a, b = then.sqrt() * c + direction * e, then.sqrt() * d + direction * f
    return _table(scheduler.config.prediction_type, timestep, timestep_next, a, b, sigma, alphas)


def _dpm_solver_table(scheduler: Any, eta: float) -> TransitionTable:
    """SDE-DPM-Solver++ of first order (arXiv 2211.01095): with λ = log(α/σ) and h = λ' − λ,
    ``μ = (σ'/σ) e^{−h} x + α' (1 − e^{−2h}) x̂0`` and variance ``σ'² (1 − e^{−2h})``."""
    alphas = scheduler.alphas_cumprod.double().cpu()
    timestep = scheduler.timesteps.long().cpu()
    timestep_next = torch.cat([timestep[1:], timestep.new_zeros(1)])
    now, then = alphas[timestep], alphas[timestep_next]
    log_snr, log_snr_next = (0.5 * torch.log(x / (1 - x)) for x in (now, then))
    h = log_snr_next - log_snr
    c, d, _, _ = _prediction(scheduler.config.prediction_type, now)
    pull = then.sqrt() * -torch.expm1(-2 * h)
    a = ((1 - then) / (1 - now)).sqrt() * torch.exp(-h) + pull * c
    sigma = ((1 - then) * -torch.expm1(-2 * h)).sqrt()
    return _table(scheduler.config.prediction_type, timestep, timestep_next, a, pull * d, sigma, alphas)
