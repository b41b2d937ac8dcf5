"""Settings: what a grid becomes, and one clear line for each bad input."""

import tomllib

import pytest

from jaxinv import sweep
from jaxinv.errors import UserError
from jaxinv.settings import reader
from jaxinv.settings.naming import naming_settings


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
    of = lambda **flags: [cell.lr for cell in study(file, **flags).cells]  # noqa: E731
    assert of() == [0.5]
    assert of(attack="dlg") == [1.0]  # another optimiser's rate is none of L-BFGS's
    assert of(attack="dlg", lr=["0.2"]) == [0.2]
    assert of(attack="dlg", optimizer=["lbfgs", "adam"]) == [1.0, 0.1]
    assert of(optimizer="lbfgs", sign="none") == [1.0]


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
        first, ("convnet", 16, 0.01, 0.1), ("convnet", 8, 0.1, 0.1), ("lenet_zhu", None, 0.01, 0.1)
    ]  # fmt: skip
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
        text = study(file).text
        assert all((text.question, text.cost, text.expectation))
        for preset, tables in tomllib.loads(file.read_text()).get("preset", {}).items():
            named = [t["victim"] for t in (tables.get("grid", {}), *tables.get("vary", []))
                     if "victim" in t]  # fmt: skip
            victims = [v for names in named for v in ([names] if isinstance(names, str) else names)]
            if all((pytestconfig.rootpath / "checkpoints" / v).exists() for v in victims):
                reader.load_study(file, {}, preset)  # others are to be trained first


def test_what_follows_from_the_attack_names_no_cell(tmp_path):
    file = tmp_path / "two.toml"
    file.write_text('[grid]\ntv = 0.1\n[[vary]]\nimages = [1, 2]\n[[vary]]\nattack = "bayes"')
    made = study(file)
    assert made.axes == {"images": [1, 2], "attack": ["geiping", "bayes"]}
    assert [(c.tv, c.iterations) for c in made.cells] == [(0.1, 500), (0.1, 500), (0, 28)]


BAD = [
    ({"model": ["lenet"]}, "--model lenet: unknown; known are lenet_zhu, mlp, convnet, resnet20"),
    ({"objective": ["cos"]}, "--objective cos: unknown; known are cosine, l2"),
    ({"tv": ["-1"]}, "--tv -1: .*greater than or equal to 0"),
    ({"tv": ["nan"]}, "--tv nan: .*finite"),
    ({"iterations": ["ten"]}, "--iterations ten: .*integer"),
    ({"seeds": "0"}, "--seeds 0: .*greater than or equal to 1"),
    ({"target_ids": "3,x"}, "--target-ids x: .*integer"),
    ({"labels": ["idlg"], "images": ["2"]}, "--labels idlg reads one label"),
    ({"tv": ["0.1", "0.1"]}, "a cell twice"),
    ({"model": ["mobilenetv2"], "width": ["4"]}, "--width 4: mobilenetv2 has widths that 8 div"),
    ({"defense": ["noise:-1"]}, "--defense noise:-1: .*variance must be at least 0"),
    ({"defense": ["noise:nan"]}, "--defense noise:nan: .*variance must be at least 0"),
    ({"defense": ["prune:1.5"]}, "--defense prune:1.5: .*fraction must be .* at most 1"),
    ({"defense": ["dpsgd:1:1"], "model": ["convnet"]}, "BatchNorm .*use --model convnet_gn"),
    ({"defense": ["dpsgd:1:1"], "client_epochs": ["2"]}, "--defense dpsgd:1:1: of one gradient"),
    ({"defense": ["victim"]}, "--defense victim: .*name one"),
    ({"told": ["true"]}, "--told: there is no --defense"),
    ({"attack": ["bayes"], "tv": ["0.1"]}, "--tv: --attack bayes does not use it"),
    ({"attack": ["bayes"], "lr": ["0.1"]}, "--lr: --attack bayes does not use it"),
    ({"attack": ["geiping"], "damping": ["0.1"]}, "--damping: --attack geiping does not use it"),
    ({"attack": ["analytic"], "polish": ["3"]}, "--polish: --attack analytic does not use it"),
    ({"attack": ["bayes"], "init": ["normal"]}, "--init normal: .*use mean or prior"),
    ({"init": ["mean"]}, "--init mean: of --attack bayes"),
    ({"attack": ["bayes"], "anneal_to": ["200"]}, "--anneal-to 200: above --anneal-from 100"),
    ({"attack": ["bayes"], "anneal_to": ["0"]}, "--anneal-to 0: .*greater than 0"),
    ({"attack": ["bayes"], "anneal_from": ["-1"]}, "--anneal-from -1: .*greater than 0"),
    ({"attack": ["bayes"], "image_prior": ["dct"]}, "--image-prior dct: unknown; known are spec"),
    ({"attack": ["bayes"], "posterior": ["8"], "polish": ["2"]}, "--posterior: of an image that"),
    ({"images": ["1", "2"], "target_ids": "1,2"}, "--target-ids: .* differs by --images"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_settings_name_themselves(flags, message):
    with pytest.raises(UserError, match=message):
        study(**flags)


def test_bad_files_name_themselves(tmp_path):
    with pytest.raises(UserError, match=r"absent\.toml cannot be read"):
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tv", "-1"],
        ["--no-such-flag"],
        ["--targets", "100000"],
        ["--dataset", "no_such_set"],
        ["--out", "FILE"],
    ],
)
def test_commands_end_with_code_2_one_line_and_nothing_written(arguments, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    arguments = [str(file) if a == "FILE" else a for a in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "run")]
    assert sweep.main([*arguments, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
