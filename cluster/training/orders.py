"""What a training run asks of the hosts, and what they answer.

Whatever is trained has a key and an owner: an expert; the tensors that the experts of a layer share
(`SHARED`); a block of the trunk's parameters (`trunk_block`). An owner is a host that keeps the
master and the optimizer's state. With redundancy a key has several, which apply the same updates,
so that one may be lost.

A run sends each order to several hosts at once, and decides by all answers. Each order may be sent
again: a host that has carried it out answers as before. All but `OpenRun` raise Superseded for an
older run than the host knows, and NotHere for one that it does not know.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

from ...proto.errors import MoesaicError
from ..expert_keys import ExpertKey
from ..placement import HostEntry
from ..versions import WeightVersions
from .contributions import Attempt

# One run trains at a time; hosts know it by a number that grows from run to run.
RunId = int


class BulkKey(NamedTuple):
    """Names tensors that travel between processes: of one key, by their names in the pool.

    - "weights": a version of what is served, in the model's type;
    - "gradient": what ``source`` has added up in an attempt, in the wide type (in an exact attempt
      float64, and a trunk's in any);
    - "state": what an owner keeps after the last commit (`OwnedTensors.state`).
    """

    kind: Literal["weights", "gradient", "state"]
    key: ExpertKey
    version: int = 0  # of weights
    attempt: Attempt | None = None  # of a gradient
    source: str = ""  # of a gradient
    run: RunId = 0  # of a state, and of weights that are put


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRun:
    """Begin a run; the host forgets what older runs have left. Raises Superseded for an older one.

    One that was closed begins anew: a run lets a host that it has lost sight of do both. The answer
    is `Opened`.
    """

    run: RunId
    model: str
    optimizer: str  # a class of torch.optim
    settings: Mapping[str, object] = field(default_factory=dict)  # its hyperparameters


class Opened(NamedTuple):
    """The memory that the host's machine has free, where training would take it; None: unknown."""

    free_bytes: int | None


class NewlyOwned(NamedTuple):
    """How a host becomes the owner of a key.

    Tensors that ``groups`` does not name are not trained. Its state is that of ``source``; without
    one it is what was put into the host for the key, its state or else its weights; at last it
    begins with the weights that the host itself serves.
    """

    groups: Mapping[str, int]  # name -> the group of its hyperparameters
    source: HostEntry | None = None  # another owner


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """Become the owner of keys, between two commits. The answer is None.

    Raises NotHere if their tensors are nowhere, and BadInput if these cannot be trained.
    """

    run: RunId
    versions: WeightVersions  # of the weights after the last commit
    step: int  # steps that were committed until then
    keys: Mapping[ExpertKey, NewlyOwned]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disown:
    """Forget keys that another host owns by now. The answer is None."""

    run: RunId
    keys: tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Begin an attempt at a step, and forget the gradients of the one before. Answer: None."""

    attempt: Attempt
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Close the attempt for backward calls. The answer is `Gathered`."""

    attempt: Attempt


class Gathered(NamedTuple):
    """The experts whose gradients the host has added up; other hosts can read them now."""

    keys: frozenset[ExpertKey]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Sum the gradients of owned keys over their sources, in their order. Answer: `Prepared`.

    Several orders may share the keys of an attempt. A source is this host, or one of ``peers``; all
    others are workers, which have put their gradients into this host. Without a source the
    gradient is zero; None: the key keeps its weights and its state in this step. Names that the
    gradients of all workers lack keep theirs, too.

    Raises NotHere if a gradient is missing, and HostLost.
    """

    attempt: Attempt
    sources: Mapping[ExpertKey, tuple[str, ...] | None]
    peers: Mapping[str, HostEntry] = field(default_factory=dict)


class Prepared(NamedTuple):
    """The sum of squares of each gradient that was summed up, by key and name."""

    squares: Mapping[ExpertKey, Mapping[str, float]]


class GroupUpdate(NamedTuple):
    """How the tensors of a group are updated in one step."""

    coefficient: float  # their gradients are multiplied by this
    settings: Mapping[str, object]  # hyperparameters of this step, such as lr


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Apply the prepared gradients; serve the experts that this host holds as ``version``, too.

    The answer is None. Versions before the one that is served now stay until the controller evicts
    them. Raises NotHere if a key that the host owns is not prepared for the attempt.
    """

    attempt: Attempt
    version: int
    step: int  # steps that are committed with this one
    groups: Mapping[int, GroupUpdate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Serve the owned experts that this host holds as ``version``, too, with their masters' values.

    It is for owners that have taken over a checkpoint's state as this version. The answer is None.
    """

    run: RunId
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    """Fetch a version of experts that this host holds from their owners, and serve it, too.

    The answer is None. Raises NotHere and HostLost.
    """

    run: RunId
    version: int
    owners: Mapping[ExpertKey, HostEntry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeed:
    """Obey a run in the place of an older one, whose process is gone: ``since`` or a later one.

    What the host keeps for that run is this one's. The answer is `Inherited`. Raises NotHere if the
    host has none of these runs, and BadInput if they train with another optimizer.
    """

    run: RunId
    since: RunId
    model: str
    optimizer: str
    settings: Mapping[str, object] = field(default_factory=dict)


class Inherited(NamedTuple):
    """What a host has kept of the run that came before."""

    versions: Mapping[ExpertKey, int]  # of the weights that the masters of what it owns are
    groups: Mapping[ExpertKey, Mapping[str, int]]  # of the tensors of each of these keys
    step: int  # steps that have led to the newest of them
    committed: Commit | None  # that was carried out last
    prepared: Attempt | None  # the attempt for which all that it owns is prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Carry out a commit that an older run has decided, and that other hosts have carried out.

    The answer is None. Raises NotHere as `Commit` does.
    """

    run: RunId
    commit: Commit


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRun:
    """Forget a run with all that the host owns and has added up for it. The answer is None."""

    run: RunId


Order = (
    OpenRun
    | Own
    | Disown
    | Begin
    | Gather
    | Reduce
    | Commit
    | Serve
    | Renew
    | Succeed
    | Finish
    | CloseRun
)
Answer = Opened | Gathered | Prepared | Inherited | None

T = TypeVar("T")
Answers = Mapping[str, Answer | MoesaicError]
# It yields orders by host, gets their answers, and returns something when it is over.
Exchange = Generator[Mapping[str, Order], Answers, T]
