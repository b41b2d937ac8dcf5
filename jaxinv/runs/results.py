"""Rows on disk: one run folder, one frozen schema, written so that a kill loses one block at most.

    runs/NAME/
      run.json               what was asked for, and every session that worked on it
      trials/BLOCK.parquet   one row per trial; written last: its presence commits the block
      traces/BLOCK.parquet   PSNR and objective by step
      images/BLOCK.npz       reconstructions and truths, uint8
      snapshots/             of blocks in work, see `engine/snapshots.py`
      extras/BLOCK.npz       of each target's best seed: singular values and least determined
                             directions after a polish; image and standard deviation of bayes;
                             pictures of its way, uint8

A *block* is one cell on a group of targets, named `c0003-t0008` (cell 3, targets from position 8).
Every file is written under a temporary name, flushed to disk and renamed.
"""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from jaxinv.engine.likeness import Likeness
from jaxinv.errors import UserError
from jaxinv.files import LOCK, first_error, read_json, read_npz, write_file
from jaxinv.metrics import Scores
from jaxinv.settings.fields import kind_of
from jaxinv.settings.schema import Cell, Text

SCHEMA_VERSION = 14

CHOOSE_TARGETS = ("dataset", "images", "grouping")  # settings by which a cell's targets differ

# What `metrics.score` says of a trial; its PSNR by image stands in columns of its own.
SCORES = tuple(name for name in Scores._fields if not name.startswith("psnr_"))
BASELINES = tuple(f"baseline_{name}" for name in SCORES)  # the mean-color image's
# What is measured of a trial, and undefined where it failed.
LIKENESS = Likeness._fields  # measures beside PSNR; null where judge or package are not there
METRICS = (*SCORES, *LIKENESS, "objective", "label_accuracy", "update_cosine", "update_error")

# What identifies a trial and what was measured of it. Images of one target are matched one to one
# before measuring; `psnr`, `ssim`, `mse` are means over the target's images, `psnr_best` the best.
_MEASURED = [
    ("schema_version", pa.int32()),
    ("cell", pa.int32()),
    ("target_id", pa.int64()),  # position, in the dataset's original order, of the first image
    ("image_ids", pa.list_(pa.int64())),
    ("noise_seed", pa.int64()),  # names the draw of the client's defense; 0 where it draws nothing
    ("seed", pa.int64()),  # names the attack's random initial image
    # "ok", or "nonfinite", a failure; of a closed form "exact" or "mixture", by the update's own
    # evidence; of a polish "converged", "stalled" or "steps", which were all taken.
    ("status", pa.string()),
    *((name, pa.float64()) for name in SCORES),
    ("psnr_best", pa.float64()),
    ("psnr_images", pa.list_(pa.float64())),  # of each image
    *((name, pa.float64()) for name in LIKENESS),
    ("objective", pa.float64()),  # distance between the updates at the end, without the prior
    ("prior", pa.float64()),  # all priors at the end, each times its weight
    ("label_accuracy", pa.float64()),
    *((name, pa.float64()) for name in BASELINES),
    ("update_cosine", pa.float64()),  # of what was shared with the update before the defense
    ("update_error", pa.float64()),  # |shared - update| / |update|
    ("victim_digest", pa.string()),  # sha256 of the attacked parameters
    ("victim_accuracy", pa.float64()),  # on the test split; null where it was not trained
    ("victim_epsilon", pa.float64()),  # of its training with DP-SGD, else null; by PLD
    ("victim_delta", pa.float64()),
    ("capacity", pa.float64()),  # images that one gradient can determine; NaN: of several steps
    ("judge_digest", pa.string()),  # sha256 of who judged the reconstructions; null: nobody
    ("candidates", pa.int32()),  # among whom each was looked for, beside its own images
    ("prior_source", pa.string()),  # of what images the attack's prior was made; null without
    ("prior_images", pa.int32()),  # and of how many
    ("learned_source", pa.string()),  # what the attacker has trained, of what, and its digest
    ("learned_saw_class", pa.bool_()),  # whether images of the target's classes were in that
    ("targets_at_once", pa.int32()),  # of the plan by which the trial was computed
    ("seeds_at_once", pa.int32()),
    ("devices", pa.int32()),
    ("program_bytes", pa.int64()),  # of each device, by the compiler's analysis
]
COLUMNS = {"objective": "objective_type"}  # settings whose name a measured value holds


def _column(name: str, annotation: Any) -> tuple[str, pa.DataType]:
    """The column of a setting; null where it has no value."""
    numbers = {
        bool: pa.bool_(),
        int: pa.int64() if name.endswith("seed") else pa.int32(),
        float: pa.float64(),
    }
    return COLUMNS.get(name, name), numbers.get(kind_of(annotation), pa.string())


SETTINGS = [_column(name, field.annotation) for name, field in Cell.model_fields.items()]
TRIALS = pa.schema(_MEASURED + SETTINGS)
TRACES = pa.schema(
    [
        ("schema_version", pa.int32()),
        ("cell", pa.int32()),
        ("target_id", pa.int64()),
        ("noise_seed", pa.int64()),
        ("seed", pa.int64()),
        ("step", pa.int32()),  # iterations done when measured
        ("psnr", pa.float32()),
        ("objective", pa.float32()),
    ]
)


class Session(BaseModel):
    """A process that worked on a run."""

    started: str
    command: str
    versions: dict[str, str]
    device: str


class CellTargets(BaseModel):
    """What one cell attacks."""

    ids: list[int]  # of each target's first image
    digest: str  # sha256 of all images, their labels and ids


class RunFile(BaseModel):
    """What run.json says, as `read_config` checks it.

    A run that was begun before `targets`, `checkpoints`, `judge` and `lpips` were kept has none.
    """

    name: str
    study: Text
    command: str
    axes: dict[str, list]
    cells: list[dict[str, Any]] = Field(min_length=1)  # names of a user's own are not known here
    target_ids: list[int] = Field(min_length=1)  # of the first cell
    targets: list[CellTargets] = Field([])  # of each cell
    checkpoints: dict[str, str] = Field({})  # digests, by the names that cells give them
    judge: str | None = None
    lpips: bool = False
    seeds: list[int] = Field(min_length=1)
    noise_seeds: list[int] = Field(min_length=1)
    sessions: list[Session]

    @field_validator("cells")
    @classmethod
    def _whole(cls, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kinds = {bool: bool, int: int, float: int | float, None: str}
        wanted = {n: kinds[kind_of(f.annotation)] for n, f in Cell.model_fields.items()}
        for cell in cells:
            if lacking := wanted.keys() - cell.keys():
                raise ValueError(f"a cell has no {min(lacking)}")
            for name, kind in wanted.items():
                if not isinstance(cell[name], kind | None):
                    raise ValueError(f"a cell has no {name} {cell[name]!r}")
        return cells

    @field_validator("targets")
    @classmethod
    def _of_each_cell(cls, targets: list[CellTargets], info: ValidationInfo) -> list[CellTargets]:
        if len(targets) != len(info.data.get("cells", targets)):
            raise ValueError(f"there are {len(info.data['cells'])} cells")
        return targets

    @field_validator("axes")
    @classmethod
    def _of_settings(cls, axes: dict[str, list]) -> dict[str, list]:
        if unknown := axes.keys() - Cell.model_fields.keys():
            raise ValueError(f"{min(unknown)} is no setting")
        return axes


class BlockImages(NamedTuple):
    """The pictures of one block, pixels as uint8."""

    target_ids: np.ndarray  # [target], each as often as its defense was drawn
    seeds: np.ndarray  # [seed]
    reconstructions: np.ndarray  # [target, seed, batch, height, width, channel]
    truths: np.ndarray  # [target, batch, height, width, channel]


@dataclass(frozen=True)
class Run:
    """A run folder read back. `trials` and `traces` map column names to NumPy arrays."""

    folder: Path
    config: dict[str, Any]
    trials: dict[str, np.ndarray]
    traces: dict[str, np.ndarray]

    def to_pandas(self) -> Any:
        """The trials as a pandas DataFrame, a row each.

        Raises:
          UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas: needs pandas; pip install jaxinv[pandas]") from None
        return pandas.DataFrame(self.trials)

    def extras(self, cell: int) -> dict[str, np.ndarray]:
        """Reads what is there beside a cell's trials, in its targets' order; {} without.

        Raises:
          UserError: a file is damaged.
        """
        return _read_arrays(self.folder, "extras", cell)

    def images(self, cell: int) -> BlockImages:
        """Reads the pictures of one cell, its blocks joined along the target axis.

        Raises:
          UserError: a file is damaged, or none is there.
        """
        arrays = _read_arrays(self.folder, "images", cell)
        if lacking := set(BlockImages._fields) - set(arrays):
            raise UserError(
                f"{self.folder}/images: cell {cell} has no {min(lacking)}; delete its files in "
                "trials/ and run the sweep's command again"
            )
        images = BlockImages(**{name: arrays[name] for name in BlockImages._fields})
        seeds = images.seeds[: len(self.config["seeds"])]  # every block has them all
        rows, *shape = images.truths.shape
        if (
            len(shape) != 4
            or images.target_ids.shape != (rows,)
            or images.reconstructions.shape != (rows, *seeds.shape, *shape)
            or not images.truths.dtype == images.reconstructions.dtype == np.uint8
        ):
            raise UserError(
                f"{self.folder}/images: the pictures of cell {cell} are not those of its trials; "
                "delete its files in trials/ and run the sweep's command again"
            )
        return images._replace(seeds=seeds)


def _read_arrays(folder: Path, kind: str, cell: int) -> dict[str, np.ndarray]:
    """Joins a cell's committed files of one kind along their first axis; {} without any."""
    blocks, path = [], folder / kind
    try:
        for path in sorted((folder / kind).glob(f"c{cell:04d}-*.npz")):
            if is_done(folder, path.stem):
                blocks.append(read_npz(path))
        found = {}
        for name in blocks[0] if blocks else ():
            # What is found of the first targets alone stands in the first blocks alone.
            having = itertools.takewhile(lambda block, name=name: name in block, blocks)
            found[name] = np.concatenate([block[name] for block in having])
        return found
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete trials/{path.stem}.parquet and run the "
            "sweep's command again"
        ) from None


def block_name(cell: int, first_target: int) -> str:
    """Names a block by its cell and the position of its first target in the study's list."""
    return f"c{cell:04d}-t{first_target:04d}"


def is_done(folder: Path, block: str) -> bool:
    """Says whether the block was committed."""
    return (folder / "trials" / f"{block}.parquet").exists()


def write_block(
    folder: Path,
    block: str,
    trials: Mapping[str, Sequence],
    traces: Mapping[str, Sequence],
    images: BlockImages,
    extras: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Commits one finished block: pictures and traces first, the trials last as commit mark."""
    if extras:
        kinds = {np.dtype("float64"): np.float32}  # more digits than a picture shows
        arrays = {k: x.astype(kinds.get(x.dtype, x.dtype)) for k, x in extras.items()}
        write_file(folder / "extras" / f"{block}.npz", lambda f: np.savez_compressed(f, **arrays))
    write_file(
        folder / "images" / f"{block}.npz", lambda f: np.savez_compressed(f, **images._asdict())
    )
    for name, schema, columns in (("traces", TRACES, traces), ("trials", TRIALS, trials)):
        table = pa.table(dict(columns), schema=schema)
        write_file(
            folder / name / f"{block}.parquet",
            lambda f, table=table: pq.write_table(
                table, f, compression="zstd", write_page_checksum=True
            ),
        )


def read_run(folder: Path) -> Run:
    """Reads a run folder's configuration and all committed rows, in cell, target, seed order.

    Raises:
      UserError: the folder is no run folder, holds no finished block, or has another schema.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config is None:
        raise UserError(f"{folder}: no run.json there; give the folder that a sweep wrote (--out)")
    blocks = sorted(p.stem for p in (folder / "trials").glob("*.parquet"))
    if not blocks:
        raise UserError(f"{folder}: no finished trials yet; run the sweep's command again first")
    trials = _read_columns([folder / "trials" / f"{b}.parquet" for b in blocks], TRIALS)
    _check_of_run(folder, config, trials)
    traces = _read_columns([folder / "traces" / f"{b}.parquet" for b in blocks], TRACES)
    return Run(folder, config, trials, traces)


def _check_of_run(
    folder: Path, config: Mapping[str, Any], trials: Mapping[str, np.ndarray]
) -> None:
    """Raises a UserError where rows are not of the cells, targets and seeds of run.json."""

    def check(name, there, known):
        if strange := set(there.tolist()) - set(known):
            raise UserError(
                f"{folder}/run.json: does not know {name} {min(strange)}, which trials/ holds; the "
                "two are not of one run"
            )

    check("cell", trials["cell"], range(len(config["cells"])))
    check("seed", trials["seed"], config["seeds"])
    check("noise_seed", trials["noise_seed"], config["noise_seeds"])
    for cell in np.unique(trials["cell"]).tolist():
        known = target_ids_of(config, cell)
        if known is not None:
            check("target_id", trials["target_id"][trials["cell"] == cell], known)
    if lacking := set(config["seeds"]) - set(trials["seed"].tolist()):
        raise UserError(
            f"{folder}/run.json: knows seed {min(lacking)}, which trials/ lacks; the two are not "
            "of one run"
        )


def target_ids_of(config: Mapping[str, Any], cell: int) -> list[int] | None:
    """Ids of a cell's targets in their order; None where run.json does not say.

    One written before it had `targets` says those of the first cell, which are those of every cell
    that takes as many images of the same set in the same grouping.
    """
    if "targets" in config:
        return config["targets"][cell]["ids"]
    first, own = config["cells"][0], config["cells"][cell]
    same = all(first[name] == own[name] for name in CHOOSE_TARGETS)
    return config["target_ids"] if same else None


def read_config(folder: Path) -> dict[str, Any] | None:
    """Reads run.json; None where there is none.

    Raises:
      UserError: it is damaged, or of another version.
    """
    try:
        config = read_json(Path(folder) / "run.json")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        message = f"{folder}/run.json cannot be read ({error}); choose another --out"
        raise UserError(message) from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/run.json is no table of settings; choose another --out")
    if config.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder}: written with schema {config.get('schema_version')}, this version reads "
            f"{SCHEMA_VERSION}; choose another --out"
        )
    try:
        RunFile.model_validate(config)
    except ValidationError as error:
        raise UserError(f"{folder}/run.json: {first_error(error)}; choose another --out") from None
    return config


def discard(folder: Path) -> None:
    """Removes the folder of a run that came to nothing: settings, and no results."""
    if {path.name for path in folder.iterdir()} <= {"run.json", LOCK}:
        shutil.rmtree(folder, ignore_errors=True)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes run.json atomically."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **config}, indent=2) + "\n"
    write_file(Path(folder) / "run.json", lambda f: f.write(text.encode()))


def _read_columns(paths: Sequence[Path], schema: pa.Schema) -> dict[str, np.ndarray]:
    """Reads and joins Parquet files of one schema; nested and text columns become objects."""
    tables, path = [], None
    try:
        for path in paths:
            table = pq.ParquetFile(path, page_checksum_verification=True).read()
            if not table.schema.equals(schema) or not len(table):
                raise ValueError("its columns are not those of this version, or it has no rows")
            if set(table["schema_version"].to_pylist()) != {SCHEMA_VERSION}:
                raise ValueError("its rows are of another version")
            tables.append(table)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete trials/{path.stem}.parquet and run the "
            "sweep's command again"
        ) from None
    table = pa.concat_tables(tables)
    return {
        name: np.array(table[name].to_pylist(), dtype=object)
        if pa.types.is_string(table[name].type)
        else _object_array(table[name].to_pylist())
        if pa.types.is_list(table[name].type)
        else table[name].to_numpy()
        for name in schema.names
    }


def _object_array(values: list) -> np.ndarray:
    """One object per row, also where all rows are lists of one length."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
