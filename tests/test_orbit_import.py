import subprocess
import sys

from mptrain.orbit_import import orbit


def test_orbit_prints_through_the_function_that_mptrain_replaces(capsys):
    """Fails when Orbit's private `_log` is renamed, so that its prints would come back."""
    assert orbit.controller._log.__module__ == "absl.logging"
    orbit.controller._log("a line")
    assert capsys.readouterr().out == ""


def test_wrong_orbit_is_named_with_the_remedy(tmp_path):
    (tmp_path / "orbit.py").write_text("SATELLITES = True\n")
    code = "import mptrain.orbit_import"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:.", "PATH": "/bin"}
    )
    assert "is not TensorFlow's: pip uninstall orbit" in finished.stderr
