"""Published numbers are functions of seeds: what fails here has renumbered somebody's results.

A value below may change with a new major version alone, and the CHANGELOG says so.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import defenses, rng, sweep
from jaxinv.attacks import labels
from jaxinv.attacks.base import Known
from jaxinv.attacks.gauss_newton import GaussNewton
from jaxinv.attacks.gradient_matching import INITS, Method
from jaxinv.data import image_prior
from jaxinv.engine.targets import noise_keys, order_keys, seed_keys
from jaxinv.runs import results
from jaxinv.types import Normalization
from jaxinv.victim.untrained import untrained

KEYS = [
    [1623826843, 923166472],
    [126084816, 264015099],
    [3773378617, 1964335944],
    [2726323936, 1427430364],
    [2759010894, 3610273236],
]
START_KEY = [2995647191, 3261171395]
NOISE_KEY = [2751258177, 612216909]
ORDER_KEY = [1510042133, 192041636]
PRIOR_INITS = {
    "normal": [-0.3193879, 1.054711, -0.956038],
    "uniform": [-0.2505677, 0.7084424, -0.6609471],
    "patterned": [-0.3193879, 1.054711, -0.956038],
    "gray": [0.0, 0.0, 0.0],
}
LOGITS = [1.647009, 0.3754439]
OF_PRIOR = [-0.8290714, 2.022858, -0.5560392]
NOISE = {
    "noise": [-0.4249016, -1.279412, 0.2152946],
    "laplace": [-0.3846911, -1.841458, 0.6980411],
    "relative": [-0.03308079, -0.5016855, -0.02797583],
    "quantize": [-0.1666667, -0.1666667, 0.1666667],
}
DIGEST = "4c4de87378fbdf01c5b74eab875a80dc552e68e5c1e32d9f285f516ca6c4604e"
RESNET = [-0.04360274, 0.03050098, -0.08173145]
DUMMIES = [0.2835307, 0.5111939, 0.6351403]
ROWS = {
    "noise:1e-4": {"update_cosine": 0.6327084, "update_error": 1.245518, "objective": 0.4193192},
    "dpsgd:1:1e-2": {"update_cosine": 0.6280612, "update_error": 1.243326, "objective": 0.4209247},
}
OF_BOTH = {"psnr": 10.28584, "ssim": 0.0377254, "prior": 0.02094596, "baseline_psnr": 14.51478}


def test_streams_have_their_numbers():
    assert {stream.name: int(stream) for stream in rng.Stream} == {
        "DATA": 0,
        "NETWORK": 1,
        "DEFENSE": 2,
        "ATTACK": 3,
        "TRAINING": 4,
    }
    keys = [jax.random.key_data(rng.stream_key(stream, 5, 17)).tolist() for stream in rng.Stream]
    assert keys == KEYS


def test_keys_of_a_trial():
    def of(keys):
        return jax.random.key_data(keys).ravel().tolist()

    assert of(seed_keys([17], [3])) == START_KEY
    assert of(noise_keys([17], [3])) == NOISE_KEY
    assert of(order_keys([17])) == ORDER_KEY


@pytest.mark.parametrize("name", INITS)
def test_starts(name):
    """The first numbers of target 17's start with seed 3."""
    key = seed_keys([17], [3])[0, 0]
    start = INITS[name](key, (1, 4, 4, 3)).ravel()[:3]
    np.testing.assert_allclose(start, PRIOR_INITS[name], rtol=1e-5)


def test_starts_of_labels_and_of_the_prior():
    key = seed_keys([17], [3])[0, 0]
    normalization = Normalization(jnp.zeros(3), jnp.ones(3))
    prior = image_prior.of_spectrum(np.zeros((4, 4, 3)), np.broadcast_to(np.eye(3), (4, 4, 3, 3)))
    known = Known(None, None, None, normalization, jax.tree.map(jnp.float32, prior))
    joint = Method(classes=2).init(None, key, (1, 4, 4, 3), known)
    np.testing.assert_allclose(joint.candidate.logits[0], LOGITS, rtol=1e-5)
    drawn = GaussNewton(init_from="prior").init(None, key, (1, 4, 4, 3), known, None)
    np.testing.assert_allclose(drawn.candidate.images.ravel()[:3], OF_PRIOR, rtol=1e-4)


def test_draws_of_noise():
    """Of target 17 with noise seed 3, each on one update, whatever else is in the table."""
    update = {"w": jnp.linspace(-0.5, 0.5, 10)}
    key = noise_keys([17], [3])[0]
    for name, expected in NOISE.items():
        strength = jnp.float32(2.0 if name == "quantize" else 1.0)
        sent = defenses.defend((name,), update, ((strength,),), key, None)
        np.testing.assert_allclose(sent["w"][3:6], expected, rtol=1e-5)
    random = {name for name, defense in defenses.DEFENSES.items() if defense.random}
    assert random == {*NOISE, "dpsgd"}  # whose noise is a row's below


def test_a_network():
    """LeNetZhu is drawn from uniform numbers, which have no rounding."""
    victim = untrained("lenet_zhu", classes=7, width=None, seed=1, image_shape=(32, 32, 3))
    assert victim.digest == DIGEST
    resnet = untrained("resnet20", classes=7, width=2, seed=1, image_shape=(32, 32, 3)).variables[
        "params"
    ]
    np.testing.assert_allclose(resnet["Conv_0"]["kernel"].ravel()[:3], RESNET, rtol=1e-4)


def test_noise_by_which_labels_are_read():
    noise = labels.natural_noise(jax.random.key(0), (2, 4, 4, 3)).ravel()[:3]
    np.testing.assert_allclose(noise, DUMMIES, rtol=1e-4)


@pytest.mark.parametrize("defense", ROWS)
def test_a_row(defense, tmp_path, monkeypatch):
    """One step on a shipped image: all of it, from the data set to the row, to rounding."""
    monkeypatch.setattr(sweep.report, "build", lambda folder, console: None)
    arguments = ["--target-ids", "17", "--seeds", "1", "--iterations", "1", "--tv", "0.01"]
    arguments += ["--sign", "none", "--lr", "0.001", "--network-seed", "1", "--defense", defense]
    assert sweep.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    rows = results.read_run(tmp_path / "run").trials
    for name, value in (OF_BOTH | ROWS[defense]).items():
        assert rows[name][0] == pytest.approx(value, rel=1e-4), name
    assert (rows["victim_digest"][0], rows["image_ids"][0]) == (DIGEST, [17])
