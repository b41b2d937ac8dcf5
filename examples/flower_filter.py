"""A Flower client that looks at its update before it sends it: `send` or `hold`.

    python examples/flower_filter.py

The client below works as a Flower `NumPyClient.fit` does. Before it returns, it asks
`jaxinv.audit.filter` whether one image dominates a layer, whether the parameters it was sent look
like a malicious server's, and whether so few images can be determined by their gradient. On `hold`
it sends back the parameters as they came, which the server's average takes as no change.
"""

import jax
import numpy as np

import jaxinv
from jaxinv import audit, client, data
from jaxinv.types import Normalization

LEARNING_RATE = 0.1


def fit(parameters: list[np.ndarray], victim, images, labels) -> tuple[list[np.ndarray], dict]:
    """One round of the client; the second result goes to the server's log as metrics."""
    structure = jax.tree.structure(victim.variables["params"])
    params = structure.unflatten(parameters)
    variables = {**victim.variables, "params": params}
    normalization = Normalization.of(victim.info.mean, victim.info.std)
    decision = audit.filter(victim.module, variables, normalization, images, labels)
    if decision.action == "hold":
        return parameters, {"held": 1, "reasons": "; ".join(decision.reasons)}
    loss = client.loss_fn(victim.module, variables)
    normalized = normalization.normalize(images / np.float32(255))
    gradient, _ = client.gradient(loss, params, normalized, labels)
    steps = zip(parameters, jax.tree.leaves(gradient))
    return [np.asarray(p - LEARNING_RATE * g) for p, g in steps], {"held": 0}


def main() -> None:
    """Plays a round with one photograph and one with 32."""
    victim = jaxinv.load_victim("lenet_zhu-tiles")
    parameters = [np.asarray(leaf) for leaf in jax.tree.leaves(victim.variables["params"])]
    for count in (1, 32):
        tiles = data.load("tiles", split="test", ids=count)
        _, metrics = fit(parameters, victim, tiles.images, tiles.labels)
        print(
            f"{count} images:", "held:" if metrics["held"] else "sent", metrics.get("reasons", "")
        )


if __name__ == "__main__":
    main()
