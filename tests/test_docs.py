"""The pages' own code, run at toy size from the first block of a page to its last."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import client, defenses

REPOSITORY = Path(__file__).parents[1]
# What a page asks for, and what will do to see that it runs.
SMALLER = (
    (r"iterations=\d+", "iterations=2"),
    (r"seeds=\d+", "seeds=1"),
    (r"posterior=\d+", "posterior=0"),
    (r"GaussNewton\(\)", "Method()"),  # which compiles in a third of the time
    (r"--iterations \d+", "--iterations 2"),
    (r"--seeds \d+", "--seeds 1"),
    (r"--tv 0.001 0.01", "--tv 0.01"),
)
PAGES = sorted(
    page.name
    for page in (REPOSITORY / "docs").glob("*.md")
    if "```python\n" in page.read_text(encoding="utf-8")
)


def run(path, scope):
    """Runs a page's blocks one after another, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S)
    code = "\n".join(blocks)
    if "import torch" in code:
        pytest.importorskip("torch")
    for asked, less in SMALLER:
        code = re.sub(asked, less, code)
    exec(compile(code, str(path), "exec"), scope)
    return scope


def test_the_pages_with_code_are_these():
    assert PAGES == [
        "flower_update.md",
        "from_pytorch.md",
        "study_in_python.md",
        "updates.md",
        "your_own_defense.md",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(defenses, "DEFENSES", dict(defenses.DEFENSES))
    scope = run(REPOSITORY / "docs" / page, {"__name__": "page"})
    shown = capsys.readouterr().out
    if page == "flower_update.md":
        assert scope["found"].sent.kind == "weights"
        assert "label: rocket" in shown
    if page == "from_pytorch.md":
        assert "rocket" in shown
        assert scope["found"].sent.factor == pytest.approx(1, abs=0.01)
    if page == "study_in_python.md":
        assert [one.labels.tolist() for one in scope["found"]] == [[0], [3], [1]]
        assert (tmp_path / "runs" / "own" / "report.html").exists()
    if page == "your_own_defense.md":
        assert (tmp_path / "runs" / "drop" / "report.html").exists()


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.sigmoid(nn.Conv(2, (8, 8), strides=8)(x)), (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_the_code_of_the_readme_runs():
    image = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 32, 32, 3)), jnp.float32)
    model, label = Net(), jnp.array([2])
    variables = jax.jit(model.init)(jax.random.key(0), image)
    loss = client.loss_fn(model, variables)
    update = client.gradient(loss, variables["params"], image, label)[0]
    scope = {"model": model, "variables": variables, "update": update}
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "seeds=32)" in text
    text = text.replace("seeds=32)", "seeds=1, iterations=2)")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(block, scope)
    assert scope["found"].labels.tolist() == [2]
