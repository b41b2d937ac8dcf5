"""Settings: what a grid becomes, and one clear line for each bad input."""

import re
import tomllib

import pytest

from jaxinv.client import Local
from jaxinv.errors import UserError
from jaxinv.settings import flags, reader, requests, schema
from jaxinv.settings.naming import heading_text, label_text, naming_settings, victim_text
from jaxinv.settings.schema import RENAMED


def study(path=None, **flags):
    return reader.load_study(path, flags)


def test_default_study_is_the_documented_one():
    default = study()
    assert default.axes == {"tv": [1e-2, 1e-3, 1e-4]}
    assert (default.plan.targets, default.plan.seeds, len(default.cells)) == (4, 32, 3)
    assert {c.model for c in default.cells} == {"lenet_zhu"}


def test_flags_override_the_file_and_lists_make_axes(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        'question = "?"\nexpectation = "!"\n[run]\nseeds = 3\n[grid]\ntv = [0.1, 0.2]\nlr = 0.5\n'
    )
    made = study(file, seeds="5", lr=["0.1", "0.2"], target_ids="3,17")
    assert made.name == "own"
    assert made.text.question == "?"
    assert (made.text.expectation, study(file).text.expectation) == ("", "!")
    assert made.axes == {"tv": [0.1, 0.2], "lr": [0.1, 0.2]}
    assert [(c.tv, c.lr) for c in made.cells] == [(0.1, 0.1), (0.1, 0.2), (0.2, 0.1), (0.2, 0.2)]
    assert (made.plan.seeds, made.plan.target_ids) == (5, (3, 17))


def test_the_rate_is_that_of_the_optimizer_unless_given(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[grid]\nlr = 0.5\n")

    def of(**flags):
        return [cell.lr for cell in study(file, **flags).cells]

    assert of() == [0.5]
    assert of(attack="dlg") == [1.0]  # another optimizer's rate is none of L-BFGS's
    assert of(attack="dlg", lr=["0.2"]) == [0.2]
    assert of(attack="dlg", optimizer=["lbfgs", "adam"]) == [1.0, 0.1]
    assert of(optimizer="lbfgs", sign="none") == [1.0]
    assert of(representation=["pixels", "generator"]) == [0.1, 0.003]
    assert of(representation="generator", lr=["0.2"]) == [0.2]
    assert of(representation="pixels") == [0.5]  # what the file has already


def test_vary_tables_ask_one_question_each_around_one_cell(tmp_path):
    file = tmp_path / "around.toml"
    file.write_text(
        "[grid]\nmodel = 'convnet'\nwidth = 8\n[[vary]]\nwidth = [8, 16]\n"
        "[[vary]]\ntv = [0.01, 0.1]\n"
        "[[vary]]\nvictim = 'lenet_zhu-cifar10'\n[preset.wide.grid]\nlr = 0.5\n"
    )
    made = study(file)
    cells = [(c.model, c.width, c.tv, c.lr) for c in made.cells]
    first = ("convnet", 8, 0.01, 0.1)
    assert cells == [
        first,
        ("convnet", 16, 0.01, 0.1),
        ("convnet", 8, 0.1, 0.1),
        ("lenet_zhu", None, 0.01, 0.1),
    ]
    assert made.axes["width"] == [8, 16, None]
    assert made.axes["tv"] == [0.01, 0.1]
    settings = [cell.model_dump() for cell in made.cells]
    names = [naming_settings(made.axes, settings, i) for i in range(4)]
    assert names[0] == {"model": "convnet", "width": 8, "tv": 0.01}
    assert names[1:3] == [{"width": 16}, {"tv": 0.1}]
    assert names[3]["victim"] == "lenet_zhu-cifar10"
    assert {c.lr for c in reader.load_study(file, {}, "wide").cells} == {0.5}
    # A flag holds in every question, and makes one cell of those that differed in it alone.
    assert [(c.width, c.tv) for c in study(file, tv=["1"]).cells[:2]] == [(8, 1.0), (16, 1.0)]


def test_shipped_sweeps_are_valid(pytestconfig):
    files = sorted((pytestconfig.rootpath / "sweeps").glob("*.toml"))
    assert {"geiping_table1_lenet", "tv_weight"} <= {f.stem for f in files}
    for file in files:
        shipped = study(file)
        text = shipped.text
        assert all((text.question, text.cost, text.expectation))
        counted = re.findall(r"(\d+) cells", text.cost.partition("--preset")[0])
        assert not counted or sum(map(int, counted)) == len(shipped.cells)
        for preset, tables in tomllib.loads(file.read_text()).get("preset", {}).items():
            named = [
                t["victim"]
                for t in (tables.get("grid", {}), *tables.get("vary", []))
                if "victim" in t
            ]
            victims = [v for names in named for v in ([names] if isinstance(names, str) else names)]
            if all((pytestconfig.rootpath / "checkpoints" / v).exists() for v in victims):
                reader.load_study(file, {}, preset)  # others are to be trained first


def test_what_follows_from_the_attack_names_no_cell(tmp_path):
    file = tmp_path / "two.toml"
    file.write_text('[grid]\ntv = 0.1\n[[vary]]\nimages = [1, 2]\n[[vary]]\nattack = "bayes"')
    made = study(file)
    assert made.axes == {"images": [1, 2], "attack": ["geiping", "bayes"]}
    assert [(c.tv, c.iterations) for c in made.cells] == [(0.1, 500), (0.1, 500), (0, 28)]


ADAPTIVE = {"adaptive": "true"}


@pytest.mark.parametrize(
    ("network", "attack", "representation"),
    [
        ({}, "bayes", "pixels"),
        ({"model": "resnet18"}, "smoothed_bayes", "pixels"),
        ({"model": "resnet18", "client_epochs": "2"}, "geiping", "generator"),
        ({"victim": "resnet18-w16-cifar10"}, "geiping", "generator"),
        # What wins otherwise is not for these.
        ({"model": "resnet18", "labels": "joint"}, "geiping", "generator"),
        ({"model": "resnet18_gn", "defense": "dpsgd:1:1"} | ADAPTIVE, "geiping", "generator"),
        (
            {"model": "resnet18", "images": "2", "assumed_batch": "1", "labels": "counts"},
            "geiping",
            "generator",
        ),
        ({"model": "vit"}, "patches", "pixels"),
        ({"model": "vit", "images": "2"}, "bayes", "pixels"),
        ({"model": "vit", "defense": "noise:1e-2"}, "bayes", "pixels"),
        ({"server": "malicious", "images": "8"}, "imprint", "pixels"),
        ({"server": "malicious", "model": "vit"}, "imprint", "pixels"),
        ({"server": "malicious", "images": "8", "client_batch": "4"}, "geiping", "generator"),
        ({"server": "malicious", "defense": "prune:0.9"} | ADAPTIVE, "smoothed_bayes", "pixels"),
    ],
)
def test_the_best_attack_is_what_won_on_such_networks(network, attack, representation):
    cell, *_ = study(attack="best", **network).cells
    assert (cell.attack, cell.representation) == (attack, representation)


def test_what_is_given_beside_the_best_attack_stands():
    (cell,) = study(attack="best", victim="resnet18-w16-cifar10", representation="whitened").cells
    assert (cell.attack, cell.representation, cell.lr) == ("geiping", "whitened", 0.1)
    with pytest.raises(UserError, match="--representation: --attack bayes does not use it"):
        study(attack="best", representation="whitened")


def test_bad_files_name_themselves(tmp_path):
    with pytest.raises(UserError, match=r"absent\.toml: there is no such file; sweeps/ has"):
        study(tmp_path / "absent.toml")
    file = tmp_path / "bad.toml"
    for content, message in (
        ("grid = [", "bad.toml cannot be read"),
        ("[grid]\ntvv = 1", "unknown setting 'tvv'; known are dataset"),
        ("[grid]\ntv = []", "--tv: an axis needs at least one value"),
        ("vary = 1", r"vary 1: .* list in .*bad\.toml"),
        ("[preset.full]\nrun = 1", "preset.full.run 1: .* dictionary in "),
        ("quest = 1", "unknown setting 'quest' in .*known are run, grid, vary, quest"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            study(file)
    file.write_text("[preset.full.run]\ntargets = 1")
    with pytest.raises(UserError, match=r"--preset large: .* does not have it; known: full"):
        reader.load_study(file, {}, "large")


def test_older_names_say_what_they_are_called_now(tmp_path):
    file = tmp_path / "old.toml"
    for old, new in RENAMED.items():
        with pytest.raises(UserError, match=f"^--{old}: is now --{new.replace('_', '-')}$"):
            parsed(flags.add_study, f"--{old}", "1")
        file.write_text(f"[grid]\n{old} = 1\n")
        with pytest.raises(UserError, match=f"^the setting '{old}' is now '{new}'$"):
            study(file)
        with pytest.raises(UserError, match=f"'{old}' is now '{new}'"):
            reader.load_search({"space": [f"{old}=0.1:1"]})
    with pytest.raises(UserError, match="--no-augment: is now --augment false"):
        parsed(flags.add_training, "--no-augment")


def parsed(add, *arguments):
    """The flags that a command line gives, by name."""
    parser = flags.FlagParser("command", "")
    add(parser)
    return vars(parser.parse_args(arguments))


def test_a_switch_alone_says_true():
    def load(*words):
        return reader.load_training(parsed(flags.add_training, *words))

    private = ("--noise-multiplier", "1", "--delta", "1e-5")
    assert not load().dp
    assert load("--dp", *private).dp
    assert load("--dp", "true", *private).dp
    assert not load("--augment", "false").augment


@pytest.mark.parametrize(
    ("add", "models"),
    [
        (flags.add_study, (schema.Cell, schema.Plan)),
        (flags.add_search, (schema.Cell, schema.Plan, requests.Search)),
        (flags.add_training, (requests.Training,)),
        (flags.add_workers, (schema.Workers,)),
        (flags.add_inverting, (requests.Inverting,)),
    ],
)
def test_help_says_of_every_flag_what_it_takes(add, models):
    parser = flags.FlagParser("command", "")
    add(parser)
    text = " ".join(parser.format_help().split())
    assert "default: None" not in text
    assert not re.search(r"\(default[^)]*\)\.? \(default", text)
    for model in models:
        for name, field in model.model_fields.items():
            assert f"--{name.replace('_', '-')} " in text
            assert field.description[0].isupper()
            assert field.description.endswith((".", ")."))
    for old in RENAMED:
        assert f"--{old} " not in text


def test_help_shows_choices_and_types():
    parser = flags.FlagParser("command", "")
    flags.add_study(parser)
    text = parser.format_help()
    for words in (
        "objective {cosine,l2} ...",
        "tv FLOAT ...",
        "seeds INT",
        "box {true,false} ...",
        "labels {known,idlg,llg,ilrg,counts,joint} ...",
    ):
        assert f"  --{words}" in text


def test_an_attackers_view_is_what_it_assumes_and_else_the_truth():
    cell = schema.Cell(images=4, client_batch=2, client_lr=0.1, defense="clip:1,noise:0.5")
    assert cell.assumed() == (4, Local(1, 2), 0.1, ())
    own = cell.model_copy(
        update={"assumed_images": 6, "assumed_batch": 3, "assumed_lr": 0.2, "adaptive": True}
    )
    assert own.assumed() == (6, Local(1, 3), 0.2, ("clip", "noise"))
    assert (cell.numbers()["client_lr"], own.numbers()["client_lr"]) == (0.1, 0.2)


def test_a_setting_is_refused_only_where_no_cell_has_a_use_for_it():
    """An axis may have values beside which another setting means nothing."""
    made = study(client_lr=["0.1"], images=["2"], client_batch=["1", "2"], tv="0.01")
    assert len(made.cells) == 2
    made = study(noise_seeds="2", defense=["none", "noise:1e-3"], tv="0.01")
    assert len(made.cells) == 2


def test_a_label_says_what_it_means_that_a_setting_is_not_given():
    assert label_text({"victim": None, "width": None, "tv": 0.01}) == (
        "victim = untrained, width = published, tv = 0.01"
    )


def test_attack_and_defense_are_said_of_every_cell_of_a_sweep_that_has_several():
    """Beside another attack a picture without a name would not say whose it is."""
    axes = {"attack": ["geiping", "bayes"], "defense": ["none", "clip:1"], "tv": [0.03, 0.1]}
    rows = [("geiping", "none", 0.03), ("geiping", "clip:1", 0.1), ("bayes", "none", 0.03)]
    made = [dict(zip(axes, row)) for row in rows]
    assert [heading_text(naming_settings(axes, made, i)) for i in range(3)] == [
        "cosine + TV, no defense, tv = 0.03",
        "cosine + TV, clip:1, tv = 0.1",
        "Gauss-Newton, no defense",
    ]


def test_a_heading_leaves_out_the_names_of_words():
    settings = {"representation": "generator", "victim": None, "width": None, "tv": 0.01}
    assert heading_text(settings) == "generator, untrained, width = published, tv = 0.01"
    settings = {"defense": "none", "tv": 0.03, "attack": "geiping"}
    assert heading_text(settings) == "cosine + TV, no defense, tv = 0.03"
    settings = {"victim": "resnet18-w32-cifar10", "adaptive": False, "images": 4}
    assert heading_text(settings) == "ResNet18 (32) trained, blind, images = 4"


def test_a_checkpoint_is_named_in_words_where_it_has_the_names_of_the_trainings():
    words = {
        "lenet_zhu-cifar10": "LeNetZhu trained",
        "resnet18-w16-cifar10-epoch0": "ResNet18 (16) before training",
        "checkpoints/mobilenetv2-w8-cifar10-epoch1/": "MobileNetV2 (8) after 1 epoch",
        "resnet18-w32-cifar10-no-augment": "ResNet18 (32) trained without augmentation",
        "resnet20_gn-w8-cifar10-dp-s0.5": "ResNet20-GN (8) trained, dp-s0.5",
        "/somewhere/my-own": "my-own",
        "alexnet-cifar10": "alexnet-cifar10",
    }
    assert {name: victim_text(name) for name in words} == words


def test_what_the_default_study_asks_is_said_of_its_own_grid_alone(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('question = "Mine?"\ncost = "much"\n')
    asked = {"tv": ["0.5"]}
    assert reader.load_study(None, asked).text == schema.Text()
    assert reader.load_study(None, {}).text.question != schema.Text().question
    assert reader.load_study(file, asked).text == schema.Text(question="Mine?")


def test_a_preset_has_a_run_folder_of_its_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[preset.tiny.run]\nseeds = 1\n")
    assert reader.load_study(file, {}).folder.name == "mine"
    assert reader.load_study(file, {}, "tiny").folder.name == "mine-tiny"


def test_a_defense_of_an_update_is_for_attacks_that_make_something_of_it():
    given = {"update": "u.npz", "victim": "lenet_zhu-tiles", "defense": "noise:1e-2"}
    assert reader.load_inverting(given)[1].adaptive
    learned = {"attack": "learned", "inverter": "x"}
    assert not reader.load_inverting(given | learned)[1].adaptive  # it knows by having learned
    with pytest.raises(UserError, match="--defense: this attack makes nothing of knowing it"):
        reader.load_inverting(given | {"attack": "analytic"})
