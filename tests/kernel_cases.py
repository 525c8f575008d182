"""Inputs for the objective's kernels, and assertions that compare the kernels with plain torch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bench.published import ddim_table
from fastnabla.objective.fused import FUSED
from fastnabla.objective.gaussian import guide
from fastnabla.objective.ops import PLAIN, ObjectiveOps
from fastnabla.objective.settings import Objective
from fastnabla.transition import TransitionRows
from tests.checks import randn

HAS_GPU = torch.cuda.is_available()
CPU = pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="with a GPU, kernels are compiled for it"))
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", [CPU, GPU])
on_cpu = pytest.mark.parametrize("device", [CPU])
on_gpu = pytest.mark.parametrize("device", [GPU])

TABLE = ddim_table(10, eta=0.8)
LAST = len(TABLE) - 1
OBJECTIVE, GUIDANCE_SCALE = Objective(beta=2.0, prior_weight=0.5, trust_region_weight=0.7), 5.0
PAIRS = ("output", "output_ref")
TENSORS = (
    *(*PAIRS, "x", "x_next", "flow", "reward_score", "pixel_score", "output_old", "score", "score_ref"),
    *("reward_score_next", "flow_next", "vjp"),
)
MIXED = ("output", "output_ref", "flow", "flow_next")
"""What a network in channels-last makes, while the states that it was given are contiguous."""

DTYPES = {
    "float32": {},
    "bfloat16": dict.fromkeys(("output_dtype", "state_dtype", "flow_dtype"), torch.bfloat16),
    "float16": dict.fromkeys(("output_dtype", "state_dtype", "flow_dtype"), torch.float16),
    "mixed": {"output_dtype": torch.bfloat16, "flow_dtype": torch.float16},
}

LAYOUTS = {
    "contiguous": {},
    "channels_last": {"channels_last": TENSORS},
    "mixed": {"channels_last": MIXED},
    "alternating": {"channels_last": TENSORS[1::2]},
    "mixed_several_tiles": {"row": (3, 23, 29), "channels_last": MIXED},
    "odd_several_tiles": {"row": (4, 17, 19)},
    "more_tiles_than_are_summed_at_once": {"row": (4, 65, 67)},
    "more_channels_than_a_tile": {
        "row": (1030, 2),
        "channels_last": ("x", "reward_score", "reward_score_next", "score"),
    },
    "five_dimensions": {"row": (3, 2, 5, 7), "channels_last": MIXED},
    "one_channel": {"row": (1, 9, 13), "channels_last": MIXED},
    "one_dimension": {"row": (257,), "channels_last": MIXED},
    "one_element": {"row": (1, 1, 1), "channels_last": MIXED},
}


def in_channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def arrange(tensor: Tensor, channels_last: bool) -> Tensor:
    return in_channels_last(tensor) if channels_last else tensor.contiguous()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Transitions, as arguments by name; optional arguments may be missing."""

    tensors: dict[str, Tensor]
    step_index: Tensor
    objective: Objective
    guidance_scale: float | None

    def __getitem__(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def __len__(self) -> int:
        return len(self.step_index)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the operations besides tensors."""
        return {"objective": self.objective, "guidance_scale": self.guidance_scale}

    @property
    def rows(self) -> TransitionRows:
        return TABLE.rows(self.step_index, self["x"])

    def double(self) -> "Batch":
        """The same batch in float64."""
        return self.replace(**{name: tensor.double() for name, tensor in self.tensors.items()})

    def replace(self, **tensors: Tensor) -> "Batch":
        return dataclasses.replace(self, tensors={**self.tensors, **tensors})

    def at(self, *steps: int) -> "Batch":
        """The same batch at other steps of the sampler."""
        return dataclasses.replace(self, step_index=self.step_index.new_tensor(steps))

    def spoilt(self, name: str, row: int) -> "Batch":
        """The same batch with a NaN in one element of a row of the tensor `name`."""
        tensor = self[name].clone()
        tensor[row].view(-1)[tensor[row].numel() // 2] = float("nan")
        return self.replace(**{name: tensor})

    def alone(self, row: int) -> "Batch":
        """A batch of only the transition `row`."""
        tensors = {
            name: arrange(one_row(tensor, row, len(self)), not tensor.is_contiguous())
            for name, tensor in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors, step_index=self.step_index[row : row + 1])


def huge_batch(device: str, names: tuple[str, ...]) -> Batch:
    """A bfloat16 batch whose outputs have more than 2³¹ elements, so that the last rows need 64-bit offsets."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    rows, row = 2**16 + 1, (4, 64, 64)
    source = torch.Generator(device).manual_seed(0)
    tensors = {
        name: torch.randn((1 + (name in PAIRS)) * rows, *row, generator=source, device=device, dtype=torch.bfloat16)
        for name in names
    }
    tensors["upstream"] = torch.randn(rows, generator=source, device=device)
    step_index = torch.arange(rows, device=device) % LAST
    return Batch(tensors=tensors, step_index=step_index, objective=OBJECTIVE, guidance_scale=GUIDANCE_SCALE)


def one_row(tensor: Tensor, row: int, rows: int) -> Tensor:
    """The part of a tensor of N rows, or of N pairs of rows, that belongs to the transition `row`."""
    return tensor[row::rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes, dtypes, layouts and weights of a call's inputs."""

    row: tuple[int, ...] = (4, 7, 9)
    steps: tuple[int, ...] = (1, LAST, 6)
    output_dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    flow_dtype: torch.dtype = torch.float32
    channels_last: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    objective: Objective = dataclasses.field(default_factory=lambda: OBJECTIVE)
    guidance_scale: float | None = GUIDANCE_SCALE

    @classmethod
    def of(cls, **options: Any) -> "Case":
        """A case by fields of its own and of its objective."""
        own = {field.name for field in dataclasses.fields(cls)} & options.keys()
        others = {name: value for name, value in options.items() if name not in own}
        return cls(objective=dataclasses.replace(OBJECTIVE, **others), **{name: options[name] for name in own})

    def draw(self, device: str = "cpu", seed: int = 0) -> Batch:
        """N transitions of the sampler `TABLE`, for a policy that is near the reference, as in finetuning."""
        shape, w = (len(self.steps), *self.row), self.guidance_scale
        seeds = iter(range(100 * seed, 100 * seed + 100))

        def normal(scale: float = 1.0) -> Tensor:
            return scale * randn(*shape, seed=next(seeds))

        def pair(output: Tensor | None = None, scale: float = 1.0) -> Tensor:
            unconditional = normal(scale)
            change = unconditional if w is None else torch.cat([unconditional, unconditional + 0.3 * normal(scale)])
            return change if output is None else output + change

        step_index, x, output = torch.tensor(self.steps, dtype=torch.int64), normal(), pair()
        rows, score = TABLE.rows(step_index, x), normal()
        tensors = {
            "output": output,
            "output_ref": pair(output, 0.1),
            "x": x,
            "x_next": rows.a * x + rows.b * guide(output, w) + rows.sigma * normal(),
            "flow": normal(),
            "reward_score": normal(),
            "pixel_score": normal(),
            "output_old": guide(output, w) + normal(0.1),
            "score": score,
            "score_ref": score + normal(0.3),
            "reward_score_next": normal(),
            "flow_next": normal(),
            "vjp": normal(),
        }
        dtypes = dict.fromkeys(PAIRS, self.output_dtype) | dict.fromkeys(("flow", "flow_next"), self.flow_dtype)
        tensors = {
            name: arrange(tensor.to(device, dtypes.get(name, self.state_dtype)), name in self.channels_last)
            for name, tensor in tensors.items()
            if name not in self.without
        }
        tensors["upstream"] = randn(len(self.steps), seed=next(seeds)).to(device)
        step_index = step_index.to(device)
        return Batch(
            tensors=tensors, step_index=step_index, objective=self.objective, guidance_scale=self.guidance_scale
        )


Evaluate = Callable[[ObjectiveOps, Batch], dict[str, Tensor]]
"""Computes an operation's results and gradients, by name, for a batch."""


def assert_matches(evaluate: Evaluate, batch: Batch) -> dict[str, Tensor]:
    """Check that the kernels' results have the dtypes of plain torch's and are as accurate; return them."""
    actual, plain, exact = evaluate(FUSED, batch), evaluate(PLAIN, batch), evaluate(PLAIN, batch.double())
    assert {name: value.dtype for name, value in actual.items()} == {name: v.dtype for name, v in plain.items()}
    assert_as_good(actual, plain, exact)
    return actual


def assert_as_good(actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """In each row, the error of `actual` is at most twice that of `plain` torch from the same inputs, plus 1e-6 of the row's
    norm.

    The floor is for rows where plain torch happens to be exact: a sum of a few hundred float32 numbers may be correct to the
    last bit, while another summation order has an error of several units of 2⁻²⁴ = 6e-8. Of 1500 random `cases` of each
    operation, the worst would have needed 4e-7. Rows that are 0 must be exactly 0.
    """
    assert actual.keys() == plain.keys() == exact.keys()

    def size(values: Tensor) -> Tensor:
        return values.double().reshape(len(values), -1).norm(dim=1)

    for name, truth in exact.items():
        assert actual[name].shape == plain[name].shape == truth.shape, name
        error = size(actual[name].double() - truth)
        allowed = 2 * size(plain[name].double() - truth) + 1e-6 * size(truth)
        assert (error <= allowed).all(), f"{name}: errors by row {error.tolist()}, allowed {allowed.tolist()}"


def assert_memory_order(result: Tensor, tensor: Tensor) -> None:
    """`result` has the layout of `tensor`: contiguous, channels-last, or both where they coincide."""
    for one, other in ((result, tensor), (result.movedim(1, -1), tensor.movedim(1, -1))):
        assert one.is_contiguous() == other.is_contiguous(), f"strides {result.stride()}, expected {tensor.stride()}"


def assert_rows_stand_alone(evaluate: Evaluate, batch: Batch, rows: Iterable[int]) -> None:
    """A transition's results are bitwise the same in the batch and alone."""
    together = evaluate(FUSED, batch)
    for row in rows:
        in_batch = {name: one_row(value, row, len(batch)) for name, value in together.items()}
        assert_same_bits(in_batch, evaluate(FUSED, batch.alone(row)))


def assert_nan_stays(evaluate: Evaluate, batch: Batch, name: str, row: int) -> dict[str, Tensor]:
    """A NaN in a row of one argument spreads to the same elements as in plain torch, and to no other row; returns where the
    results are NaN."""
    spoilt = batch.spoilt(name, row)
    actual, plain = ({n: v.isnan() for n, v in evaluate(o, spoilt).items()} for o in (FUSED, PLAIN))
    assert_same_bits(actual, plain)
    for other in set(range(len(batch))) - {row}:
        assert not any(one_row(found, other, len(batch)).any() for found in actual.values())
    return actual


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the context, torch fills uninitialised memory with NaN, so that reads of it are detected."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def cases(without: list[tuple[str, ...]]) -> st.SearchStrategy[Case]:
    """Random cases, with rows of 16 to 11³ elements; in smaller rows cancellation may leave no correct digits."""
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    return st.builds(
        Case,
        row=st.lists(st.integers(1, 11), min_size=1, max_size=3)
        .map(tuple)
        .filter(lambda r: torch.Size(r).numel() >= 16),
        steps=st.lists(st.integers(0, LAST), min_size=1, max_size=3).map(tuple),
        output_dtype=dtypes,
        state_dtype=dtypes,
        flow_dtype=dtypes,
        channels_last=st.sets(st.sampled_from(TENSORS)).map(tuple),
        without=st.sampled_from(without),
        guidance_scale=st.sampled_from([None, 1.0, 5.0]),
        objective=st.builds(
            Objective,
            beta=st.sampled_from([0.0, 2.0]),
            gamma=st.sampled_from(["alpha_bar", "sqrt_alpha_bar", "constant"]),
            prior_weight=st.sampled_from([1.0, 0.5, 0.0]),
            weighting=st.sampled_from(["score", "sigma"]),
            trust_region_weight=st.sampled_from([0.0, 0.7]),
        ),
    )
