"""`python -m jaxinv.train`: train a network and save it as a victim, with checkpoints on the way.

    python -m jaxinv.train --model resnet18 --width 16 --dataset cifar10 --epochs 12 \\
        --schedule one-cycle --stop-at epoch:0 epoch:2 accuracy:0.5

After every epoch, and every five minutes of a long one, the state is written beside the checkpoint:
the same command after a kill goes on from there, to the same parameters, bit for bit. `--prior` and
`--inverter` train what an attacker learns instead (`jaxinv.learner`).
"""

import csv
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxinv import data, files, networks, rng
from jaxinv.errors import UserError, run_command
from jaxinv.learner import Learner
from jaxinv.machine import runtime
from jaxinv.privacy import accounting
from jaxinv.settings import checks, flags, reader, requests
from jaxinv.types import Normalization
from jaxinv.victim import checkpoints, states, training
from jaxinv.victim.untrained import untrained

STEPS_PER_CALL = 50  # between two moves of the progress bar
STATE_SECONDS = 300.0  # what a kill may cost


class EpochSums(NamedTuple):
    """Sums over the images seen in the epoch that is not finished."""

    loss: float = 0.0
    correct: float = 0.0


class WrittenState(states.WrittenState):
    """What a state on disk says beside its arrays."""

    COLUMNS = frozenset({"step", "train_accuracy", "test_accuracy"})

    within: EpochSums


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        parser = flags.FlagParser("python -m jaxinv.train", __doc__.split("\n")[0])
        flags.add_training(parser)
        settings = reader.load_training(vars(parser.parse_args(argv)))
        runtime.set_up_compiler()
        (Learner if settings.learns else Trainer)(settings).run()

    return run_command(command)


class Trainer(states.Resumable):
    """One training: what is fixed for all of it, and the state that moves."""

    STATE = WrittenState

    def __init__(self, settings: requests.Training):
        """Loads the data and builds the network.

        Raises:
          UserError: they are not there, or do not suit each other, or the folder holds something
            else.
        """
        self.settings = settings
        self.folder = checkpoint_folder(settings)
        self.trained = self._is_trained()
        # Where the training stands; a hidden folder beside the checkpoint.
        self.state_folder = self.folder.with_name(f".{self.folder.name}.training")

        def load(split):
            return data.load(settings.dataset, split=split, data_dir=settings.data_dir)

        self.dataset, test = load("train"), load("test")
        networks.check_image_size(settings.model, settings.dataset, self.dataset.images.shape[1:])
        examples = len(self.dataset.labels)
        if settings.batch > examples:
            raise UserError(f"--batch {settings.batch}: {settings.dataset} has {examples} images")
        self.steps_per_epoch = examples // settings.batch
        steps = settings.epochs * self.steps_per_epoch
        self.sizes = np.full(steps, settings.batch)  # images of each step
        self.recipe = training.Recipe(
            steps,
            settings.lr,
            settings.schedule,
            settings.augment,
            settings.precision,
            self._private(examples, steps) if settings.dp else None,
        )
        last = max((s.value for s in settings.stop_at if s.kind == "step"), default=0)
        if last > self.recipe.steps:
            raise UserError(f"--stop-at step:{last:g}: there are {self.recipe.steps} steps")
        self.normalization = Normalization.of(self.dataset.mean, self.dataset.std)
        self.train_data, self.test_data = (
            training.Data(jnp.asarray(d.images), jnp.asarray(d.labels))
            for d in (self.dataset, test)
        )
        victim = untrained(
            settings.model,
            classes=len(self.dataset.classes),
            width=settings.width,
            seed=settings.seed,
            image_shape=self.dataset.images.shape[1:],
        )
        self.module = victim.module
        self.state = training.start(self.recipe, victim.variables)
        self.epoch = 0  # finished
        self.within = EpochSums()
        self.log: list[dict[str, Any]] = []  # a row per finished epoch
        self.seconds = 0.0

    def _private(self, examples: int, steps: int) -> training.DpSgd:
        """What DP-SGD does here; draws the sizes of all batches.

        Raises:
          UserError: delta is too large for the data, or the noise cannot be found.
        """
        settings, rate = self.settings, self.settings.batch / examples
        if settings.delta >= 1 / examples:  # ty: ignore[unsupported-operator]
            raise UserError(
                f"--delta {settings.delta:g}: lets one of {examples} examples be published; give "
                f"less than {1 / examples:.2g}"
            )
        multiplier = settings.noise_multiplier
        if multiplier is None:
            multiplier = accounting.calibrate(
                settings.target_epsilon, settings.delta, rate, steps, settings.accountant
            )
        self.sizes = accounting.poisson_sizes(settings.seed, examples, rate, steps)
        # On a CPU a few examples stay in the cache.
        microbatch = settings.microbatch or (8 if jax.default_backend() == "cpu" else 128)
        return training.DpSgd(settings.clip, multiplier, settings.batch, microbatch)

    def _spent(self) -> checkpoints.Privacy | None:
        """The privacy that the steps so far have cost."""
        private, delta = self.recipe.private, self.settings.delta
        if private is None:
            return None
        rate, steps = private.batch / len(self.dataset.labels), int(self.state.step)
        spent = accounting.Mechanism(private.noise_multiplier, rate, steps)

        def epsilon(kind):
            return accounting.epsilon(spent, delta, kind) if steps else 0.0

        return checkpoints.Privacy(
            noise_multiplier=private.noise_multiplier,
            clip=private.clip,
            sampling_rate=rate,
            steps=steps,
            delta=delta,
            epsilon_pld=epsilon("pld"),
            epsilon_rdp=epsilon("rdp"),
            assumptions=accounting.ASSUMPTIONS,
        )

    def _batches(self) -> np.ndarray:
        """The epoch's batches: indices [step, image]."""
        seed, examples = self.settings.seed, len(self.train_data.labels)
        if self.recipe.private is None:
            return training.epoch_order(seed, self.epoch, examples, self.settings.batch)
        microbatch = self.recipe.private.microbatch
        room = -(-int(self.sizes.max()) // microbatch) * microbatch
        own = self.sizes[self.epoch * self.steps_per_epoch :][: self.steps_per_epoch]
        return accounting.poisson_batches(seed, self.epoch, examples, own, room)

    def run(self) -> None:
        """Trains, or goes on, to the end.

        Raises:
          UserError: the state on disk is damaged or of another training, or the loss is not finite
            any more.
        """
        console = Console(markup=False)
        if self.trained:
            console.print(f"{self.folder}: trained already")
            return
        with files.locked(self.state_folder):
            self._train(console)
        shutil.rmtree(self.state_folder, ignore_errors=True)
        console.print(f"{self.folder}: {_describe(self.log[-1])}")

    def _train(self, console: Console) -> None:
        """Goes on from the state on disk, if there is one, and keeps the network at the end."""
        if self._resume():
            best = max((row["test_accuracy"] for row in self.log), default=-1.0)
            self._check_stops(self.epoch, int(self.state.step), best)
        else:
            self._keep([stop for stop in self.settings.stop_at if stop == (stop.kind, 0)])
        with runtime.progress_bar(console) as bar:
            task = bar.add_task("", total=self.recipe.steps, completed=int(self.state.step))
            for _ in range(self.epoch, self.settings.epochs):
                self._train_epoch(bar, task)
                if not console.is_terminal:
                    console.print(_describe(self.log[-1]), soft_wrap=True)
        self._save(self.folder)

    def _train_epoch(self, bar: Progress, task) -> None:
        """Trains one epoch, keeps the checkpoints it passes, and the state at its end."""
        started = written = time.monotonic()
        done, seconds_before = self._steps_within(), self.seconds
        base = int(self.state.step) - done
        order = jnp.asarray(self._batches())
        key = rng.stream_key(rng.Stream.TRAINING, self.settings.seed, self.epoch, 1)
        stops = {int(s.value) - base: s for s in self._stops("step")}
        ends = {*range(STEPS_PER_CALL, self.steps_per_epoch, STEPS_PER_CALL), *stops}
        loss, correct = self.within
        ends = [*sorted(e for e in ends if done < e < self.steps_per_epoch), self.steps_per_epoch]
        for first, last in zip([done, *ends], ends):
            self.state, sums = training.run_steps(
                self.module,
                self.recipe,
                self.state,
                self.train_data,
                self.normalization,
                order,
                key,
                first,
                last,
            )
            if not sums.finite:
                self._stop_diverged(float(sums.loss))
            loss, correct = loss + float(sums.loss), correct + float(sums.correct)
            seen = max(1, self.sizes[base : base + last].sum())
            bar.update(
                task,
                completed=base + last,
                description=f"epoch {self.epoch + 1}: loss {loss / seen:.3f}, "
                f"accuracy {correct / seen:.3f}",
            )
            self.seconds = seconds_before + time.monotonic() - started
            if last in stops and last < self.steps_per_epoch:
                self._keep([stops[last]])
            self.within = EpochSums(loss, correct)
            if time.monotonic() - written > STATE_SECONDS and last < self.steps_per_epoch:
                self._write_state()
                written = time.monotonic()
        self.epoch, self.within = self.epoch + 1, EpochSums()
        self.log.append(
            {
                "epoch": self.epoch,
                "step": int(self.state.step),
                "lr": float(self.recipe.rate(int(self.state.step) - 1)),
                "loss": loss / seen,
                "train_accuracy": correct / seen,
                "test_accuracy": self._test_accuracy(),
                **self._epsilon(),
                "seconds": self.seconds,
            }
        )
        before = max((row["test_accuracy"] for row in self.log[:-1]), default=-1.0)
        reached = self.log[-1]["test_accuracy"]
        self._keep(
            [s for s in self._stops("epoch") if s.value == self.epoch]
            + [s for s in self._stops("step") if s.value == self.state.step]
            + [s for s in self._stops("accuracy") if before < s.value <= reached]
        )
        self._write_state()

    def _epsilon(self) -> dict[str, float]:
        """The log's column of what the training has cost."""
        spent = self._spent()
        return {} if spent is None else {"epsilon": spent.epsilon_pld}

    def _stop_diverged(self, loss: float) -> None:
        """Keeps the network of the last state written and raises the error."""
        step = int(self.state.step)
        kept = "nothing was kept yet"
        if self._resume():
            good = requests.Stop("epoch", self.epoch)
            if self._steps_within():
                good = requests.Stop("step", int(self.state.step))
            self._keep([good])
            kept = f"{good.kind} {good.value} is kept as {self.folder}-{good.name}"
        raise UserError(
            f"training diverged: loss {loss:g} at step {step}, learning rate "
            f"{float(self.recipe.rate(step - 1)):.3g}; choose a smaller --lr and another --out; "
            f"{kept}"
        )

    def _steps_within(self) -> int:
        """Steps taken of the epoch that is not finished."""
        return int(self.state.step) - self.epoch * self.steps_per_epoch

    def _stops(self, kind: str) -> list[requests.Stop]:
        """The checkpoints asked for on the way, of one kind."""
        return [stop for stop in self.settings.stop_at if stop.kind == kind]

    def _test_accuracy(self) -> float:
        """Accuracy on the test split, now; at the end of an epoch it is in the log already."""
        if self.log and self.log[-1]["step"] == int(self.state.step):
            return self.log[-1]["test_accuracy"]
        return training.accuracy(
            self.module, self.state.variables, self.test_data, self.normalization
        )

    def _keep(self, stops: Sequence[requests.Stop]) -> None:
        """Saves a checkpoint for each of these stops."""
        for stop in stops:
            self._save(self._folder_of(stop))

    def _folder_of(self, stop: requests.Stop) -> Path:
        """The checkpoint of a stop."""
        return self.folder.with_name(f"{self.folder.name}-{stop.name}")

    def _save(self, folder: Path) -> None:
        """Saves the network as it is now."""
        storage = self.settings.storage
        variables, accuracy = self.state.variables, self._test_accuracy()
        if storage != "float32":
            variables = checkpoints.rounded(variables, storage)
            accuracy = training.accuracy(self.module, variables, self.test_data, self.normalization)
        info = checkpoints.Info(
            model=self.settings.model,
            width=getattr(self.module, "width", None),
            dataset=self.settings.dataset,
            classes=self.dataset.classes,
            image_shape=self.dataset.images.shape[1:],
            mean=self.dataset.mean,
            std=self.dataset.std,
            recipe=self._recipe(),
            epochs=self.epoch,
            steps=int(self.state.step),
            train_accuracy=self.log[-1]["train_accuracy"] if self.log else None,
            test_accuracy=accuracy,
            seconds=round(self.seconds, 1),
            hardware=runtime.hardware(),
            versions=runtime.versions(("jax", "flax", "optax")),
            privacy=self._spent(),
            storage=storage,
        )
        checkpoints.save(folder, variables, info, self.log)

    def _recipe(self) -> dict[str, Any]:
        """Every setting that has a say in the parameters, as JSON knows it."""
        private = () if self.settings.dp else ("dp", *checks.OF_PRIVACY)
        left_out = {"out", "data_dir", "stop_at", "storage", *private}
        return self.settings.model_dump(exclude=left_out) | {
            "momentum": training.MOMENTUM,
            "weight_decay": training.WEIGHT_DECAY,
        }

    def _is_trained(self) -> bool:
        """Tells whether the folder holds this very training, finished."""
        if not self.folder.exists():
            return False
        if not (self.folder / "info.json").exists():
            raise UserError(
                f"--out {self.folder}: is there and is no checkpoint; choose another --out"
            )
        told = self._check_kept(self.folder, self.settings.storage)
        if self.settings.stop_at:
            self._check_stops(told["epochs"], told["steps"], _best_accuracy(self.folder))
        return True

    def _check_stops(self, epochs: int, steps: int, best: float) -> None:
        """Refuses stops that the training has passed without keeping a checkpoint.

        Args:
          epochs, steps: taken.
          best: accuracy on the test split after any epoch.

        Raises:
          UserError: there is no checkpoint of one of them, or it is of another training.
        """
        reached = {"epoch": epochs, "step": steps, "accuracy": best}
        for stop in self.settings.stop_at:
            if stop.value > reached[stop.kind]:
                continue
            folder = self._folder_of(stop)
            if not folder.exists():
                raise UserError(
                    f"--stop-at {stop.kind}:{stop.value:g}: the training has passed it, and kept "
                    f"no {folder}; choose another --out"
                )
            self._check_kept(folder, self.settings.storage)

    def _resume(self) -> bool:
        there = super()._resume()
        self.epoch = len(self.log)
        return there


def checkpoint_folder(settings: requests.Training) -> Path:
    """Where the trained network goes: a name means a folder in `checkpoints/`."""
    if settings.out is not None:
        return checkpoints.of_name(settings.out)
    width = settings.width or networks.NETWORKS[settings.model].width
    parts = [settings.model, f"w{width}" if width else "", settings.dataset.replace("/", "-")]
    return checkpoints.of_name("-".join(filter(None, parts)))


def _best_accuracy(folder: Path) -> float:
    """The best accuracy on the test split in a checkpoint's log.

    Raises:
      UserError: the log cannot be read.
    """
    try:
        with open(folder / "log.csv", encoding="utf-8", newline="") as file:
            return max(float(row["test_accuracy"]) for row in csv.DictReader(file))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--out {folder}: its log.csv is missing or damaged; delete the folder"
        ) from None


def _describe(row: dict[str, Any]) -> str:
    """One epoch in words."""
    return (
        f"epoch {row['epoch']}, loss {row['loss']:.3f}, accuracy {row['train_accuracy']:.3f} in "
        f"training and {row['test_accuracy']:.3f} on the test split, "
        + (f"epsilon {row['epsilon']:.3g}, " if "epsilon" in row else "")
        + f"{row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
