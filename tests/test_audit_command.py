"""The audit of one update: the command, its page, the verdict, and a client's filter."""

import json
import runpy
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinv
from jaxinv import audit, client, data
from jaxinv.audit import auditing, games, server
from jaxinv.audit import ceiling as ceilings
from jaxinv.client import pytorch, updates
from jaxinv.errors import UserError
from jaxinv.networks.inspect import parameters_in_order
from jaxinv.types import Normalization, Truth
from jaxinv.victim.untrained import untrained


@pytest.fixture(scope="module")
def scene():
    victim = jaxinv.load_victim("lenet_zhu-tiles")
    normalization = Normalization.of(victim.info.mean, victim.info.std)
    return victim, normalization, data.load("tiles", split="test")


def pool_of(tiles, used):
    left = np.setdiff1d(np.arange(len(tiles.ids)), used)[:60]
    return audit.Pool(tiles.images[left], tiles.labels[left])


@pytest.fixture(scope="module")
def found(scene):
    victim, normalization, tiles = scene
    return audit.audit(
        victim.module,
        victim.variables,
        normalization,
        tiles.images[[3, 17]],
        tiles.labels[[3, 17]],
        pool_of(tiles, [3, 17]),
        setting=audit.Setting(games=12),
    )


def test_names_all_and_says_so(found):
    assert found.named == 2
    assert found.identification.recall.value == 1
    said = audit.verdict(found)
    assert "Of this one: 2 of 2." in said.anyone[0]
    # LeNetZhu lets 1.9 images through: 5,904 of the 6,144 numbers of two.
    assert "more than 96% of the numbers" in said.nobody[0]
    assert found.capacity.determined(2) == 5904
    assert any("learned image prior" in s for s in said.not_tried)


def test_command_writes_page_and_numbers(tmp_path, capsys):
    code = audit.main(
        [
            "--victim",
            "lenet_zhu-tiles",
            "--ids",
            "3,17",
            "--candidates",
            "62",
            "--games",
            "12",
            "--quick",
            "--defense",
            "noise:1e-4",
            "--server",
            "malicious",
            "--bins",
            "64",
            "--out",
            str(tmp_path),
        ]
    )
    assert code == 0
    page = (tmp_path / "audit.html").read_text()
    numbers = json.loads((tmp_path / "audit.json").read_text())
    for heading in ("What anyone could read off it", "What nobody can", "What was not tried"):
        assert heading in page
    assert numbers["identification"]["candidates"] == 62
    assert numbers["identification"]["chance"] == pytest.approx(2 / 62)
    said = " ".join(capsys.readouterr().out.split())
    assert numbers["verdict"]["anyone"][0] in said
    assert numbers["ceiling"] is numbers["rank_psnr"] is None
    assert numbers["malicious_server"]["expected"] == pytest.approx(63 / 64)
    assert "imprint of 64 bins" in said
    assert numbers["fishing"]["cosine"] > 0.999
    assert "fishes for a class" in said


def test_command_audits_an_update_from_a_file(tmp_path, scene):
    """Of other images than those named: none is found."""
    victim, normalization, tiles = scene
    loss = client.loss_fn(victim.module, victim.variables)
    images = normalization.normalize(tiles.images[[40, 41]] / np.float32(255))
    update, _ = client.gradient(loss, victim.variables["params"], images, tiles.labels[[40, 41]])
    updates.save(tmp_path / "update.npz", update)
    arguments = [
        "--victim",
        "lenet_zhu-tiles",
        "--candidates",
        "62",
        "--games",
        "12",
        "--quick",
        "--update",
        str(tmp_path / "update.npz"),
    ]
    for ids, labels, named in (
        ("3,17", "known", 0),
        ("40,41", "known", 2),
        ("40,41", "unknown", 2),
    ):
        out = tmp_path / f"{ids}-{labels}"
        assert audit.main([*arguments, f"--ids={ids}", f"--labels={labels}", f"--out={out}"]) == 0
        numbers = json.loads((out / "audit.json").read_text())
        assert numbers["identification"]["named_of_this_update"] == named
        unknown = labels == "unknown"
        assert ("without their labels" in numbers["verdict"]["anyone"][0]) == unknown
        assert (
            any("labels that are not known" in x for x in numbers["verdict"]["not_tried"])
            != unknown
        )


def as_pytorch(tree, uses):
    """A tree's arrays by PyTorch's names, in its layouts."""
    named, arrays = {}, updates.names_of(tree)
    for number, use in enumerate(uses):
        shape = pytorch.shape_of(use)
        places = pytorch.converter(use)(np.arange(np.prod(shape)).reshape(shape))
        flat = np.empty(np.prod(shape), np.float32)
        flat[places.ravel()] = arrays["/".join(use.path)].ravel()
        kind = "weight" if use.path[-1] == "kernel" else "bias"
        named[f"layer{number // 2}.{kind}"] = flat.reshape(shape)
    return named


def test_an_update_is_understood_once(tmp_path, scene, capsys):
    """Of a file with the parameters after a step, by PyTorch's names: names need its scale."""
    victim, normalization, tiles = scene
    params = victim.variables["params"]
    loss = client.loss_fn(victim.module, victim.variables)
    images = normalization.normalize(tiles.images[[40, 41]] / np.float32(255))
    gradient, _ = client.gradient(loss, params, images, tiles.labels[[40, 41]])
    after = jax.tree.map(lambda p, g: np.asarray(p - 0.05 * g), params, gradient)
    uses = parameters_in_order(victim.module, victim.variables, images.shape[1:])
    np.savez(tmp_path / "after.npz", **as_pytorch(after, uses))
    asked = ["--victim=lenet_zhu-tiles", "--ids=40,41", "--candidates=62", "--games=2", "--quick"]
    asked += [f"--update={tmp_path / 'after.npz'}", f"--out={tmp_path / 'out'}"]
    assert audit.main(asked) == 2
    assert "its scale is not known" in capsys.readouterr().err
    assert audit.main([*asked, "--client-lr=0.05"]) == 0
    numbers = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert numbers["identification"]["named_of_this_update"] == 2
    assert "read as new parameters" in " ".join(capsys.readouterr().out.split())


def test_an_update_that_says_nothing_names_nobody(scene):
    """Where all scores are equal chance decides, and not that the client's images came first."""
    victim, normalization, tiles = scene
    own = victim.module, victim.variables, normalization, tiles.images[[3, 17]]
    asked = (*own, tiles.labels[[3, 17]], pool_of(tiles, [3, 17]))
    assert audit.audit(*asked, setting=audit.Setting("prune:1", games=2)).named == 0
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), victim.variables["params"])
    with pytest.raises(UserError, match=r"^update: .* NaN of .* numbers; .*"):
        audit.audit(*asked, update=broken, setting=audit.Setting(games=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "3"], "--victim: the network"),
        (["--victim", "lenet_zhu-tiles"], "--ids: the client's images"),
        (
            ["--victim", "lenet_zhu-tiles", "--ids", "3,4,5", "--client-batch", "2"],
            "--client-batch 2: does not divide",
        ),
        (
            ["--victim", "lenet_zhu-tiles", "--ids", "3", "--candidates", "1000000"],
            "--candidates 1000000: tiles/test has",
        ),
        (
            ["--victim", "lenet_zhu-tiles", "--ids", "3,4", "--candidates", "3"],
            "--candidates 3: an update of 2",
        ),
        (["--victim", "lenet_zhu-tiles", "--ids", "3", "--bins", "9"], "--bins: of an imprint"),
        (["--victim", "lenet_zhu-tiles", "--ids", "3", "--amplify", "9"], "--amplify: of an impr"),
        (
            [
                *("--victim", "lenet_zhu-tiles", "--ids", "3", "--server", "malicious"),
                *("--defense", "dpsgd:1:1"),
            ],
            "--server malicious: its imprint is not made for --defense dpsgd",
        ),
        (
            [
                *("--victim", "lenet_zhu-tiles", "--ids", "3", "--candidates", "9"),
                *("--judge", "lenet_zhu-tiles"),
            ],
            "--judge lenet_zhu-tiles: is the victim",
        ),
        (
            ["--victim", "lenet_zhu-tiles", "--ids", "3", "--judge", "x", "--quick"],
            "--judge: of what --quick leaves out",
        ),
        (
            [
                *("--victim", "lenet_zhu-tiles", "--ids", "3", "--quick"),
                *("--image-prior", "spectrum"),
            ],
            "--image-prior: of what --quick leaves out",
        ),
        (
            ["--victim", "lenet_zhu-tiles", "--ids", "3", "--client-lr", "0.1"],
            "--client-lr 0.1: the client takes one step; give --client-epochs or",
        ),
        (["--victim", "lenet_zhu-tiles", "--ids", "3,3"], "--ids: give each image once"),
        (["--victim", "lenet_zhu-tiles", "--ids", "3,99999"], "--ids must be in 0.."),
        (
            ["--victim", "lenet_zhu-tiles", "--ids", "3", "--update-kind", "weights"],
            "--update-kind: of an update in a file",
        ),
        (
            [
                *("--victim", "lenet_zhu-tiles", "--ids", "3", "--client-epochs", "2"),
                *("--update", "update.npz"),
            ],
            "--client-lr: the client takes 2 steps",
        ),
        (
            ["--victim", "lenet_zhu-tiles", "--ids", "3", "--defense", "victim"],
            "--defense victim: of a sweep",
        ),
        (
            [
                *("--victim", "lenet_zhu-tiles", "--ids", "3,4", "--client-epochs", "2"),
                *("--defense", "dpsgd:1:1"),
            ],
            "--defense dpsgd:1:1: of one gradient",
        ),
        (
            [
                *("--victim", "lenet_zhu-tiles", "--ids", "3,4", "--client-epochs", "2"),
                *("--server", "malicious"),
            ],
            "--server malicious: reads one gradient",
        ),
        (["--victim", "nobody", "--ids", "3"], "--victim nobody: no such checkpoint"),
        (["--victim", "lenet_zhu-tiles", "--ids", "3", "--defense", "wall"], "unknown defense"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    assert audit.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_private_update_has_a_bound_and_epsilon(scene):
    victim, normalization, tiles = scene
    setting = audit.Setting("dpsgd:1:0.5", games=12)
    found = audit.audit(
        victim.module,
        victim.variables,
        normalization,
        tiles.images[[3]],
        tiles.labels[[3]],
        pool_of(tiles, [3]),
        setting=setting,
    )
    # Phi(Phi^-1(1 / 61) + 2)
    assert found.release_bound == pytest.approx(0.4466, abs=2e-3)
    assert found.epsilon_shown.games == 12
    assert "DP-SGD" in " ".join(audit.verdict(found).nobody)


# --- What is not tried ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        (audit.Setting(), None),
        (audit.Setting("dpsgd:1:1"), "cannot adapt to a defense of each image's gradient"),
        (audit.Setting(local=client.Local(2)), "is of one gradient"),
    ],
)
def test_an_attack_that_does_not_fit_is_not_tried(setting, why, scene, monkeypatch):
    """Of a network with ReLUs, whose second-order attack is for one gradient of all images."""
    tried = []

    def invert(*update, method, **settings):
        tried.append(type(method).__name__)
        return SimpleNamespace(objectives=np.array([np.nan]))

    monkeypatch.setattr(auditing, "invert", invert)
    victim = untrained("convnet", classes=10, width=8, seed=0, image_shape=(32, 32, 3))
    network = games.network(victim.module, victim.variables, scene[1])
    truth = Truth(np.zeros((2, 32, 32, 3), np.float32), np.array([1, 2]))
    update = victim.variables["params"]
    asked = None, setting, None
    _, not_tried = auditing.reconstruct(network, truth, update, *asked)
    assert tried == ["SmoothedGaussNewton"] * (why is None) + ["Method"]
    assert not_tried == ([] if why is None else [f"smoothed Gauss-Newton, which {why}"])
    zero = jax.tree.map(jnp.zeros_like, update)
    found, (why,) = auditing.reconstruct(network, truth, zero, *asked)
    assert (found, why) == ([], "attacks on pixels: the update is zero in all layers")


def test_the_verdict_lists_what_did_not_fit(found):
    attack = "smoothed Gauss-Newton, which is of one gradient"
    assert attack in audit.verdict(found._replace(not_tried=(attack,))).not_tried


def test_a_ceiling_is_said_of_what_noise_hides(scene, monkeypatch):
    """It linearizes the gradient without a defense: of signs it once promised 133 dB."""
    for defense in ("none", "clip:1", "clip:1,noise:0.1", "quantize:4", "dpsgd:1:1"):
        assert auditing.hides_by_noise(defense)
    for defense in ("sign", "prune:0.9", "top-k:8", "soteria:0.5", "noise:0.1,sign"):
        assert not auditing.hides_by_noise(defense)
    certain = ceilings.Ceiling(np.full(2, 1e-13), np.full(2, 0.1), None, True, 0, 0)
    monkeypatch.setattr(auditing, "ceiling_of", lambda *arguments: certain)
    monkeypatch.setattr(auditing, "_rank_psnr", lambda *arguments: np.inf)
    monkeypatch.setattr(auditing, "reconstruct", lambda *arguments: ([], []))
    victim, normalization, tiles = scene
    for defense, said in (("none", True), ("sign", False)):
        found = audit.audit(
            *(victim.module, victim.variables, normalization, tiles.images[[3, 17]]),
            tiles.labels[[3, 17]],
            pool_of(tiles, [3, 17]),
            setting=audit.Setting(defense, games=2),
            image_prior="any",
        )
        words = audit.verdict(found)
        assert any("nothing but rounding hides them" in x for x in words.anyone) == said
        assert any("the ceiling, which knows of noise alone" in x for x in words.not_tried) != said


def test_no_bound_of_one_gradient_is_said_of_several_steps(tmp_path):
    """Neither by the layers nor from the Jacobian, in words, tiles or numbers."""
    arguments = ["--victim=lenet_zhu-tiles", "--ids=3,17", "--candidates=62", "--games=2"]
    arguments += ["--client-epochs=2", "--quick", f"--out={tmp_path}"]
    assert audit.main(arguments) == 0
    page = (tmp_path / "audit.html").read_text()
    numbers = json.loads((tmp_path / "audit.json").read_text())
    assert numbers["capacity"] is numbers["rank_psnr"] is None
    assert numbers["verdict"]["nobody"] == []
    assert not any("layers forbids" in said for said in numbers["verdict"]["anyone"])
    assert "come of the gradient alone" not in page
    assert "Capacity" not in page
    assert any("which are of one gradient" in said for said in numbers["verdict"]["not_tried"])


# --- The filter -----------------------------------------------------------------------------------


def decide(scene, chosen, **changes):
    victim, normalization, tiles = scene
    variables = {**victim.variables, **changes.pop("variables", {})}
    return audit.filter(
        victim.module,
        variables,
        normalization,
        tiles.images[chosen],
        tiles.labels[chosen],
        **changes,
    )


def test_filter_sends_many_and_holds_one(scene):
    assert decide(scene, np.arange(32)).action == "send"
    one = decide(scene, [0])
    assert one.action == "hold"
    assert "one image alone" in one.reasons[0]


def test_filter_holds_what_a_fishing_server_asks_for(scene):
    """A class that one image alone has: its gradient dominates every layer in front."""
    victim, _, tiles = scene
    params = victim.variables["params"]
    of_class = tiles.labels == tiles.labels[0]
    chosen = np.concatenate([[0], np.flatnonzero(~of_class)[:31]])
    kernel, bias = server.fish_class(
        params["Dense_0"]["kernel"], params["Dense_0"]["bias"], int(tiles.labels[0])
    )
    fished = {"params": {**params, "Dense_0": {"kernel": kernel, "bias": bias}}}
    decision = decide(scene, chosen, variables=fished)
    assert decision.action == "hold"
    assert "outweighs all others" in decision.reasons[0]


def test_filter_takes_noise_into_account(scene):
    """One image under LeNetZhu's capacity of 1.9 passes for capacity's sake only with noise."""
    limits = audit.Limits(d_snr=np.inf, least_images=20)
    quiet = decide(scene, np.arange(32), limits=limits)
    noise = jax.tree.map(lambda x: np.float32(0.1), scene[0].variables["params"])
    assert any("without noise" in r for r in quiet.reasons)
    assert not any(
        "without noise" in r
        for r in decide(scene, np.arange(32), limits=limits, variances=noise).reasons
    )


def test_flower_example_runs(capsys):
    runpy.run_path("examples/flower_filter.py", run_name="__main__")
    said = capsys.readouterr().out
    assert "1 images: held" in said
    assert "32 images: sent" in said


@pytest.mark.slow
def test_fishing_example_finds_the_one_image(tmp_path):
    example = runpy.run_path("examples/fishing.py")
    assert example["main"](tmp_path / "fished.png") > 30
    assert (tmp_path / "fished.png").exists()


def test_games_draw_no_image_twice():
    members = games.draw(50, 6, 20)
    assert all(len(set(row)) == 6 for row in members)
    assert (games.draw(50, 6, 20) == members).all()
    assert (games.draw(50, 6, 20, seed=1) != members).any()
