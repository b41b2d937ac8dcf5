"""An audit in words: what anyone could read off an update, what nobody can, what was not tried."""

import math
from typing import NamedTuple

import numpy as np

from jaxinv.audit.auditing import Audit, hides_by_noise

EXACT = 100.0  # dB from which on an image is exact

LABELS_NOT_TRIED = "labels that are not known (--labels unknown)"
BOUNDS_NOT_TRIED = "bounds by the layers and from the Jacobian, which are of one gradient"
NOT_TRIED = (
    "an attacker with a learned image prior (a diffusion model, a trained generator)",
    "updates of several rounds together",
    "candidates that differ from the true images a little",
    "BatchNorm in training mode, where images see one another",
)
SHORTLY_TRIED = "hours of attack: each ran for seconds to minutes, from one to four seeds"
LEFT_OUT = "reconstructions and their ceiling, which --quick leaves out"


class Verdict(NamedTuple):
    """What an audit says, in sentences."""

    anyone: list[str]  # could read off this update
    nobody: list[str]
    not_tried: list[str]


def verdict(found: Audit) -> Verdict:
    """Says what was found in plain words."""
    labels = [LABELS_NOT_TRIED] if found.setting.labels_known else []
    bounds = [BOUNDS_NOT_TRIED] if found.capacity is None else []
    attacks = [SHORTLY_TRIED if found.found else LEFT_OUT]
    said = Verdict([], [], [*attacks, *found.not_tried, *bounds, *labels, *NOT_TRIED])
    for topic in (_names, _capacity, _reconstruction, _server, _bounds, _privacy, _warnings):
        topic(found, said)
    return said


def _names(found: Audit, said: Verdict) -> None:
    outcome = found.identification
    without = "" if found.setting.labels_known else "without their labels, "
    said.anyone.append(
        f"Whoever holds {outcome.candidates:,} candidates, {without}{_images(found)} among them, "
        f"names {outcome.recall} of the images of such an update; a guess names "
        f"{outcome.chance:.2%}. Of this one: {found.named} of {found.images}."
    )


def _capacity(found: Audit, said: Verdict) -> None:
    room, count = found.capacity, found.images
    if room is None:
        return
    if count <= room.images:
        said.anyone.append(
            "Nothing in the network's layers forbids exact images: one gradient can determine up "
            f"to {room.images:,.1f} of them, and here are {count}."
        )
    else:
        said.nobody.append(
            f"From the gradient alone nobody determines more than {1 - room.free(count):.0%} of "
            f"the numbers of {_images(found)}: the network's layers let through "
            f"{room.images:,.1f} images (binding: {room.binding.layer}). The rest must come from "
            "knowledge of images."
        )


def _reconstruction(found: Audit, said: Verdict) -> None:
    best = found.best
    if best is not None:
        said.anyone.append(
            f"The best of {len(found.found)} short attacks ({best.attack}) recovers "
            f"{_images(found)} at {best.psnr:.1f} dB; the mean color has "
            f"{found.mean_color_psnr:.1f}. Of what it recovers "
            f"{best.likeness.named_by_pixels:.0%} is nearest to its own image among the "
            f"{found.identification.candidates:,} candidates."
        )


def _server(found: Audit, said: Verdict) -> None:
    read, fished = found.imprinted, found.fished
    if read is not None:
        louder = f" and multiplies its last layer by {read.amplify:g}" if read.amplify != 1 else ""
        said.anyone.append(
            f"A server that puts an imprint of {read.bins:,} bins in front of the network{louder} "
            f"reads {read.exact} of the images off such an update exactly (without a defense, of a "
            f"network that is sure of none: {read.expected:.1%}). Of this one: {read.own} of "
            f"{found.images}."
        )
    if fished is not None and found.images > 1:
        said.anyone.append(
            "A server that fishes for a class gets the gradient of one image alone, which every "
            f"attack on single images may follow: {fished.alone} of the images are the only ones "
            "of their class in such an update."
        )


def _bounds(found: Audit, said: Verdict) -> None:
    knows = "An attacker who knows of images what a Gaussian prior says"
    if math.isfinite(found.rank_psnr):
        said.nobody.append(f"{knows} does not exceed {found.rank_psnr:.1f} dB by the layers alone.")
    if not hides_by_noise(found.setting.defense):
        said.not_tried.append(
            f"the ceiling, which knows of noise alone and not of all that {found.setting.defense} "
            "takes away"
        )
    ceiling = found.ceiling
    if ceiling is None or not ceiling.solved:
        return
    top = ", ".join(f"{p:.1f}" for p in ceiling.psnr[:8])
    if ceiling.psnr.min() > EXACT:
        said.anyone.append(
            f"Near the true images nothing but rounding hides them: the ceiling is {top} dB."
        )
    else:
        said.nobody.append(
            f"{knows} does not exceed, on average over the noise, {top} dB (the prior alone: "
            f"{float(np.mean(ceiling.prior_psnr)):.1f}). A local bound, at these images."
        )


def _privacy(found: Audit, said: Verdict) -> None:
    if found.release_bound is not None:
        said.nobody.append(
            "By DP-SGD no attacker who sees this release alone names one given image among "
            f"{found.identification.candidates:,} more often than in {found.release_bound:.3%} of "
            "the cases."
        )


def _warnings(found: Audit, said: Verdict) -> None:
    seen = found.inspection
    if seen.dominated and found.images > 1:
        said.anyone.append(
            f"One image outweighs all others in the gradients of {len(seen.dominated)} layers, and "
            "is as open there as if it were sent alone. Honest parameters do that too, in 2 to 87% "
            "of updates of eight images and hardly ever in larger ones: there, look at the "
            "parameters you were sent."
        )
    if seen.parallel > 0:
        said.anyone.append(
            f"{seen.parallel:.0%} of a dense layer's units measure the same thing: this is how a "
            "malicious server imprints images."
        )


def _images(found: Audit) -> str:
    return "its image" if found.images == 1 else f"its {found.images} images"
