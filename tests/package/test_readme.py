import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer, model = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(layer, str(README), "exec"), names)
    assert re.fullmatch(r"usage \d+\.\d%, KL \d+\.\d\d nats\n", capsys.readouterr().out)
    pytest.importorskip("transformers")
    exec(compile(model, str(README), "exec"), names)
    assert names["layers"] == (6, 12)
    for name, tensor in names["model"].state_dict().items():
        assert torch.equal(names["same"].state_dict()[name], tensor), name


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
