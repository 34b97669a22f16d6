"""Expert feed-forward networks on CPUs: a host's arithmetic for one call or several merged ones.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token, N = T * K assignments
flattened, R = rows of one expert, I = intermediate size, E = experts held.

All kernels have the same signature (`Kernel`) and are listed in `KERNELS`. `reference` states the
arithmetic in its plainest form; tests compare the others with it. One expert computes what
transformers' experts interface defines (transformers/integrations/moe.py): up-projection, bias,
gate or activation, down-projection, bias, optional norm, and then the assignment's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import fused, onednn
from .products import multiplies, product

# With `exact`, every matrix product has this many rows. The bits of a row's result depend on the
# number of rows in the product, but not on the row's position (measured; a test checks it).
TILE_ROWS = 16


# Parameters of a post-expert norm (of each expert's output), which all experts of a layer share.
# Each expert has a copy, so that a host that holds an expert can compute it, in one version.
SHARED_NAMES = ("norm", "norm_bias")

# ((R, H), the shared tensors by name) -> (R, H)
PostNorm = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """What the experts of one layer have in common, apart from their weights.

    ``activate`` maps the up-projection's output, (R, 2I) for gated experts and (R, I) for others,
    to (R, I). ``post_norm`` maps (R, H) to (R, H) after the down-projection.
    """

    transposed: bool
    activate: Callable[[Tensor], Tensor]
    post_norm: PostNorm | None = None


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert: up (2I or I, H) and down (H, I), or both transposed if the form says so.

    The matrices may be packed (`pack`); ``fused`` names the activation if vLLM's kernel takes them.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    norm: Tensor | None = None
    norm_bias: Tensor | None = None
    fused: str | None = None
    # What the tensors lie in, kept alive with them, if they do not own their memory.
    memory: object = field(default=None, repr=False, compare=False)
    # Where they lie among others of their layer that vLLM's kernel computes together.
    bank: fused.LayerBank | None = field(default=None, repr=False, compare=False)
    place: int = field(default=0, repr=False, compare=False)

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], *, fused: str | None = None, memory: object = None
    ) -> ExpertWeights:
        """Make an expert from the result of `tensors`; ``fused`` and ``memory`` as in the class."""
        biases = tensors.get("up_bias"), tensors.get("down_bias")
        norms = tensors.get("norm"), tensors.get("norm_bias")
        return cls(tensors["up"], tensors["down"], *biases, *norms, fused, memory)

    def tensors(self) -> dict[str, Tensor]:
        named = {
            "up": self.up,
            "down": self.down,
            "up_bias": self.up_bias,
            "down_bias": self.down_bias,
            "norm": self.norm,
            "norm_bias": self.norm_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def shared(self) -> dict[str, Tensor]:
        """Return the tensors that all experts of the layer have in common."""
        named = {"norm": self.norm, "norm_bias": self.norm_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def is_packed(self) -> bool:
        return self.fused is not None or self.up.is_mkldnn or self.down.is_mkldnn


class Kernel(Protocol):
    def __call__(
        self,
        form: ExpertForm,
        experts: Mapping[int, ExpertWeights],
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        out_TH: Tensor,
    ) -> None:
        """Write the sum over K of weight * expert(x) to ``out_TH``.

        ``ids_TK`` is int32 or int64 and -1 where an assignment is unused; every other id is a key
        of ``experts``. ``x_TH`` has the experts' dtype; ``weights_TK`` and ``out_TH`` have the wide
        one (`wide_dtype`), in which the sum is taken.
        """
        ...


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums, gate weights and gradients for experts of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack(form: ExpertForm, expert: ExpertWeights) -> ExpertWeights:
    """Return the expert with its matrices in the layout of the kernel that will compute it.

    This is vLLM's layout if vLLM is installed and supports the form, otherwise oneDNN's. oneDNN
    would convert a plain matrix in every product (measured with few rows: 1.5 to 2 times slower).
    The size stays the same, and `unpack` restores the same bits.
    """
    up, down = (m.t().contiguous() if form.transposed else m for m in (expert.up, expert.down))
    if expert.up_bias is None and expert.down_bias is None and fused.takes(up, down):
        activation = fused.activation_of(form.activate)
        if activation is not None:
            up, down = fused.pack(up), fused.pack(down)
            return replace(expert, up=up, down=down, fused=activation)
    up, down = onednn.pack(up), onednn.pack(down)
    return replace(expert, up=up, down=down)


def unpack(form: ExpertForm, expert: ExpertWeights) -> ExpertWeights:
    def plain(matrix: Tensor) -> Tensor:
        if expert.fused is not None:
            dense = fused.unpack(matrix)
        elif matrix.is_mkldnn:
            dense = matrix.to_dense()
        else:
            return matrix
        return dense.t().contiguous() if form.transposed else dense

    return replace(expert, up=plain(expert.up), down=plain(expert.down), fused=None)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs ``dtype`` here; 16-bit types need a CPU that computes in them."""
    return multiplies(device, dtype)


def _product(x_RI: Tensor, matrix: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if matrix.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x_RI, matrix, bias, "none", [], "")
    if not transposed:
        return product(x_RI, matrix.t(), bias)
    y_RO = product(x_RI, matrix)
    return y_RO if bias is None else y_RO + bias


def expert_ffn(form: ExpertForm, expert: ExpertWeights, x_RH: Tensor) -> Tensor:
    """Compute one expert on its rows: (R, H) -> (R, H) in the expert's dtype, not weighted."""
    if expert.fused is None:
        return expert_down(form, expert, expert_up(form, expert, x_RH))
    return _normed(form, expert, fused.ffn(x_RH, expert.up, expert.down, expert.fused))


def expert_up(form: ExpertForm, expert: ExpertWeights, x_RH: Tensor) -> Tensor:
    """Compute an expert's first product: (R, H) -> (R, 2I), or (R, I) if it is not gated."""
    return _product(x_RH, expert.up, expert.up_bias, form.transposed)


def expert_down(form: ExpertForm, expert: ExpertWeights, up_R: Tensor) -> Tensor:
    """Compute what comes after `expert_up`: its result -> (R, H)."""
    y_RH = _product(form.activate(up_R), expert.down, expert.down_bias, form.transposed)
    return _normed(form, expert, y_RH)


def _normed(form: ExpertForm, expert: ExpertWeights, y_RH: Tensor) -> Tensor:
    return y_RH if form.post_norm is None else form.post_norm(y_RH, expert.shared())


class SortedAssignments(NamedTuple):
    """The used assignments, sorted by expert: their indices in N, the experts, and rows of each."""

    order_N: Tensor
    experts: list[int]
    rows: list[int]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (expert, indices in N of the assignments that name it)."""
        return zip(self.experts, self.order_N.split(self.rows), strict=True)


def sorted_assignments(ids_TK: Tensor, device: torch.device) -> SortedAssignments:
    """Group the assignments by expert; the order is moved to ``device``.

    ``ids_TK`` is best on the CPU, because Python needs its values.
    """
    # A stable sort keeps the assignments of one expert in the order of their tokens. Unused
    # assignments (-1) sort first and are cut off.
    sorted_N, order_N = torch.sort(ids_TK.reshape(-1), stable=True)
    found, counts = torch.unique_consecutive(sorted_N, return_counts=True)
    experts, rows = found.tolist(), counts.tolist()
    if experts and experts[0] < 0:
        order_N, experts, rows = order_N[rows[0] :], experts[1:], rows[1:]
    return SortedAssignments(order_N.to(device), experts, rows)


def _expert_rows(
    form: ExpertForm, used: list[ExpertWeights], x_NH: Tensor, rows: list[int]
) -> Tensor:
    """Compute each expert on its rows, which follow each other: (N, H) -> (N, H), not weighted."""
    banks = {expert.bank for expert in used}
    bank = banks.pop() if len(banks) == 1 else None
    if bank is None or form.post_norm is not None:
        pieces = zip(used, x_NH.split(rows), strict=True)
        return torch.cat([expert_ffn(form, expert, x_RH) for expert, x_RH in pieces] or [x_NH])
    # Experts that lie together are computed in one call, which reads their weights at full speed.
    place_N = torch.tensor([e.place for e in used], dtype=torch.int32)
    return bank.ffn(x_NH, place_N.repeat_interleave(torch.tensor(rows)))


def loop_kernel(
    form: ExpertForm,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    out_TH: Tensor,
) -> None:
    """Compute one expert after another, or those together that one kernel computes at once."""
    order_N, used, rows = sorted_assignments(ids_TK, x_TH.device)
    token_N = order_N // ids_TK.shape[1]
    x_NH = x_TH.index_select(0, token_N)
    # An expert with few rows takes microseconds, so gathering rows, weighting and adding up are
    # done once for all experts: gather (T, H) -> (N, H), multiply, scatter-add (N, H) -> (T, H).
    y_NH = _expert_rows(form, [experts[e] for e in used], x_NH, rows).to(out_TH.dtype)
    y_NH.mul_(weights_TK.reshape(-1).index_select(0, order_N).unsqueeze(-1))
    out_TH.zero_().index_add_(0, token_N, y_NH)


def reference_kernel(
    form: ExpertForm,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    out_TH: Tensor,
) -> None:
    """Compute token by token and assignment by assignment, as the definition reads."""
    out_TH.zero_()
    for t, row in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(row):
            if expert >= 0:
                y_1H = expert_ffn(form, experts[expert], x_TH[t : t + 1]).to(out_TH.dtype)
                out_TH[t] += weights_TK[t, k] * y_1H[0]


KERNELS: dict[str, Kernel] = {"loop": loop_kernel, "reference": reference_kernel}


def exact_rows(
    form: ExpertForm,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    out_TKH: Tensor,
) -> None:
    """Write weight * expert(x) of each assignment, zero where an assignment is unused.

    ``weights_TK`` and ``out_TKH`` have the wide type. A row's bits depend on its own input only,
    because every product has `TILE_ROWS` rows.
    """
    top_k, hidden = ids_TK.shape[1], x_TH.shape[1]
    weights_N = weights_TK.reshape(-1)
    out_NH = out_TKH.view(-1, hidden)
    out_NH.zero_()
    tile = torch.zeros(TILE_ROWS, hidden, dtype=x_TH.dtype, device=x_TH.device)
    for expert, assignment_R in sorted_assignments(ids_TK, x_TH.device).pieces():
        for piece in assignment_R.split(TILE_ROWS):
            rows = piece.numel()
            # Rows after the first ``rows`` are zeros or leftovers; their results are dropped.
            tile[:rows] = x_TH.index_select(0, piece // top_k)
            y_RH = expert_ffn(form, experts[expert], tile)[:rows].to(out_TKH.dtype)
            out_NH[piece] = y_RH * weights_N.index_select(0, piece).unsqueeze(-1)


def all_finite(out: Tensor) -> bool:
    """Return whether all elements are finite: it costs one sum, which is so only if they are.

    It is also False where only the sum overflows.
    """
    return math.isfinite(out.sum().item())


def bad_experts(
    form: ExpertForm,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    out: Tensor,
) -> list[int]:
    """Return the experts that made ``out`` ((T, H) or (T, K, H)) not finite from finite rows."""
    if all_finite(out):
        return []
    finite_T = torch.isfinite(x_TH.float()).all(dim=1)
    guilty = []
    for expert, assignment_R in sorted_assignments(ids_TK, x_TH.device).pieces():
        token_R = assignment_R // ids_TK.shape[1]
        rows = x_TH.index_select(0, token_R[finite_T.index_select(0, token_R)])
        if rows.shape[0] and not bool(
            torch.isfinite(expert_ffn(form, experts[expert], rows)).all()
        ):
            guilty.append(expert)
    return guilty
