"""`python -m jaxinv.train --prior` and `--inverter`: trains what an attacker learns, and keeps it.

The state is written every minute: the same command after a kill goes on, to the same bits.
"""

import functools
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxinv import data, defenses, files, learned, rng
from jaxinv.errors import UserError
from jaxinv.learned import training
from jaxinv.machine import runtime
from jaxinv.settings import requests
from jaxinv.types import Normalization, PyTree
from jaxinv.victim import checkpoints, states
from jaxinv.victim.training import epoch_order

STEPS_PER_CALL = 50  # between two looks at the clock
STATE_SECONDS = 60.0  # what a kill may cost


class WrittenState(states.WrittenState):
    """What a state on disk says beside its arrays."""

    COLUMNS = frozenset({"epoch", "step", "train_loss", "test_loss"})

    within: float
    recipe: dict[str, Any]


class Learner(states.Resumable):
    """One training: what is fixed for all of it, and the state that moves."""

    STATE = WrittenState

    def __init__(self, settings: requests.Training):
        """Loads the data, and of an inverter the victim.

        Raises:
          UserError: they are not there, do not suit each other, or the folder holds something else.
        """
        self.settings = settings
        self.kind = settings.prior or "inverter"
        self.folder = checkpoints.of_name(settings.out or _name(settings))
        self.state_folder = self.folder.with_name(f".{self.folder.name}.training")

        def load(split):
            return data.load(settings.dataset, split=split, data_dir=settings.data_dir)

        self.dataset, test = load("train"), load("test")
        tested = min(len(test.labels), training.TESTED)
        if settings.batch > min(len(self.dataset.labels), tested):
            raise UserError(
                f"--batch {settings.batch}: {settings.dataset} has {len(self.dataset.labels)} "
                f"images, {tested} to test on"
            )
        self.train_data, self.test_data = (
            training.Examples(jnp.asarray(d.images[:n]), jnp.asarray(d.labels[:n]))
            for d, n in ((self.dataset, len(self.dataset.labels)), (test, tested))
        )
        self.steps_per_epoch = len(self.dataset.labels) // settings.batch
        self.context: Any = ()
        self.victim = None
        loss = training.LOSSES.get(self.kind)
        if settings.inverter is not None:
            self.victim = checkpoints.load_victim(settings.inverter, "inverter")
            checkpoints.check_fits(self.victim, self.dataset, "inverter")
            chain = defenses.parse(settings.defense)
            of_victim = self.victim.module, defenses.names(chain), settings.images
            normalization = Normalization.of(self.dataset.mean, self.dataset.std)
            self.context = training.Updates(
                self.victim.variables, normalization, defenses.strengths(chain), None
            )
            some = jax.tree.map(lambda x: x[: training.TESTED], self.train_data)
            scale = training.bin_scale(*of_victim, self.context, some)
            self.context = self.context._replace(scale=scale)
            loss = functools.partial(training.inverting_loss, *of_victim)
        steps = settings.epochs * self.steps_per_epoch
        self.task = training.Task(loss, settings.lr, settings.schedule, steps)
        shape, classes = self.dataset.images.shape[1:], len(self.dataset.classes)
        module, inputs = learned.network(self.kind, settings.width, shape, classes, settings.images)
        self.width = module.width
        key = rng.stream_key(rng.Stream.TRAINING, settings.seed)
        params = module.init(key, *inputs)["params"]
        optimizer = self.task.optimizer().init(params)
        self.state = training.State(params, optimizer, jnp.int32(0))
        self.log: list[dict[str, Any]] = []
        self.within, self.seconds = 0.0, 0.0  # losses of the epoch so far; of training

    def run(self) -> None:
        """Trains, or goes on, to the end.

        Raises:
          UserError: the state on disk is damaged or of another training, or the loss is not finite
            any more.
        """
        console = Console(markup=False)
        if self.folder.exists():
            self._check_kept(self.folder, self.settings.storage)
            console.print(f"{self.folder}: trained already")
            return
        with files.locked(self.state_folder):
            self._resume()
            with runtime.progress_bar(console) as bar:
                task = bar.add_task("", total=self.task.steps)
                while int(self.state.step) < self.task.steps:
                    self._train_epoch(console, bar, task)
            self._save()
        shutil.rmtree(self.state_folder, ignore_errors=True)
        console.print(f"{self.folder}: {_describe(self.log[-1])}")

    def _train_epoch(self, console: Console, bar: Any, task: Any) -> None:
        """Goes on to the end of an epoch, and keeps the state on the way."""
        settings, began, before = self.settings, time.monotonic(), self.seconds
        epoch, first = divmod(int(self.state.step), self.steps_per_epoch)
        examples = len(self.dataset.labels)
        order = jnp.asarray(epoch_order(settings.seed, epoch, examples, settings.batch))
        key = rng.stream_key(rng.Stream.TRAINING, settings.seed, epoch, 1)
        written = began
        while first < self.steps_per_epoch:
            last = min(first + STEPS_PER_CALL, self.steps_per_epoch)
            self.state, loss = training.run_steps(
                self.task, self.state, self.context, self.train_data, order, key, first, last
            )
            self.within += float(loss)
            if not np.isfinite(self.within):
                raise UserError(f"--lr {settings.lr:g}: the loss is not finite any more; lower it")
            first, self.seconds = last, before + time.monotonic() - began
            bar.update(
                task,
                completed=int(self.state.step),
                description=f"epoch {epoch + 1}: loss {self.within / first:.4g}",
            )
            if time.monotonic() - written > STATE_SECONDS and first < self.steps_per_epoch:
                self._write_state()
                written = time.monotonic()
        test = training.mean_loss(
            self.task, self.state.params, self.context, self.test_data, settings.batch
        )
        self.log.append(
            {
                "epoch": epoch + 1,
                "step": int(self.state.step),
                "train_loss": self.within / self.steps_per_epoch,
                "test_loss": float(test),
                "seconds": self.seconds,
            }
        )
        self.within = 0.0
        self._write_state()
        if not console.is_terminal:
            console.print(_describe(self.log[-1]), soft_wrap=True)

    def _recipe(self) -> dict[str, Any]:
        """Every setting that has a say in the parameters, as JSON knows it."""
        read = {"prior", "inverter", "dataset", "epochs", "lr", "schedule", "batch", "seed"}
        read |= {"defense"} if self.settings.inverter is not None else set()
        read |= {"images"} if self.settings.images > 1 else set()
        recipe = self.settings.model_dump(include=read) | {"width": self.width}
        if self.victim is not None:  # behind its name there may be another network by now
            recipe["inverter"] = f"{self.settings.inverter} of digest {self.victim.digest[:16]}"
        return recipe

    def _save(self) -> None:
        """Keeps what was learned."""
        settings, last = self.settings, self.log[-1]
        variables: PyTree = {"params": self.state.params}
        if self.victim is not None:
            variables["scale"] = self.context.scale
        variables = checkpoints.rounded(variables, settings.storage)
        test = training.mean_loss(
            self.task, variables["params"], self.context, self.test_data, settings.batch
        )
        info = learned.Info(
            kind=self.kind,
            width=self.width,
            dataset=settings.dataset,
            images=len(self.dataset.labels),
            classes=self.dataset.classes,
            image_shape=self.dataset.images.shape[1:],
            update_images=settings.images,
            victim=settings.inverter,
            victim_digest=self.victim and self.victim.digest,
            defense=settings.defense if self.victim else None,
            recipe=self._recipe(),
            epochs=last["epoch"],
            steps=last["step"],
            train_loss=last["train_loss"],
            test_loss=float(test),
            seconds=round(self.seconds, 1),
            hardware=runtime.hardware(),
            versions=runtime.versions(("jax", "flax", "optax")),
            storage=settings.storage,
        )
        fields = info.model_dump(exclude={"digest"})
        checkpoints.write(self.folder, variables, fields, self.log, settings.storage)


def _name(settings: requests.Training) -> str:
    """The checkpoint's name: prior-denoiser-cifar10."""
    if settings.prior is not None:
        return f"prior-{settings.prior}-{settings.dataset.replace('/', '-')}"
    victim = Path(settings.inverter or "").name
    several = f"-{settings.images}-images" if settings.images > 1 else ""
    return f"inverter-{victim}-{settings.defense.replace(':', '').replace(',', '-')}{several}"


def _describe(row: dict[str, Any]) -> str:
    """One epoch in words."""
    return (
        f"epoch {row['epoch']}, loss {row['train_loss']:.4g} in training and "
        f"{row['test_loss']:.4g} on the test split, {row['seconds']:.0f} s"
    )
