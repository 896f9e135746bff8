"""The README's commands, run as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    assert "uv run pytest" in COMMANDS
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == "uv run pytest"


def test_the_figures_are_those_of_the_committed_results() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from bench.figures import figures, readme_with
    finally:
        sys.path.remove(str(ROOT))
    assert readme_with(figures(), README) == README


def test_every_other_command_is_foldgroups() -> None:
    assert all(command == "uv run pytest" or command.startswith("uv run foldgroup ") for command in COMMANDS)


def test_the_commands_on_the_example_work_in_the_order_given(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = {**os.environ, "FOLDGROUP_TUNING_DB": str(tmp_path / "tuning.sqlite")}
    ran = []
    for command in COMMANDS:
        if not command.startswith("uv run foldgroup") or "FOLDER" in command:
            continue
        line = [sys.executable, "-m", "foldgroup", *shlex.split(command)[3:]]
        if "bench" in line:
            line[line.index("--seconds") + 1] = "1"
        if "--tune-budget" in line:
            line[line.index("--tune-budget") + 1] = "2s"
        result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        assert result.stdout.strip()
        ran.append(line[3])
    assert ran[:6] == ["compile", "inspect", "verify", "bench", "explain", "bisect"]
    assert ran[6:] == ["compile", "tune", "compile", "verify", "bench", "run", "compile"]
