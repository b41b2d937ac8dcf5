"""What is asked of the commands beside the sweep: training, search, inversion, audit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from jaxinv import defenses, learned, networks
from jaxinv.client.kinds import AUTO, KINDS
from jaxinv.data.image_prior import IMAGE_PRIORS
from jaxinv.privacy.accounting import ACCOUNTANTS
from jaxinv.settings.fields import (
    AMPLIFY,
    BINS,
    DATA_DIR,
    JUDGE,
    MEMORY,
    MOST_COUNT,
    MOST_SEED,
    MOST_WIDTH,
    FilePath,
    Strict,
    check_float,
    check_plain,
    of_tables,
    setting,
    spell_chain,
    split_ids,
)
from jaxinv.settings.schema import RENAMED, SEARCHABLE, Cell, Plan
from jaxinv.victim.training import PRECISIONS
from jaxinv.victim.training import SCHEDULES as TRAINING_SCHEDULES


class Stop(NamedTuple):
    """Where a training keeps a checkpoint on its way."""

    kind: str  # "epoch" | "step" | "accuracy" (the first epoch that ends with it on the test split)
    value: float

    @property
    def name(self) -> str:
        """What is added to the checkpoint's name: `epoch2`, `accuracy0.5`."""
        return f"{self.kind}{self.value:g}"


def _stop(text: str) -> Stop:
    """Reads `epoch:2`, `step:500` or `accuracy:0.5`."""
    kind, _, number = text.partition(":")
    check_plain(number)
    try:
        value = float(number) if kind == "accuracy" else int(number)
    except ValueError:
        value = -1
    if kind not in ("epoch", "step", "accuracy") or value < 0 or (kind == "accuracy" and value > 1):
        raise ValueError("give such as epoch:2, step:500 or accuracy:0.5 (at most 1)")
    return Stop(kind, value)


class Training(Strict):
    """What `jaxinv.train` is asked for. Each field is a flag."""

    dataset: str = setting(
        "data",
        "tiles",
        "Images to train on: 'tiles', a tensorflow-datasets name, or the path of "
        "a folder of pictures by class or of an .npz.",
        "NAME|PATH",
    )
    augment: bool = setting("data", True, "Whether images are randomly cropped and flipped.")
    data_dir: FilePath | None = DATA_DIR
    prior: Annotated[str | None, of_tables(learned.PRIORS)] = setting(
        "attack", None, "Train this image prior of an attacker's in place of a network."
    )
    inverter: FilePath | None = setting(
        "attack",
        None,
        "Train an inverter of this trained network's updates instead: the name or folder of a "
        "checkpoint.",
        "NAME|DIR",
    )
    images: int = setting(
        "attack", 1, "Images behind each update that an inverter learns from.", ge=1, le=MOST_COUNT
    )
    defense: Annotated[str, AfterValidator(spell_chain)] = setting(
        "defense",
        defenses.NONE,
        "What is done to the updates that an inverter learns from, such as noise:1e-2.",
        "CHAIN",
    )
    model: Annotated[str, of_tables(networks.NETWORKS)] = setting(
        "network", "lenet_zhu", "Network to train."
    )
    width: int | None = setting(
        "network",
        None,
        "Channels (or units) of its first layer (default: that of its paper).",
        ge=1,
        le=MOST_WIDTH,
    )
    epochs: int = setting(
        "training",
        lambda settings: 10 if _learns(settings) else 120,
        "Passes over the training split (default: 120, of a prior or an inverter 10).",
        ge=1,
        le=10**6,
    )
    lr: float = setting(
        "training",
        lambda settings: 1e-3 if _learns(settings) else 0.1,
        "Highest learning rate (default: 0.1 of SGD, of a prior or an inverter 0.001 of Adam).",
        gt=0,
    )
    schedule: Annotated[str, of_tables(TRAINING_SCHEDULES)] = setting(
        "training",
        lambda settings: "cosine" if _learns(settings) else "step",
        "Learning-rate schedule (default: step, of a prior or an inverter cosine).",
    )
    batch: int = setting(
        "training", 128, "Images per step; with --dp, the expected number.", ge=1, le=MOST_COUNT
    )
    precision: Annotated[str, of_tables(PRECISIONS)] = setting(
        "training", "float32", "Floating-point precision; bfloat16 is for accelerators."
    )
    seed: int = setting(
        "training",
        0,
        "Seed of the initial parameters, the order of the images and the augmentation.",
        ge=0,
        le=MOST_SEED,
    )
    dp: bool = setting("privacy", False, "Whether to train with DP-SGD.")
    noise_multiplier: float | None = setting(
        "privacy", None, "Standard deviation of the noise of DP-SGD, in units of --clip.", ge=0
    )
    target_epsilon: float | None = setting(
        "privacy",
        None,
        "Choose the least noise that keeps epsilon below this, in place of --noise-multiplier.",
        gt=0,
    )
    clip: float = setting("privacy", 1.0, "Largest L2 norm of each example's gradient.", gt=0)
    delta: float | None = setting(
        "privacy",
        None,
        "Target delta; epsilon is reported at this delta (required with --dp).",
        gt=0,
        lt=1,
    )
    accountant: Annotated[str, of_tables(ACCOUNTANTS)] = setting(
        "privacy", "pld", "How --target-epsilon is accounted for: pld (tight) or rdp."
    )
    microbatch: int | None = setting(
        "privacy",
        None,
        "Examples whose gradients are in memory at once (default: 8 on a CPU, else 128).",
        ge=1,
        le=MOST_COUNT,
    )
    stop_at: tuple[Annotated[Stop, BeforeValidator(_stop)], ...] = setting(
        "output",
        (),
        "Keep a checkpoint at each of these too: epoch:2 step:500 accuracy:0.5.",
        "WHEN",
    )
    storage: Annotated[str, of_tables(PRECISIONS)] = setting(
        "output", "float32", "Precision of the checkpoint's variables: bfloat16 halves its size."
    )
    out: FilePath | None = setting(
        "output",
        None,
        "Name in checkpoints/, or a path (default: MODEL-wWIDTH-DATASET, prior-KIND-DATASET, "
        "inverter-VICTIM-DEFENSE).",
        "NAME|DIR",
    )

    @property
    def learns(self) -> bool:
        """Whether it is something of an attacker's that is trained."""
        return _learns(self.model_dump())


def _learns(settings: Mapping[str, Any]) -> bool:
    """Whether a prior or an inverter is asked for."""
    return bool(settings.get("prior") or settings.get("inverter"))


def _ranges(texts: Any) -> Any:
    """Reads `tv=1e-5:1e-1` and more of them."""
    ranges = {}
    for text in texts:
        name, _, ends = text.partition("=")
        low, _, high = ends.partition(":")
        if name in RENAMED:
            raise ValueError(f"'{name}' is now '{RENAMED[name]}'")
        if name in ranges:
            raise ValueError(f"'{name}' has two ranges; give one")
        check_plain(ends)
        try:
            ranges[name] = (float(low), float(high))
        except ValueError:
            ranges[name] = (0.0, 0.0)
        if name not in SEARCHABLE:
            raise ValueError(f"'{name}' cannot be searched; names are {', '.join(SEARCHABLE)}")
        if not 0 < ranges[name][0] < ranges[name][1] < math.inf:
            raise ValueError("give LOW:HIGH, 0 < LOW < HIGH, such as tv=1e-5:1e-1")
        for end in ranges[name]:
            check_float(end)
    return ranges


class Search(Strict):
    """What `jaxinv.search` is asked for beside one cell and a plan. Each field is a flag."""

    space: Annotated[dict[str, tuple[float, float]], BeforeValidator(_ranges)] = setting(
        "search",
        ("tv=1e-5:1e-1",),
        "Ranges to search, evenly in the logarithm, such as tv=1e-5:1e-1 lr=0.01:1.",
        "NAME=LOW:HIGH",
        min_length=1,
        validate_default=True,
    )
    candidates: int = setting("search", 64, "Settings tried on the first rung.", ge=1, le=2**16)
    rungs: int = setting(
        "search",
        3,
        "Rounds, each with a quarter of the candidates and four times the steps.",
        ge=1,
        le=10,
    )
    criterion: Literal["objective", "psnr"] = setting(
        "search",
        "psnr",
        "What chooses the best: PSNR (the images are of the training split), or the attack's own "
        "objective.",
    )
    draw: Literal["sobol", "random"] = setting("search", "sobol", "How the candidates are drawn.")
    seed: int = setting("search", 0, "Seed for drawing the candidates.", ge=0, le=MOST_SEED)


@dataclass(frozen=True)
class SearchStudy:
    """A validated search: what is tried, around which cell, on what."""

    search: Search
    cell: Cell
    plan: Plan

    @property
    def folder(self) -> Path:
        """The search's folder."""
        return Path(self.plan.out or "runs/search")


class Inverting(Strict):
    """What `jaxinv.invert` is asked for beside the settings of one cell. Each field is a flag."""

    update: FilePath = setting(
        "update",
        ...,
        "The shared update: an .npz or .safetensors file, or a folder of Orbax (docs/updates.md).",
        "FILE|DIR",
    )
    update_kind: Annotated[str, of_tables((AUTO, *KINDS))] = setting(
        "update", AUTO, "What was sent; auto tells from the numbers what can be told."
    )
    client_lr: float | None = setting(
        "update", None, "The client's learning rate, where it is known.", gt=0
    )
    classes: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MOST_COUNT)], ...] | None, BeforeValidator(split_ids)
    ] = setting(
        "update",
        None,
        "Classes of the images, where they are known, such as 3,5.",
        "CLASS,CLASS,...",
        min_length=1,
    )
    data_dir: FilePath | None = DATA_DIR
    seeds: int = setting("attack", 32, "Random initial images.", ge=1, le=10**6)
    memory: float | None = MEMORY
    out: FilePath = setting("output", "runs/inversion", "Folder of the pictures and arrays.", "DIR")


class Auditing(Strict):
    """What `jaxinv.audit` is asked for. Each field is a flag."""

    victim: FilePath = setting(
        "network",
        ...,
        "Network that the client received: a checkpoint's name or folder.",
        "NAME|DIR",
    )
    ids: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MOST_COUNT)], ...], BeforeValidator(split_ids)
    ] = setting(
        "data",
        ...,
        "The client's images, by their position in the data set, such as 17,23.",
        "ID,ID,...",
        min_length=1,
    )
    update: FilePath | None = setting(
        "update",
        None,
        "What the client sends: an .npz or .safetensors file, or a folder of Orbax "
        "(default: it is computed).",
        "FILE|DIR",
    )
    update_kind: Annotated[str, of_tables((AUTO, *KINDS))] = setting(
        "update", AUTO, "What is sent; auto tells from the numbers what can be told."
    )
    dataset: str | None = setting(
        "data", None, "Data set of the images (default: that of the victim).", "NAME"
    )
    split: str = setting("data", "test", "Split of the data set.", "NAME")
    data_dir: FilePath | None = DATA_DIR
    defense: Annotated[str, AfterValidator(spell_chain)] = setting(
        "defense",
        defenses.NONE,
        "What the client does to its update, known to the attacker, such as noise:1e-2.",
        "NAME:STRENGTH,...",
    )
    client_epochs: int = setting(
        "client", 1, "Passes of the client over its images.", ge=1, le=MOST_COUNT
    )
    client_batch: int | None = setting(
        "client", None, "Images of a local step (default: all).", ge=1, le=MOST_COUNT
    )
    client_lr: float | None = setting(
        "client",
        None,
        "Learning rate of the client (default: 0.1 of local steps that are computed).",
        gt=0,
    )
    candidates: int = setting(
        "attack", 2000, "Images among which those of the update are named.", ge=2, le=10**6
    )
    games: int = setting(
        "attack", 100, "Updates like this one that give the intervals.", ge=2, le=10**6
    )
    method: Annotated[str, of_tables(("matched", "omp", "ridge", "slab"))] = setting(
        "attack", "slab", "Method of identification."
    )
    labels: Annotated[str, of_tables(("known", "unknown"))] = setting(
        "attack",
        "known",
        "Whether whoever names images knows their labels, or tries every class of each.",
    )
    image_prior: Annotated[str, of_tables(IMAGE_PRIORS)] = setting(
        "second-order attack", "spectrum", "What the attacker knows of images."
    )
    judge: FilePath | None = JUDGE
    server: Annotated[str, of_tables(("honest", "malicious"))] = setting(
        "attack", "honest", "Whether the server also tries parameters made to imprint images."
    )
    bins: int = BINS
    amplify: float = AMPLIFY
    quick: bool = setting("attack", False, "Whether ceiling and reconstruction are left out.")
    seed: int = setting("attack", 0, "Seed of the games.", ge=0, le=MOST_SEED)
    out: FilePath = setting("output", "runs/audit", "Folder of the page and the numbers.", "DIR")
