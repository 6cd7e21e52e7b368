"""The set-up script behind the README's two commands."""

import os
import subprocess
import sys

import pytest
from support import ROOT

SCRIPT = ROOT / "launch" / "run.py"


def run(*arguments, script=SCRIPT, **environment):
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=100)


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("benchmark",), 2), (("--help",), 0)])
def test_it_says_what_it_takes(arguments, code):
    result = run(*arguments)
    assert result.returncode == code
    assert "python3 launch/run.py demo" in result.stderr


def test_a_failing_step_is_named(tmp_path):
    pip = tmp_path / "pip" / "__init__.py"
    pip.parent.mkdir()
    pip.write_text("")
    (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit('no network')")
    script = tmp_path / "launch" / "run.py"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text())
    result = run("test", script=script, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "setting up failed: " in result.stderr
    assert " -m pip install " in result.stderr


def test_the_tested_torch_is_the_one_that_the_readme_names():
    namespace = {}
    source = SCRIPT.read_text()
    exec(source[source.index("TESTED_TORCH") :].splitlines()[0], namespace)
    assert f"torch {namespace['TESTED_TORCH']} included" in (ROOT / "README.md").read_text()
