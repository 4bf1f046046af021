"""Lightning with memories of every form of gradient."""

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning")

import pkm_triton as pkm  # noqa: E402
from pkm_triton.lightning import MemoryModuleMixin  # noqa: E402

# Lightning's own, of many kinds.
pytestmark = pytest.mark.filterwarnings("ignore")


class Model(MemoryModuleMixin, lightning.LightningModule):
    def __init__(self, sparse_grad):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4, "query_norm": "layer"}
        memory = pkm.ProductKeyMemory(8, **sizes, sparse_grad=sparse_grad)
        self.net = nn.Sequential(nn.Linear(8, 8), memory)
        self.norms = []

    def training_step(self, batch, _):
        return self.net(batch[0]).square().sum()

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.norms.append(float(pkm.optim.clip_grad_norm_(self.parameters(), torch.inf)))

    def configure_optimizers(self):
        return pkm.optim.SparseAdam(pkm.param_groups(self, 0.01, 0.05), eps=1e-3)


def fit(model, folder, epochs=1, checkpoint=None, **options):
    x = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    options = {"gradient_clip_val": 0.5, **options}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("form", [False, True, "factored"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clips_to_the_norm_that_was_asked_for(form, precision, tmp_path):
    model = Model(form)
    fit(model, tmp_path, precision=precision, accumulate_grad_batches=1)
    assert model.norms == pytest.approx([0.5] * 3, rel=1e-2)
    free = Model(form)
    fit(free, tmp_path, precision=precision, gradient_clip_val=None)
    assert min(free.norms) > 1


@pytest.mark.parametrize("form", [True, "factored"])
def test_resumes_to_the_bit(form, tmp_path):
    whole, resumed = Model(form), Model(form)
    fit(whole, tmp_path, epochs=2)
    fit(resumed, tmp_path, epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    again = Model(form)
    fit(again, tmp_path, epochs=2, checkpoint=tmp_path / "one.ckpt")
    for (name, one), two in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert not torch.equal(one, dict(resumed.named_parameters())[name]), name


def test_clipping_by_value_stays_lightnings(tmp_path):
    model = Model(False)
    fit(model, tmp_path, gradient_clip_algorithm="value", gradient_clip_val=1e-3)
    elements = sum(p.numel() for p in model.parameters())
    # Of each element, not of all together.
    assert 2e-3 < min(model.norms) <= max(model.norms) <= 1e-3 * elements**0.5


@pytest.mark.parametrize("form", [True, "factored"])
def test_clipping_by_value_is_refused_for_other_gradients(form, tmp_path):
    with pytest.raises(ValueError, match="gradient_clip_algorithm is 'value', but must be 'norm'"):
        fit(Model(form), tmp_path, gradient_clip_algorithm="value", gradient_clip_val=1e-3)


class ByHand(Model):
    """Two optimisers, which Lightning steps by hand alone."""

    def __init__(self, sparse_grad):
        super().__init__(sparse_grad)
        self.automatic_optimization = False

    def configure_optimizers(self):
        rest, values = pkm.param_groups(self, 0.01, 0.05)
        return torch.optim.Adam([rest]), pkm.optim.SparseAdam([values])

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index))
        for optimiser in self.optimizers():
            self.clip_gradients(optimiser, 0.5, "norm")
            parameters = (p for group in optimiser.param_groups for p in group["params"])
            self.norms.append(float(pkm.optim.clip_grad_norm_(parameters, torch.inf)))
            optimiser.step()
            optimiser.zero_grad()


@pytest.mark.parametrize("form", [False, True, "factored"])
def test_clips_in_manual_optimisation(form, tmp_path):
    model = ByHand(form)
    fit(model, tmp_path, gradient_clip_val=None)
    assert model.norms == pytest.approx([0.5] * 6, rel=1e-2)
