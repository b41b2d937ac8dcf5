"""A folder's lock: kept while a process works there, free when it is gone."""

import os
import resource
import subprocess
import sys

import jax
import pytest

from jaxinv import files
from jaxinv.errors import UserError
from jaxinv.machine import runtime

HOLD = """
import sys, time
from pathlib import Path
from jaxinv import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match="run: another process is at work there"),
            files.locked(tmp_path / "run"),
        ):
            pass
    finally:
        other.kill()
        other.communicate()
    with files.locked(tmp_path / "run"):
        pass


def test_a_full_disk_is_one_line_and_leaves_the_file_before(tmp_path):
    path = tmp_path / "runs" / "run.json"
    files.write_file(path, lambda file: file.write(b"before"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"run\.json: cannot be written .*; make room there"):
            files.write_file(path, lambda file: file.write(bytes(5000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_without_a_cache_that_can_be_written_programs_are_not_kept(variable, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        runtime.set_up_compiler()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("", "--xla_gpu_enable_triton_gemm=false"),
        ("--xla_a=1", "--xla_a=1 --xla_gpu_enable_triton_gemm=false"),
        ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
    ],
)
def test_products_on_gpus_are_left_to_cublas_unless_it_is_said_otherwise(asked, used, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", asked)
    runtime.set_up_compiler()
    assert os.environ["XLA_FLAGS"] == used
