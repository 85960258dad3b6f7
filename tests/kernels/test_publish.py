"""The repository for the Kernel Hub: its layout, and that its ops are these under names of their own."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dopsd_kernels
from dopsd_kernels import publish


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "dopsd-kernels"
    publish.publish(folder, "someone/dopsd-kernels")
    return folder


def test_the_layout(repository: Path) -> None:
    """Every backend has all files but what is a build's own; nothing of it names the package that it came from."""
    found = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    package = Path(dopsd_kernels.__file__).parent
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.suffix in (".py", ".json")}
    source = files - {"_ops.py", "publish.py"}
    expected = {f"torch-ext/dopsd_kernels/{name}" for name in source}
    expected |= {"build.toml", "flake.nix", "README.md", "tests/test_dopsd_kernels.py"}
    ids = set()
    for backend in ("cpu", "cuda", "rocm"):
        build = repository / "build" / f"torch-{backend}"
        expected |= {f"build/torch-{backend}/{name}" for name in source | {"_ops.py", "metadata.json"}}
        metadata = json.loads((build / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["id"] in (build / "_ops.py").read_text()
        ids.add(metadata["id"])
    assert found == expected and len(ids) == 3
    for path in repository.rglob("*.py"):
        if "tests" not in path.parts:
            text = path.read_text()
            assert "import dopsd_kernels" not in text and "from dopsd_kernels" not in text, path
            assert 'custom_op("' not in text, path
    with pytest.raises(ValueError, match="new or empty"):
        publish.publish(repository, "someone/dopsd-kernels")


def test_kernels_loads_it(repository: Path) -> None:
    """The loader of the Kernel Hub has its ops beside the installed ones, compiled too, to the same bits."""
    kernels = pytest.importorskip("kernels.load")  # of that package, and not of a folder of tests
    from kernels._rust import Build

    backends = Build.open(repository).general.backends  # an error if the file is not of today's form
    assert [str(backend) for backend in backends] == ["cpu", "cuda", "rocm"]
    loaded = kernels.get_local_kernel(repository, backend="cpu")
    assert loaded.__name__ == json.loads((repository / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
    assert set(dopsd_kernels.__all__) == set(loaded.__all__)
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(6, 16, requires_grad=True), torch.randn(6, 16), torch.randn(50, 16)

    def gradient(package: Any, compiled: bool) -> torch.Tensor:
        op = package.fused_step_kl
        if compiled:
            op = torch.compile(op, backend="eager", fullgraph=True)
        return torch.autograd.grad(op(student, teacher, weight, clip=0.05).loss, student)[0]

    for compiled in (False, True):
        assert torch.equal(gradient(loaded, compiled), gradient(dopsd_kernels, compiled))
    names = {name for name in torch.ops._dir if "dopsd" in name}
    assert {"dopsd", loaded.__name__} <= names


@pytest.mark.filterwarnings("ignore:Unknown pytest.mark.kernels_ci")
def test_its_own_test_passes(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a build as it is loaded: under a name of its own, by relative imports."""
    file = repository / "build" / "torch-cpu" / "__init__.py"
    spec = importlib.util.spec_from_file_location("_a_build", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_a_build", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "dopsd_kernels", module)
    runpy.run_path(str(repository / "tests" / "test_dopsd_kernels.py"))["test_step_kl"]()
