"""Round trips and invariances, on examples that hypothesis makes up."""

import itertools

import jax
import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from jaxinv import defenses, metrics
from jaxinv.attacks import unused_settings
from jaxinv.client import updates
from jaxinv.engine.planner import GroupPlan, make_grid
from jaxinv.reporting import statistics
from jaxinv.settings import reader

few = st.integers(1, 5)
CLIENT = {"images": 2, "client_epochs": 2, "client_batch": 1, "labels": "counts"}
weights = st.just(0.0) | st.floats(1e-30, 1e3)  # smaller ones are refused: float32 has no room
match, psnr = jax.jit(metrics.match), jax.jit(metrics.psnr)  # op by op they take long


@st.composite
def chains(draw):
    """Chains of at most three defenses with strengths in their ranges."""
    names = [name for name, entry in defenses.DEFENSES.items() if not entry.of_each_image]
    chain = []
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        limits = [(least, min(most, 1e6)) for _, least, most in defenses.DEFENSES[name].parameters]
        chain.append((name, tuple(draw(st.floats(*limit)) for limit in limits)))
    return tuple(chain)


@given(chains())
def test_a_chain_of_defenses_is_read_as_it_is_spelled(chain):
    assert defenses.parse(defenses.spell(chain)) == chain


@given(st.builds(GroupPlan, few, few, few), few, few)
def test_trials_are_dealt_out_and_gathered_again(plan, targets, seeds):
    grid = make_grid(plan, targets, seeds)
    trials = np.arange(targets * seeds).reshape(targets, seeds)
    np.testing.assert_array_equal(grid.gather(grid.deal(trials)), trials)


@given(
    tv=weights,
    lr=st.floats(1e-6, 1e3),
    iterations=st.integers(1, 10**6),
    network_seed=st.integers(0, 2**31),
    shuffled=st.booleans(),
    variance=weights,
)
def test_a_cell_comes_back_from_its_sweep_file(tmp_path_factory, variance, **settings):
    file = tmp_path_factory.getbasetemp() / "cell.toml"

    def through(grid):
        file.write_text(tomli_w.dumps({"question": "?", "grid": grid}))
        (cell,) = reader.load_study(file, {}).cells
        return cell

    cell = through(settings | CLIENT | {"defense": f"noise:{variance!r}"})
    assert defenses.parse(cell.defense) == (("noise", (variance,)),)
    kept = cell.model_dump(exclude_none=True, exclude=unused_settings(cell.attack))
    assert through(kept) == cell


pictures = arrays(np.float32, (3, 4, 4, 1), elements=st.floats(0, 1, width=32))


@given(pictures, pictures, st.permutations(range(3)))
def test_psnr_is_symmetric_and_does_not_ask_for_the_order(truth, found, order):
    np.testing.assert_array_equal(psnr(truth, found), psnr(found, truth))
    orders = found, found[list(order)]
    # The sum: two assignments may be equally good to rounding.
    first, second = (np.square(match(images, truth) - truth).sum() for images in orders)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


@given(st.data(), st.integers(1, 5))
def test_the_best_of_k_is_that_of_all_subsets(data, seeds):
    scores = data.draw(arrays(float, seeds, elements=st.integers(0, 3)))  # ties among them
    values = data.draw(arrays(float, seeds, elements=st.floats(-100, 100)))
    found = statistics.best_of_k(values[None], scores[None]).per_target[0]
    for k in range(1, seeds + 1):
        chosen = []
        for subset in map(list, itertools.combinations(range(seeds), k)):
            lowest = scores[subset] == scores[subset].min()
            chosen.append(values[subset][lowest].mean())
        assert found[k - 1] == pytest.approx(np.mean(chosen), abs=1e-9)


names = st.text("abcxyzABC_123", min_size=1, max_size=8)
leaves = arrays(np.float32, array_shapes(max_dims=4, max_side=3), elements=st.floats(width=32))


@given(st.dictionaries(names, st.dictionaries(names, leaves, min_size=1), min_size=1))
def test_an_update_comes_back_from_its_file(tmp_path_factory, update):
    path = tmp_path_factory.getbasetemp() / "update.npz"
    updates.save(path, update)
    jax.tree.map(np.testing.assert_array_equal, updates.load(path, update), update)
