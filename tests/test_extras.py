"""What only an extra installs is named where it is missing."""

import configparser
import re
import sys
from pathlib import Path

import pytest

from skanomaly import BackboneFeatures, onnx
from skanomaly.display import AnomalyMapDisplay

ROOT = Path(__file__).parents[1]


def without(monkeypatch, package):
    """Make as if a package were not installed."""
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def extras():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return {
        name: parser["options.extras_require"][name].split()
        for name in parser["options.extras_require"]
    }


def uses(random_images, small, tmp_path):
    X = random_images(4, 8, 8, 3)
    detector = small("Autoencoder").fit(X)
    file = tmp_path / "weights.safetensors"
    file.touch()
    return {
        "timm": lambda: BackboneFeatures(backbone="timm/no_such").fit(X),
        "onnx": lambda: onnx.export(detector, tmp_path / "a.onnx"),
        "onnxscript": lambda: onnx.export(detector, tmp_path / "a.onnx"),
        "safetensors": lambda: BackboneFeatures(backbone="resnet18", weights=file).fit(
            X
        ),
        "matplotlib": lambda: AnomalyMapDisplay(X, X[..., 0]).plot(),
    }


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("timm", "timm"),
        ("onnx", "onnx"),
        ("onnxscript", "onnx"),
        ("safetensors", "files"),
        ("matplotlib", "plot"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package, extra, random_images, small, tmp_path, monkeypatch
):
    use = uses(random_images, small, tmp_path)[package]
    without(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"pip install 'skanomaly\[{extra}\]'"):
        use()
    assert any(re.match(rf"{package}\b", line) for line in extras()[extra])


def test_docs_name_the_extras_that_there_are():
    known = set(extras())
    pages = [ROOT / "README.md", *ROOT.glob("doc/*.rst"), *ROOT.glob("doc/*/*.rst")]
    named = {
        name
        for page in pages
        for group in re.findall(
            r'pip install (?:-e )?"[^"\[]*\[([^\]]*)\]', page.read_text()
        )
        for name in group.split(",")
    }
    assert named <= known
    table = (ROOT / "doc/install.rst").read_text()
    assert all(f"[{name}]" in table for name in known)
