"""Training memories with Lightning."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from .clipping import clip_grad_norm_
from .distributed import average_sparse_values, ignore_sparse_values
from .gradients import FactoredGradient


class MemoryModuleMixin:
    """What a `LightningModule` needs for memories of every `sparse_grad`; to stand before it.

    `class Model(MemoryModuleMixin, lightning.LightningModule): ...`. The `Trainer`'s
    `gradient_clip_val` then clips gradients of all kinds together, and its "ddp" strategy averages
    sparse ones as what they are. `configure_optimizers` returns one `optim.SparseAdam` of
    `param_groups(self, lr, value_lr)`: Lightning steps several only by hand. Clipping by value
    stays Lightning's, for dense gradients; of others it raises ValueError. Needs Lightning 2.
    """

    def clip_gradients(
        self: Any,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimiser's parameters.

        Called by the `Trainer`; in manual optimisation by you.
        """
        trainer = self.trainer
        value = trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        algorithm = gradient_clip_algorithm or trainer.gradient_clip_algorithm or "norm"
        if algorithm != "norm":
            grads = (p.grad for group in optimizer.param_groups for p in group["params"])
            if value and any(
                g is not None and (isinstance(g, FactoredGradient) or g.is_sparse) for g in grads
            ):
                name = getattr(algorithm, "value", algorithm)
                raise ValueError(
                    f"gradient_clip_algorithm is {name!r}, but must be 'norm' for sparse and "
                    "factored gradients (sparse_grad=True or 'factored')"
                )
            super().clip_gradients(  # pyright: ignore[reportAttributeAccessIssue]
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif value:
            clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), value)

    def setup(self: Any, stage: str) -> None:
        """Keep sparse values out of what will wrap the model; called by the `Trainer`."""
        super().setup(stage)  # pyright: ignore[reportAttributeAccessIssue]
        if self.trainer.world_size > 1:
            ignore_sparse_values(self)

    def on_train_start(self: Any) -> None:
        """Average sparse gradients if the model is wrapped; called by the `Trainer`."""
        super().on_train_start()  # pyright: ignore[reportAttributeAccessIssue]
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            average_sparse_values(model)
