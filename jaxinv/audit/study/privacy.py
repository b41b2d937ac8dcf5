"""Epsilon shown by naming one image, beside the one promised."""

from jaxinv.audit import dp, games, measuring
from jaxinv.audit.study.scene import Options, Row, Table, load

MULTIPLIERS = (0.3, 0.5, 1.0, 2.0, 4.0)
DELTA = 1e-5


def private(asked: Options) -> None:
    """An informed adversary's games with the stated noise, and with half of it."""
    table = Table(asked, "privacy")
    for name in asked.victims:
        scene = load(name, asked.candidates)
        clipped = measuring.gradients(
            scene.network.loss, scene.network.params, scene.candidates, clip=1.0
        )
        targets = games.draw(asked.games, 1, asked.candidates)[:, 0]
        for multiplier in MULTIPLIERS:
            for steps in (1, 100):
                # Exact for Gaussian noise on all examples; a test compares it with the accountant.
                promised = dp.gdp_epsilon(steps**0.5 / multiplier, DELTA)
                for noise, real in (("as stated", 1.0), ("half of it", 0.5)):
                    key: Row = {"victim": name, "multiplier": multiplier, "steps": steps}
                    key |= {"noise": noise, "candidates": asked.candidates, "games": asked.games}
                    if not table.lacks(**key):
                        continue
                    # All steps at the same parameters are one release with steps as many copies.
                    scores = dp.informed_scores(
                        clipped[None] * steps**0.5, targets, multiplier * real, 0
                    )
                    wins = int((scores.argmax(axis=1) == targets).sum())
                    found = dp.lower_bound(wins, asked.games, asked.candidates, DELTA)
                    mu = steps**0.5 / multiplier / real
                    table.add(
                        key
                        | {
                            "success": found.success,
                            "expected": dp.expected_success(asked.candidates, mu),
                            "shown": found.epsilon,
                            "promised": promised,
                            "verdict": "caught" if found.epsilon > promised else "consistent",
                        }
                    )
    table.show(
        "victim",
        "multiplier",
        "steps",
        "noise",
        "success",
        "expected",
        "shown",
        "promised",
        "verdict",
    )
