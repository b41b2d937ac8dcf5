"""What nobody exceeds: the ceiling beside what an attack attains, and capacity."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxinv import metrics
from jaxinv.attacks import strongest
from jaxinv.audit import games
from jaxinv.audit.auditing import FIRST_ORDER, ceiling_curve, has_kinks, second_order
from jaxinv.audit.study.scene import Options, Row, Scene, Table, load, markdown
from jaxinv.client.capacity import capacity
from jaxinv.data.image_prior import ImageFacts, load_prior
from jaxinv.invert import invert_all
from jaxinv.reporting.statistics import target_interval
from jaxinv.types import Truth

BLOCK = 10  # images that are attacked together
COEFFICIENTS = 768  # that an attacker must find: 99.5% of an image's variance
SHAPE = (32, 32, 3)


def ceiling(asked: Options) -> None:
    """Ceiling and attained PSNR under noise of the first `asked.games` images, each alone."""
    table = Table(asked, "ceiling")
    for name in asked.victims:
        scene = load(name, asked.games)
        own = scene.dataset
        facts = ImageFacts("cifar10", None, SHAPE, tuple(own.mean), tuple(own.std))
        prior, _ = load_prior("spectrum", facts)
        for start in range(0, asked.games, BLOCK):
            block = range(start, min(start + BLOCK, asked.games))
            keys: list[Row] = [
                {"victim": name, "image": i, "variance": v, "coefficients": COEFFICIENTS}
                for v in asked.noises
                for i in block
            ]
            left = [key for key in keys if table.lacks(**key)]
            curves = {
                i: ceiling_curve(scene.network, _truth(scene, i), prior, COEFFICIENTS)
                for i in sorted({key["image"] for key in left})
            }
            for variance in asked.noises:
                here = [key for key in left if key["variance"] == variance]
                found = _attained(scene, [key["image"] for key in here], variance, prior)
                for key, psnr in zip(here, found):
                    own_curve = curves[key["image"]]
                    row = key | {"ceiling": own_curve.psnr(variance), "attained": psnr}
                    row |= {"here": own_curve.psnr_here(variance)}
                    row |= {"prior": own_curve.psnr(np.inf), "itself": own_curve.itself}
                    table.add(row)
    summary = []
    for key in dict.fromkeys((r["victim"], r["variance"]) for r in table.used):
        rows = [r for r in table.used if (r["victim"], r["variance"]) == key]
        top, here, got = (np.array([r[n] for r in rows]) for n in ("ceiling", "here", "attained"))
        gap = got - top
        mean, low, high = target_interval(gap)
        summary.append(
            {
                "victim": key[0],
                "variance": key[1],
                "images": len(rows),
                "ceiling": top.mean(),
                "attained": got.mean(),
                "attained - ceiling": f"{mean:.2f} [{low:.2f}, {high:.2f}]",
                "above": f"{(gap > 0).sum()} of {len(gap)}",
                "posterior mean": here.mean(),
                "seen of itself": float(np.nanmedian([r["itself"] for r in rows])),
                "Spearman": _spearman(top, got),
                "of the posterior mean": _spearman(here, got),
            }
        )
    markdown(summary, list(summary[0]))


def _truth(scene: Scene, image: int) -> Truth:
    own = scene.dataset
    return Truth(own.images[[image]] / np.float32(255), jnp.asarray(own.labels[[image]]))


def _attained(scene: Scene, images: list[int], variance: float, prior) -> list[float]:
    """PSNR of the strongest attack on such a network, which knows the noise, one seed."""
    if not images:
        return []
    own, rules = scene.dataset, games.Rules(1, defense=f"noise:{variance:g}")
    sent = games.share(scene.network, scene.pool, np.array(images)[:, None], rules).targets.update
    module, variables = scene.network.module, scene.network.variables
    kinked = has_kinks(module, variables, SHAPE)
    if strongest(kinked=kinked, trained=scene.trained)["attack"] == "geiping":
        attack = FIRST_ORDER
    else:
        attack = second_order(module, variables, SHAPE)
    found = invert_all(
        module,
        variables,
        [jax.tree.map(lambda x: x[j], sent) for j in range(len(images))],  # noqa: B023
        image_shape=SHAPE,
        labels=own.labels[images][:, None].tolist(),
        mean=own.mean,
        std=own.std,
        seeds=1,
        iterations=attack.iterations,
        method=attack.method,
        defense=rules.defense,
        image_prior=prior if attack.method.needs_image_prior else None,
    )
    pixels = jnp.stack([x.reconstructions[0, 0] for x in found])
    return metrics.psnr(pixels, own.images[images] / np.float32(255)).tolist()


def _spearman(top: np.ndarray, got: np.ndarray) -> str:
    """Rank correlation with its 95% interval by Fisher's transform."""
    rank = float(stats.spearmanr(top, got).statistic)
    # Bonett & Wright 2000: the variance of a rank correlation's transform.
    half = 1.96 * ((1 + rank**2 / 2) / max(len(top) - 3, 1)) ** 0.5
    low, high = np.tanh(np.arctanh(rank) + np.array([-half, half]))
    return f"{rank:.2f} [{low:.2f}, {high:.2f}]"


def capacities(asked: Options) -> None:
    """Images that one gradient can determine, by network."""
    rows = []
    for name in asked.victims:
        network = load(name, 1).network
        found = capacity(network.module, network.variables, SHAPE)
        rows.append(
            {
                "victim": name,
                "parameters": found.parameters,
                "images": found.images,
                "binding": found.binding.layer,
                "equality": found.equality,
                **{f"free at {b}": f"{found.free(b):.0%}" for b in asked.batches},
            }
        )
    markdown(rows, list(rows[0]))
