import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from model import write_model

    return write_model(tmp_path_factory.mktemp("tiny_deepseek_v2"))


@pytest.fixture(scope="session")
def run(model, tmp_path_factory):
    """Runs an engine; ``parts`` is PCP_MLA_VLLM, a phase is what ``engine.begin`` takes. Each run is made once."""
    done = {}

    def run_engine(pcp, parts, phases=({},)):
        key = (pcp, parts, json.dumps(phases))
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            (folder / "job").write_text(json.dumps({"model": str(model), "pcp": pcp, "phases": list(phases)}))
            environment = {name: value for name, value in os.environ.items() if name != "PCP_MLA_VLLM"}
            if parts is not None:
                environment["PCP_MLA_VLLM"] = parts
            command = [sys.executable, str(HERE / "engine.py"), str(folder / "job"), str(folder / "result")]
            with (folder / "log").open("w") as log:
                code = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=300).returncode
            text = (folder / "log").read_text()
            assert code == 0, text[-8000:]
            done[key] = json.loads((folder / "result").read_text())["phases"], text
        return done[key]

    return run_engine
