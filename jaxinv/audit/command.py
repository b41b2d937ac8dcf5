"""The audit's command: parse, load, audit, write."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from jaxinv import client, data, defenses
from jaxinv.audit import page
from jaxinv.audit.auditing import Setting, audit
from jaxinv.audit.games import Pool
from jaxinv.audit.verdict import verdict
from jaxinv.client import kinds, updates
from jaxinv.data.image_prior import ImageFacts, load_prior
from jaxinv.engine.likeness import check_no_part, load_judge
from jaxinv.errors import UserError, run_command
from jaxinv.machine import runtime
from jaxinv.networks.inspect import find_classifier, parameters_in_order
from jaxinv.networks.user import UserNetwork
from jaxinv.settings import flags, reader, requests
from jaxinv.types import Normalization
from jaxinv.victim import checkpoints


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def command():
        about = "What one update gives away, at least and at most."
        parser = flags.FlagParser("python -m jaxinv.audit", about)
        flags.add_audit(parser)
        run(reader.load_auditing(vars(parser.parse_args(argv))))

    return run_command(command)


def run(asked: requests.Auditing) -> None:
    """Audits and writes the page.

    Raises:
      UserError: the victim, the data or the update are not there or do not go together.
    """
    runtime.set_up_compiler()
    console = Console()
    victim = checkpoints.load_victim(asked.victim)
    info = victim.info
    name = asked.dataset or info.dataset
    whole = data.load(name, split=asked.split, data_dir=asked.data_dir)
    own = data.select_ids(asked.ids, len(whole.ids), name, asked.split, "--ids")
    checkpoints.check_fits(victim, whole)
    local = client.Local(asked.client_epochs, asked.client_batch)
    received = None if asked.update is None else _received(asked, victim, local)
    others = others_of(whole, asked)
    judge = None
    if asked.judge is not None:
        judge = load_judge(asked.judge, info.image_shape, info.classes)
        check_no_part(judge, victim.digest)
    prior = None
    if not asked.quick:
        spread = tuple(info.mean), tuple(info.std)
        facts = ImageFacts(name, asked.data_dir, info.image_shape, *spread)
        prior, _ = load_prior(asked.image_prior, facts)
    setting = Setting(
        defense=asked.defense,
        local=local,
        client_lr=asked.client_lr or Setting().client_lr,
        method=asked.method,
        labels_known=asked.labels == "known",
        games=asked.games,
        seed=asked.seed,
        imprint_bins=asked.bins if asked.server == "malicious" else None,
        amplify=asked.amplify,
    )
    found = audit(
        victim.module,
        victim.variables,
        Normalization.of(info.mean, info.std),
        whole.images[own],
        whole.labels[own],
        others,
        update=received and received.gradient,
        setting=setting,
        image_prior=prior,
        judge=judge,
    )
    words = f"{asked.victim}, {name}/{asked.split} {','.join(map(str, asked.ids))}, {asked.defense}"
    page.write(found, Path(asked.out), words)
    for remark in received.remarks if received else ():
        console.print(f"update: {remark}", markup=False, highlight=False)
    said = verdict(found)
    for title, sentences in zip(
        ("What anyone could read off this update", "What nobody can"), (said.anyone, said.nobody)
    ):
        console.print(f"{title}:", style="bold")
        for sentence in sentences:
            console.print(f"  * {sentence}", highlight=False)
    console.print(f"page: {Path(asked.out) / 'audit.html'}")


def _received(
    asked: requests.Auditing, victim: checkpoints.TrainedVictim, local: client.Local
) -> kinds.Received:
    """The gradient that a client's file holds, for names and pixels alike.

    Raises:
      UserError: it cannot be read, lacks layers, is no such update, or its scale is not known.
    """
    name, params = f"--update {asked.update}", victim.variables["params"]
    variables, shape = victim.variables, victim.info.image_shape
    in_order = functools.partial(parameters_in_order, victim.module, variables, shape)
    sent = updates.load(asked.update, params, in_order)
    if jax.tree.structure(sent) != jax.tree.structure(params):
        raise UserError(f"{name}: lacks layers; give all that the client sends")
    network, bare = UserNetwork(victim.module), asked.defense == defenses.NONE
    received = kinds.understand(
        sent,
        params,
        asked.update_kind,
        images=len(asked.ids),
        steps=local.steps(len(asked.ids)),
        rate=asked.client_lr,
        classifier=find_classifier(network, variables, shape) if bare else None,
        name=name,
    )
    if not received.scaled:
        found = f" ({received.remarks[-1]})" if received.remarks else ""
        raise UserError(
            f"{name}: its scale is not known{found}; say --update-kind, and of a difference of "
            "parameters --client-lr too"
        )
    return received


def others_of(whole: data.Dataset, asked: requests.Auditing) -> Pool:
    """The candidates beside the client's own: the first others of the split.

    Raises:
      UserError: the split has too few.
    """
    wanted = asked.candidates - len(asked.ids)
    left = np.setdiff1d(np.arange(len(whole.ids)), asked.ids)[:wanted]
    if len(left) < wanted:
        raise UserError(
            f"--candidates {asked.candidates}: {whole.name}/{asked.split} has {len(whole.ids)} "
            "images"
        )
    return Pool(whole.images[left], whole.labels[left])
